# SPDX-License-Identifier: Apache-2.0
"""Runs in test pods: a server for others, and a client that does what the suite tells it.

Standard library only: it is mounted into pods from a ConfigMap and run by the Python of Weir's own
image, which every node has. `probe.py serve` is the pod's process. `probe.py relay` connects its
standard input and output to it, for `kubectl exec`; what was started goes on when the relay ends,
so that flows outlive a killed API server.

Requests and replies are lines of JSON: {"id", "do", …} and {"id", "result"} or {"id", "error"}.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import ipaddress
import json
import os
import runpy
import selectors
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CONTROL = os.environ.get("PROBE_CONTROL", "/tmp/probe.sock")
NAME = os.environ.get("PROBE_NAME", socket.gethostname())
TOTAL_RETRANS_OFFSET = 100  # of tcpi_total_retrans in struct tcp_info
CHUNK = bytes(range(256)) * 256
hits: dict[str, Counter[str]] = {"tcp": Counter(), "udp": Counter()}


def plain(address: str) -> str:
    """An address as text, without the ::ffff: of a dual-stack socket."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)


# --- the server


def dual_stack(kind: socket.SocketKind, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET6, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(("::", port))
    return server


def serve_tcp(port: int) -> None:
    server = dual_stack(socket.SOCK_STREAM, port)
    server.listen(512)
    while True:
        connection, peer = server.accept()
        hits["tcp"][plain(peer[0])] += 1
        threading.Thread(target=talk, args=(connection, plain(peer[0])), daemon=True).start()


def talk(connection: socket.socket, peer: str) -> None:
    """Greet; then echo lines, or take or give bytes if a line asks for that."""
    with contextlib.suppress(OSError), connection, connection.makefile("rwb") as stream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.write(json.dumps({"name": NAME, "peer": peer}).encode() + b"\n")
        stream.flush()
        for line in stream:
            words = line.split()
            if words[:1] == [b"SINK"]:
                stream.write(digest_of(stream, int(words[1])).encode() + b"\n")
            elif words[:1] == [b"SOURCE"]:
                for size in chunks(int(words[1])):
                    stream.write(CHUNK[:size])
            else:
                stream.write(line)
            stream.flush()


def chunks(total: int) -> list[int]:
    full, rest = divmod(total, len(CHUNK))
    return [len(CHUNK)] * full + ([rest] if rest else [])


def digest_of(stream: Any, total: int) -> str:
    digest = hashlib.sha256()
    while total:
        data = stream.read(min(total, 65536))
        if not data:
            raise OSError(errno.ECONNRESET, "closed early")
        digest.update(data)
        total -= len(data)
    return digest.hexdigest()


def serve_udp(port: int) -> None:
    """Answers from the address that was asked: with several, the kernel would choose."""
    server = dual_stack(socket.SOCK_DGRAM, port)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    while True:
        data, control, _, peer = server.recvmsg(65535, socket.CMSG_SPACE(20))
        source = plain(peer[0])
        hits["udp"][source] += 1
        answer = json.dumps({"name": NAME, "peer": source, "data": data[:64].decode()}).encode()
        with contextlib.suppress(OSError):
            server.sendmsg([answer], control[:1], 0, peer)


# --- one question


def failure(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if error.errno == errno.ECONNREFUSED:
        return "refused"
    if error.errno in {errno.EHOSTUNREACH, errno.ENETUNREACH}:
        return "unreachable"
    return errno.errorcode.get(error.errno or 0, str(error))


def ask(protocol: str, host: str, port: int, timeout: float) -> dict[str, Any]:
    """Who answers there, or why nobody does."""
    started = time.monotonic()
    try:
        answer = ASK[protocol](host, port, timeout)
    except socket.gaierror as error:
        answer = {"error": f"name: {error}"}
    except OSError as error:
        answer = {"error": failure(error)}
    return {**answer, "ms": round((time.monotonic() - started) * 1000, 1)}


def ask_tcp(host: str, port: int, timeout: float) -> dict[str, Any]:
    with socket.create_connection((host, port), timeout) as connection:
        connection.settimeout(timeout)
        line = connection.makefile("rb").readline()
        if not line:
            raise ConnectionResetError(errno.ECONNRESET, "closed without an answer")
        answer: dict[str, Any] = json.loads(line)
        return answer


def ask_udp(host: str, port: int, timeout: float) -> dict[str, Any]:
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as client:
        client.connect(address)
        client.settimeout(timeout / 2)
        for last in (False, True):  # one repetition, for a first packet lost to neighbour discovery
            client.send(b"ask")
            try:
                answer: dict[str, Any] = json.loads(client.recv(65535))
            except TimeoutError:
                if last:
                    raise
            else:
                return answer
        raise AssertionError


def ask_connect(host: str, port: int, timeout: float) -> dict[str, Any]:
    """For servers that wait for the client to begin."""
    socket.create_connection((host, port), timeout).close()
    return {"name": "connected"}


ASK: dict[str, Callable[[str, int, float], dict[str, Any]]] = {
    "tcp": ask_tcp,
    "udp": ask_udp,
    "connect": ask_connect,
}


def reach(targets: list[tuple[str, str, int]], timeout_s: float = 0.5) -> list[dict[str, Any]]:
    """Ask all at once."""
    with ThreadPoolExecutor(max(1, len(targets))) as pool:
        return list(pool.map(lambda t: ask(t[0], t[1], t[2], timeout_s), targets))


def spread(protocol: str, host: str, port: int, count: int) -> dict[str, int]:
    """Who answered how often."""
    found: Counter[str] = Counter()
    for _ in range(count):
        answer = ask(protocol, host, port, 1.0)
        found[answer.get("name") or answer["error"]] += 1
    return dict(found)


def until(target: tuple[str, str, int], want: str, deadline: float) -> dict[str, Any]:
    """Ask over and over until the outcome is `want`: "answer", "failure" or a certain error."""
    end = time.monotonic() + deadline
    tries = 0
    while True:
        tries += 1
        answer = ask(*target, 0.15)
        outcomes = {answer.get("error", "answer"), "failure" if "error" in answer else "answer"}
        if want in outcomes or time.monotonic() > end:
            return {**answer, "tries": tries}
        time.sleep(0.02)


def resolve(name: str) -> list[str]:
    return sorted({plain(str(entry[4][0])) for entry in socket.getaddrinfo(name, 80)})


def transfer(host: str, port: int, size: int) -> dict[str, Any]:
    """Send and fetch that many bytes; checksums as both ends saw them."""
    expected = hashlib.sha256()
    for piece in chunks(size):
        expected.update(CHUNK[:piece])
    started = time.monotonic()
    with socket.create_connection((host, port), 5) as connection:
        connection.settimeout(30)
        stream = connection.makefile("rwb")
        stream.readline()
        stream.write(f"SINK {size}\n".encode())
        for piece in chunks(size):
            stream.write(CHUNK[:piece])
        stream.flush()
        sent = stream.readline().strip().decode()
        stream.write(f"SOURCE {size}\n".encode())
        stream.flush()
        fetched = digest_of(stream, size)
    wanted = expected.hexdigest()
    seconds = round(time.monotonic() - started, 2)
    return {"sent": sent == wanted, "fetched": fetched == wanted, "seconds": seconds}


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def ping(host: str, size: int = 56, timeout: float = 1.0) -> dict[str, Any]:
    """One ICMP echo, by a raw socket."""
    six = ":" in host
    kind, reply = (128, 129) if six else (8, 0)
    family = socket.AF_INET6 if six else socket.AF_INET
    protocol = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
    identity = os.getpid() & 0xFFFF
    body = struct.pack("!HH", identity, 1) + bytes(size)
    total = 0 if six else checksum(struct.pack("!BBH", kind, 0, 0) + body)
    try:
        with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
            raw.connect((host, 0))
            raw.send(struct.pack("!BBH", kind, 0, total) + body)
            end = time.monotonic() + timeout
            while (left := end - time.monotonic()) > 0:
                raw.settimeout(left)
                data = raw.recv(65535)
                message = data if six else data[(data[0] & 15) * 4 :]
                if message[0] == reply and message[4:6] == body[:2]:
                    return {"answer": True, "bytes": len(message)}
    except OSError as error:
        return {"error": failure(error)}
    return {"error": "timeout"}


# --- flows: go on until they are stopped


class Flow:
    """A thread that sends and counts; `stats` is read by others."""

    def __init__(self, host: str, port: int, interval: float) -> None:
        self.host, self.port, self.interval = host, port, interval
        self.stats: dict[str, Any] = {"sent": 0, "received": 0, "errors": []}
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.guarded, daemon=True)
        self.thread.start()

    def guarded(self) -> None:
        try:
            self.run()
        except OSError as error:
            self.stats["errors"].append(f"{failure(error)} after {self.stats['sent']} sent")

    def run(self) -> None:
        raise NotImplementedError

    def stop(self) -> dict[str, Any]:
        self.stopping.set()
        self.thread.join(10)
        return self.stats


class TcpFlow(Flow):
    """One connection that echoes a line per interval; a stall shows as `max_ms`."""

    def run(self) -> None:
        self.stats |= {"max_ms": 0.0, "retransmits": 0}
        with socket.create_connection((self.host, self.port), 2) as connection:
            connection.settimeout(30)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream = connection.makefile("rwb")
            self.stats["server"] = json.loads(stream.readline())["name"]
            while not self.stopping.wait(self.interval):
                line = f"{self.stats['sent']}\n".encode()
                started = time.monotonic()
                stream.write(line)
                stream.flush()
                self.stats["sent"] += 1
                if stream.readline() != line:
                    raise ConnectionResetError(errno.ECONNRESET, "closed")
                self.stats["received"] += 1
                took = (time.monotonic() - started) * 1000
                self.stats["max_ms"] = max(self.stats["max_ms"], round(took, 1))
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            (self.stats["retransmits"],) = struct.unpack_from("I", info, TOTAL_RETRANS_OFFSET)


class UdpFlow(Flow):
    """One socket, a numbered datagram per interval, each to be answered once."""

    def run(self) -> None:
        family, kind, _, _, address = socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_DGRAM
        )[0]
        missing: set[str] = set()
        with socket.socket(family, kind) as client:
            client.connect(address)
            following = time.monotonic()
            end: float | None = None
            while end is None or (missing and time.monotonic() < end):
                if end is None and time.monotonic() >= following:
                    following += self.interval
                    missing.add(str(self.stats["sent"]))
                    client.send(str(self.stats["sent"]).encode())
                    self.stats["sent"] += 1
                client.settimeout(max(0.001, min(self.interval, following - time.monotonic())))
                with contextlib.suppress(TimeoutError):
                    missing.discard(json.loads(client.recv(65535))["data"])
                self.stats["received"] = self.stats["sent"] - len(missing)
                if self.stopping.is_set() and end is None:
                    end = time.monotonic() + 2
        self.stats["lost"] = sorted(map(int, missing))


