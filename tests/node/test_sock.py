# SPDX-License-Identifier: Apache-2.0
"""Services at the socket, with real sockets: a process in a cgroup and network namespace of
its own, the services' backends on its loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.datapaths import SMALL, clear, place
from support.namespaces import NetNs

from weir.api.address import parse
from weir.datapath.datapath import Datapath
from weir.datapath.records import Backend, BackendKey, Service, ServiceKey, SockNatKey
from weir.datapath.settings import Settings

pytestmark = pytest.mark.core

VIP = {"4": "10.96.0.10", "6": "fd00:96::10", "mapped": "::ffff:10.96.0.10"}
LOCAL = {"4": "127.0.0.1", "6": "::1", "mapped": "::ffff:127.0.0.1"}
PROTO = {"tcp": 6, "udp": 17}

# Runs in the cgroup: servers that answer with their port, and the client. Prints what it saw.
PRELUDE = """
import errno, socket, sys, threading
family, vip, local = sys.argv[1:4]
family = socket.AF_INET if family == "4" else socket.AF_INET6
server_family = socket.AF_INET6 if local == "::1" else socket.AF_INET
def udp_server(port):
    s = socket.socket(server_family, socket.SOCK_DGRAM)
    s.bind((local.removeprefix("::ffff:"), port))
    def serve():
        while True:
            _, peer = s.recvfrom(99)
            s.sendto(str(port).encode(), peer)
    threading.Thread(target=serve, daemon=True).start()
def tcp_server(port):
    s = socket.socket(server_family)
    s.bind((local.removeprefix("::ffff:"), port)); s.listen()
    def serve():
        while True:
            c, _ = s.accept()
            c.sendall(str(port).encode()); c.close()
    threading.Thread(target=serve, daemon=True).start()
def client(kind):
    s = socket.socket(family, kind); s.settimeout(3)
    return s
"""


class Box:
    """A namespace and cgroup in which scripts run, with the socket programs attached."""

    def __init__(self, datapath: Datapath, cgroup: Path, ns: NetNs) -> None:
        self.datapath = datapath
        self.cgroup = cgroup
        self.ns = ns
        self.number = 0

    def service(self, family: str, proto: str, port: int, *ports: int, backend: str = "") -> None:
        self.number += 1
        address = parse(backend or LOCAL[family])
        for slot, target in enumerate(ports):
            row = {BackendKey(self.number, slot): Backend(address, target)}
            self.datapath.tables.backends.update(row)
        key = ServiceKey(parse(VIP[family]), port, PROTO[proto], 0)
        self.datapath.tables.services.update({key: Service(self.number, len(ports), 0, 0)})

    def start(self, family: str, script: str) -> subprocess.Popen[str]:
        def enter() -> None:
            (self.cgroup / "cgroup.procs").write_text("0")

        code = PRELUDE + textwrap.dedent(script)
        command = [sys.executable, "-c", code, family, VIP[family], LOCAL[family]]
        with self.ns.entered():
            return subprocess.Popen(
                command, text=True, preexec_fn=enter,  # noqa: PLW1509  writes one file, no other thread runs
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip

    def run(self, family: str, script: str) -> list[str]:
        process = self.start(family, script)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        return out.split()


@pytest.fixture(scope="module")
def installed(private_mounts: None) -> Iterator[tuple[Datapath, Path]]:
    with place() as (root, cgroup):
        datapath = Datapath.open(root, cgroup, Settings(), SMALL)
        yield datapath, cgroup
        datapath.close()
        Datapath.remove(root)


@pytest.fixture
def box(installed: tuple[Datapath, Path], netns: Callable[[], NetNs]) -> Box:
    datapath, cgroup = installed
    clear(datapath)
    return Box(datapath, cgroup, netns())


FAMILIES = pytest.mark.parametrize("family", ["4", "6", "mapped"])


@FAMILIES
def test_tcp(box: Box, family: str) -> None:
    """connect() to the VIP reaches the backend, getpeername() says the VIP."""
    box.service(family, "tcp", 80, 8080)
    seen = box.run(
        family,
        """
        tcp_server(8080)
        s = client(socket.SOCK_STREAM); s.connect((vip, 80))
        print(s.recv(9).decode(), *s.getpeername()[:2])
        """,
    )
    assert seen == ["8080", VIP[family], "80"]


@FAMILIES
def test_udp_unconnected(box: Box, family: str) -> None:
    """sendto() keeps its backend, the answers come from the VIP; another server's do not."""
    box.service(family, "udp", 53, 5301, 5302, 5303)
    seen = box.run(
        family,
        """
        for port in (5301, 5302, 5303, 9999):
            udp_server(port)
        s = client(socket.SOCK_DGRAM)
        answers = set()
        for _ in range(20):
            s.sendto(b"?", (vip, 53))
            data, peer = s.recvfrom(99)
            answers.add(data.decode()); assert peer[:2] == (vip, 53), peer
        s.sendto(b"?", (local, 9999))
        data, peer = s.recvfrom(99)
        assert peer[:2] == (local, 9999), peer
        print(len(answers))
        """,
    )
    assert seen == ["1"]


