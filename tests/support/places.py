# SPDX-License-Identifier: Apache-2.0
"""Processes that serve and connect from a network namespace and a cgroup, in large batches.

`Place` is the test's end. The process itself is this module's `main`: it listens where it is
told, and runs the probes it gets on its input all at once, so that those which only time out
cost the time of one. A server answers with its own name and the client's address as it sees it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from support.namespaces import NetNs

TESTS = Path(__file__).parents[1]
AT_ONCE = 64
LINE = 1 << 24


@dataclass(frozen=True, slots=True)
class Probe:
    """One TCP connection or UDP round trip. seconds: until silence counts as an answer.
    source_port: the client's, 0 for any."""

    protocol: str
    address: str
    port: int
    seconds: float
    source_port: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """answer: reached, refused or dropped. server, source: who answered, and what it saw."""

    answer: str
    server: str = ""
    source: str = ""
    detail: str = ""


class Place:
    """A process in a namespace, and in a cgroup if one is given: its sockets are those that the
    socket programs of that cgroup see. `name` is what its servers say."""

    def __init__(
        self, name: str, where: NetNs, cgroup: Path | None = None, ports: Sequence[int] = ()
    ) -> None:
        arguments = [name, str(cgroup or ""), *map(str, ports)]
        with where.entered():
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.places", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(TESTS)},
            )
        self.name = name

    def wait_ready(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == "ready\n", f"the process at {self.name} said {line!r}"

    def probe(self, probes: Sequence[Probe]) -> list[Outcome]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([asdict(probe) for probe in probes]) + "\n")
        self._process.stdin.flush()
        return [Outcome(**row) for row in json.loads(self._process.stdout.readline())]

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


# ---- in the process ---------------------------------------------------------------


def _listener(port: int, kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(socket.AF_INET6, kind)
    made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(("::", port))
    made.setblocking(False)
    if kind == socket.SOCK_STREAM:
        made.listen(256)
    return made


def _answer(name: str, peer: str) -> bytes:
    return json.dumps([name, peer.removeprefix("::ffff:")]).encode()


def _answer_datagrams(name: str, listener: socket.socket) -> None:
    with suppress(BlockingIOError):
        while True:
            _, peer = listener.recvfrom(512)
            listener.sendto(_answer(name, peer[0]), peer)


async def _serve(name: str, port: int) -> None:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(_answer(name, writer.get_extra_info("peername")[0]))
        writer.close()

    await asyncio.start_server(answer, sock=_listener(port, socket.SOCK_STREAM))
    datagrams = _listener(port, socket.SOCK_DGRAM)
    asyncio.get_running_loop().add_reader(datagrams, _answer_datagrams, name, datagrams)


async def _exchange(probe: Probe) -> bytes:
    family = socket.AF_INET6 if ":" in probe.address else socket.AF_INET
    kind = socket.SOCK_STREAM if probe.protocol == "tcp" else socket.SOCK_DGRAM
    loop = asyncio.get_running_loop()
    with socket.socket(family, kind) as client:
        client.setblocking(False)
        if probe.source_port:
            client.bind(("", probe.source_port))
        await loop.sock_connect(client, (probe.address, probe.port))
        if kind == socket.SOCK_DGRAM:
            await loop.sock_sendall(client, b"?")
        return await loop.sock_recv(client, 512)


async def _one(probe: Probe, turns: asyncio.Semaphore) -> Outcome:
    async with turns:
        try:
            data = await asyncio.wait_for(_exchange(probe), probe.seconds)
        except ConnectionRefusedError:
            return Outcome("refused")
        except (OSError, TimeoutError) as error:
            return Outcome("dropped", detail=repr(error))
    if not data:
        return Outcome("dropped", detail="closed without an answer")
    server, source = json.loads(data)
    return Outcome("reached", server, source)


async def _run(name: str, ports: list[int]) -> None:
    for port in ports:
        await _serve(name, port)
    reader = asyncio.StreamReader(limit=LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := await reader.readline():
        turns = asyncio.Semaphore(AT_ONCE)
        probes = [Probe(**row) for row in json.loads(line)]
        found = await asyncio.gather(*(_one(probe, turns) for probe in probes))
        sys.stdout.write(json.dumps([asdict(outcome) for outcome in found]) + "\n")
        sys.stdout.flush()


def main() -> None:
    name, cgroup, *ports = sys.argv[1:]
    if cgroup:
        (Path(cgroup) / "cgroup.procs").write_text("0")
    asyncio.run(_run(name, [int(port) for port in ports]))


if __name__ == "__main__":
    main()
