# SPDX-License-Identifier: Apache-2.0
"""Services at the socket, with real sockets: a process in a cgroup and network namespace of
its own, the services' backends on its loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.datapaths import SMALL, clear, place
from support.namespaces import NetNs

from weir.api.address import parse
from weir.datapath.datapath import Datapath
from weir.datapath.records import (
    AffinityKey,
    Backend,
    BackendKey,
    NetnsAddresses,
    Service,
    ServiceFlag,
    ServiceKey,
    SockNatKey,
    SourceRangeKey,
)
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
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
    """A connection has one row: from its backend to the VIP."""
    box.service("4", "tcp", 80, 8080)
    process = box.start(
        "4",
        """
        tcp_server(8080)
        s = client(socket.SOCK_STREAM); s.connect((vip, 80)); s.recv(9)
        print(flush=True); sys.stdin.readline()
        """,
    )
    assert process.stdout
    process.stdout.readline()
    rows = list(box.datapath.tables.sock_nat.items())
    process.communicate("\n", timeout=60)
    [(key, value)] = rows
    assert key == SockNatKey(key.cookie, parse("127.0.0.1"), 8080, socket.IPPROTO_TCP)
    assert (value.address, value.port, value.service) == (parse(VIP["4"]), 80, 1)


CONNECT = """
for _ in range(8):
    s = client(socket.SOCK_STREAM)
    try:
        s.connect((vip, 80)); print(s.recv(9).decode())
    except OSError as error:
        print(errno.errorcode[error.errno])
"""
ADDRESS = {"4": "10.0.1.2", "6": "fd00:1::2", "mapped": "10.0.1.2"}
PORTS = range(8000, 8010)
SO_NETNS_COOKIE = 71


def cookie_of(ns: NetNs) -> int:
    with ns.entered(), socket.socket() as made:
        found = made.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    return int.from_bytes(found, sys.byteorder)


def serve_and(script: str) -> str:
    return f"for port in {PORTS}: tcp_server(port)\n{script}"


def choosy(box: Box, family: str, flags: int = 0, affinity_seconds: int = 0) -> None:
    """A service of ten backends whose choice depends on the client."""
    box.service(family, "tcp", 80, *PORTS)
    [(key, row)] = box.datapath.tables.services.items()
    changed = replace(row, flags=flags, affinity_seconds=affinity_seconds, identity=5)
    box.datapath.tables.services.update({key: changed})


def is_pod(box: Box) -> None:
    addresses = NetnsAddresses(parse(ADDRESS["4"]), parse(ADDRESS["6"]))
    box.datapath.tables.netns_addresses.update({cookie_of(box.ns): addresses})


@pytest.mark.netns_cookies
@FAMILIES
def test_affinity(box: Box, family: str) -> None:
    """By the pod's address, which packets know it by too."""
    choosy(box, family, affinity_seconds=100)
    is_pod(box)
    assert len(set(box.run(family, serve_and(CONNECT)))) == 1
    [(key, value)] = box.datapath.tables.affinity.items()
    assert key == AffinityKey(5, parse(ADDRESS[family]))
    chosen = replace(value, port=8003)
    box.datapath.tables.affinity.update({key: chosen})
    assert set(box.run(family, serve_and(CONNECT))) == {"8003"}


@pytest.mark.netns_cookies
@FAMILIES
def test_source_ranges(box: Box, family: str) -> None:
    """What is not allowed goes out as it is, to be dropped with a reason."""
    choosy(box, family, flags=ServiceFlag.SOURCE_RANGES)
    is_pod(box)
    assert set(box.run(family, serve_and(CONNECT))) == {"ENETUNREACH"}
    box.datapath.tables.source_ranges.update({SourceRangeKey(160, 5, parse(ADDRESS[family])): 1})
    assert "ENETUNREACH" not in box.run(family, serve_and(CONNECT))


@FAMILIES
def test_unknown_clients_are_left_to_the_packets(box: Box, family: str) -> None:
    choosy(box, family, affinity_seconds=100)
    assert set(box.run(family, serve_and(CONNECT))) == {"ENETUNREACH"}


NODE = {"4": "192.0.2.1", "6": "2001:db8::1"}


@pytest.mark.netns_cookies
@pytest.mark.parametrize("family", ["4", "6"])
def test_node_ports_on_the_loopback_address(
    box: Box, installed: tuple[Datapath, Path], family: str
) -> None:
    """For the host's own processes: there it is one more of the node's addresses."""
    datapath, cgroup = installed
    chosen = Settings(
        node_ipv4=parse(NODE["4"]), node_ipv6=parse(NODE["6"]), host_netns_cookie=cookie_of(box.ns)
    )
    script = """
    tcp_server(8080)
    s = client(socket.SOCK_STREAM)
    try:
        s.connect((local, 30080)); print(s.recv(9).decode(), *s.getpeername()[:2])
    except OSError as error:
        print(errno.errorcode[error.errno])
    """
    with place() as (root, other):
        host = Datapath.open(root, other, chosen, SMALL)
        try:
            for one, group in ((host, other), (datapath, cgroup)):
                here = Box(one, group, box.ns)
                one.tables.backends.update({BackendKey(1, 0): Backend(parse(LOCAL[family]), 8080)})
                key = ServiceKey(parse(NODE[family]), 30080, PROTO["tcp"], 0)
                one.tables.services.update({key: Service(1, 1, 0, 0)})
                seen = here.run(family, script)
                assert seen == ([
                    "8080", LOCAL[family], "30080"] if one is host else ["ECONNREFUSED"]
                )  # fmt: skip
            # A host port of the loopback address alone goes before.
            host.tables.backends.update({BackendKey(2, 0): Backend(parse(LOCAL[family]), 8081)})
            own = ServiceKey(parse(LOCAL[family]), 30080, PROTO["tcp"], 0)
            host.tables.services.update({own: Service(2, 1, 0, 0)})
            changed = script.replace("tcp_server(8080)", "tcp_server(8081)")
            seen = Box(host, other, box.ns).run(family, changed)
            assert seen == ["8081", LOCAL[family], "30080"]
        finally:
            host.close()
            Datapath.remove(root)


@FAMILIES
def test_a_closed_socket_takes_its_row_with_it(box: Box, family: str) -> None:
    """A connected one's, however it ends; an unconnected socket does not know its rows."""
    for proto in PROTO:
        box.service(family, proto, 80, 8080)
    script = """
    tcp_server(8080); udp_server(8080)
    left = []
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        for _ in range(20):
            s = client(kind); s.connect((vip, 80)); s.send(b"?"); s.recv(9); s.close()
        left.append(client(kind)); left[-1].connect((vip, 80))
    print(flush=True); sys.stdin.readline()
    s = client(socket.SOCK_DGRAM); s.sendto(b"?", (vip, 80)); s.recv(9); s.close()
    print(flush=True); sys.stdin.readline()
    """
    process = box.start(family, script)
    assert process.stdin
    assert process.stdout

    def rows() -> list[tuple[int, int]]:
        return sorted((key.protocol, key.port) for key, _ in box.datapath.tables.sock_nat.items())

    process.stdout.readline()
    assert rows() == [(6, 8080), (17, 8080)]
    process.stdin.write("\n")
    process.stdin.flush()
    process.stdout.readline()
    assert rows() == [(6, 8080), (17, 80), (17, 8080), (17, 8080)]
    _, errors = process.communicate("\n", timeout=60)
    assert process.returncode == 0, errors
    assert rows() == [(17, 80), (17, 8080)]