class ConnectFlow(Flow):
    """A new TCP connection per interval; a lost SYN shows as one that took a second."""

    def run(self) -> None:
        self.stats |= {"max_ms": 0.0}
        while not self.stopping.wait(self.interval):
            self.stats["sent"] += 1
            answer = ask("tcp", self.host, self.port, 5.0)
            if "error" in answer:
                self.stats["errors"].append(f"{answer['error']} at {self.stats['sent']}")
            else:
                self.stats["received"] += 1
            self.stats["max_ms"] = max(self.stats["max_ms"], answer["ms"])


class HammerFlow(Flow):
    """Datagrams and SYNs to every address of a range, over and over; `received`: answers."""

    def run(self) -> None:
        addresses = [str(host) for host in ipaddress.ip_network(self.host).hosts()][:254]
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        waiting: dict[socket.socket, float] = {}
        with (
            socket.socket(family, socket.SOCK_DGRAM) as client,
            selectors.DefaultSelector() as poll,
        ):
            client.setblocking(False)
            while not self.stopping.is_set():
                started = time.monotonic()
                for address in addresses:
                    self.stats["sent"] += 1
                    with contextlib.suppress(OSError):
                        client.sendto(b"hammer", (address, self.port + 1))
                    self.open(family, address, poll, waiting)
                with contextlib.suppress(OSError):
                    while client.recv(65535):
                        self.stats["received"] += 1
                self.reap(poll, waiting)
                self.stopping.wait(max(0.0, self.interval - (time.monotonic() - started)))
            for connection in waiting:
                connection.close()

    def open(
        self, family: int, address: str, poll: Any, waiting: dict[socket.socket, float]
    ) -> None:
        if len(waiting) > 4000:
            return
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.setblocking(False)
        state = connection.connect_ex((address, self.port))
        if state not in {0, errno.EINPROGRESS}:
            connection.close()
            return
        poll.register(connection, selectors.EVENT_WRITE)
        waiting[connection] = time.monotonic()

    def reap(self, poll: Any, waiting: dict[socket.socket, float]) -> None:
        done = [key.fileobj for key, _ in poll.select(0)]
        for connection in done:
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                self.stats["received"] += 1
        old = time.monotonic() - 0.5
        for connection in {*done, *(c for c, since in waiting.items() if since < old)}:
            poll.unregister(connection)
            connection.close()
            del waiting[connection]