@FAMILIES
def test_udp_connected(box: Box, family: str) -> None:
    box.service(family, "udp", 53, 5301)
    seen = box.run(
        family,
        """
        udp_server(5301)
        s = client(socket.SOCK_DGRAM); s.connect((vip, 53)); s.send(b"?")
        data, peer = s.recvfrom(99)
        print(data.decode(), *peer[:2], *s.getpeername()[:2])
        """,
    )
    assert seen == ["5301", VIP[family], "53", VIP[family], "53"]


@FAMILIES
def test_udp_backend_gone(box: Box, family: str) -> None:
    """An unconnected socket keeps its backend; when the agent has swept that out, its next call
    finds another."""
    box.service(family, "udp", 53, 5301)
    process = box.start(
        family,
        """
        for port in (5301, 5302):
            udp_server(port)
        s = client(socket.SOCK_DGRAM)
        for _ in range(3):
            s.sendto(b"?", (vip, 53)); print(s.recvfrom(99)[0].decode(), flush=True)
            sys.stdin.readline()
        """,
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "5301\n"
    box.service(family, "udp", 53, 5302)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "5301\n"
    table = box.datapath.tables.sock_nat
    table.delete([key for key, _ in table.items()])
    out, errors = process.communicate("\n\n", timeout=60)
    assert (process.returncode, out) == (0, "5302\n"), errors


@FAMILIES
@pytest.mark.parametrize("kind", ["tcp connect", "udp connect", "udp sendto"])
def test_no_backend(box: Box, family: str, kind: str) -> None:
    """Refused at once where the kernel lets us say so; else the packet goes out as it is."""
    box.service(family, kind[:3], 80)
    seen = box.run(
        family,
        f"""
        s = client(socket.SOCK_{"STREAM" if kind.startswith("tcp") else "DGRAM"})
        try:
            {"s.sendto(b'?', (vip, 80))" if kind.endswith("sendto") else "s.connect((vip, 80))"}
        except OSError as error:
            print(errno.errorcode[error.errno])
        """,
    )
    assert seen == ["ECONNREFUSED" if box.datapath.features.set_retval else "ENETUNREACH"]


@FAMILIES
def test_other_addresses_are_left_alone(box: Box, family: str) -> None:
    """The VIP at another port or protocol is no service."""
    box.service(family, "udp", 8080, 1)
    seen = box.run(
        family,
        """
        tcp_server(8080)
        s = client(socket.SOCK_STREAM); s.connect((local, 8080))
        print(s.recv(9).decode(), *s.getpeername()[:2])
        try:
            client(socket.SOCK_STREAM).connect((vip, 8080))
        except OSError as error:
            print(errno.errorcode[error.errno])
        """,
    )
    assert seen == ["8080", LOCAL[family], "8080", "ENETUNREACH"]


def test_rows(box: Box) -> None:
    """A connection leaves one row: from its backend to the VIP."""
    box.service("4", "tcp", 80, 8080)
    box.run(
        "4", "tcp_server(8080)\ns = client(socket.SOCK_STREAM); s.connect((vip, 80)); s.recv(9)"
    )
    [(key, value)] = box.datapath.tables.sock_nat.items()
    assert key == SockNatKey(key.cookie, parse("127.0.0.1"), 8080, socket.IPPROTO_TCP)
    assert (value.address, value.port, value.service) == (parse(VIP["4"]), 80, 1)