FLOWS = {"tcp": TcpFlow, "udp": UdpFlow, "connect": ConnectFlow, "hammer": HammerFlow}
flows: dict[str, Flow] = {}


def start(flow: str, kind: str, host: str, port: int, interval: float = 0.01) -> None:
    flows[flow] = FLOWS[kind](host, port, interval)


def read(flow: str) -> dict[str, Any]:
    return flows[flow].stats


def stop(flow: str) -> dict[str, Any]:
    return flows[flow].stop()


def get_hits() -> dict[str, dict[str, int]]:
    return {protocol: dict(found) for protocol, found in hits.items()}


ACTIONS: dict[str, Callable[..., Any]] = {
    "reach": reach, "spread": spread, "until": until, "resolve": resolve, "transfer": transfer,
    "ping": ping, "start": start, "read": read, "stop": stop, "hits": get_hits,
}  # fmt: skip


# --- control


def control() -> None:
    Path(CONTROL).unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(CONTROL)
    server.listen(16)
    while True:
        connection, _ = server.accept()
        threading.Thread(target=obey, args=(connection,), daemon=True).start()


def obey(connection: socket.socket) -> None:
    lock = threading.Lock()
    with contextlib.suppress(OSError), connection, connection.makefile("rb") as lines:
        for line in lines:
            request = json.loads(line)
            threading.Thread(target=act, args=(connection, lock, request), daemon=True).start()


def act(connection: socket.socket, lock: threading.Lock, request: dict[str, Any]) -> None:
    reply: dict[str, Any] = {"id": request.pop("id")}
    try:
        reply["result"] = ACTIONS[request.pop("do")](**request)
    except Exception as error:  # noqa: BLE001 - the suite shows it; this process must go on
        reply["error"] = repr(error)
    with lock, contextlib.suppress(OSError):
        connection.sendall(json.dumps(reply).encode() + b"\n")


def relay() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(CONTROL)
        threading.Thread(target=copy_input, args=(client,), daemon=True).start()
        while data := client.recv(65536):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()


def copy_input(client: socket.socket) -> None:
    while data := os.read(0, 65536):
        client.sendall(data)
    client.shutdown(socket.SHUT_RDWR)


def main() -> None:
    if sys.argv[1] == "relay":
        relay()
        return
    for port in json.loads(os.environ.get("PROBE_TCP", "[]")):
        threading.Thread(target=serve_tcp, args=(port,), daemon=True).start()
    for port in json.loads(os.environ.get("PROBE_UDP", "[]")):
        threading.Thread(target=serve_udp, args=(port,), daemon=True).start()
    if more := os.environ.get("PROBE_MORE"):
        ACTIONS.update(runpy.run_path(more)["ACTIONS"])
    control()


if __name__ == "__main__":
    main()
