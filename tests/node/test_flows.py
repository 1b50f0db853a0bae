# SPDX-License-Identifier: Apache-2.0
"""What a real agent does with real datagrams when Services change under them.

pod a: clients ── node with agent ── pods b and c: servers that answer with their name
"""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.agents import AgentNode
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.traffic import eventually

from weir.api.address import parse
from weir.api.v1 import weir_pb2 as pb
from weir.cli.main import main

VIPS = {"4": "10.96.0.10", "6": "fd00:96::10"}
PORT, TARGET = 53, 5300
UDP, TCP = 17, 6
# What send() says on an ended socket; recv() says ECONNABORTED.
ENDED = "EDESTADDRREQ"

FAMILIES = pytest.mark.parametrize("family", ["4", "6"])

# Runs in the cgroup of the socket hooks. Each line that it reads is a turn: it sends, and prints
# who answered or why nobody did.
CLIENT = """
import errno, socket, sys
kind, family, address, port = sys.argv[1:]
s = socket.socket(socket.AF_INET if family == "4" else socket.AF_INET6, socket.SOCK_DGRAM)
s.settimeout(1)
target = (address, int(port))
if kind == "connected":
    s.connect(target)
for line in sys.stdin:
    try:
        s.send(b"?") if kind == "connected" else s.sendto(b"?", target)
        print(s.recv(9).decode(), flush=True)
    except OSError as error:
        print(errno.errorcode.get(error.errno, "nobody"), flush=True)
"""


class Server:
    """Answers datagrams, and TCP connections, with its name."""

    def __init__(self, pod: NetNs, name: str) -> None:
        with pod.entered():
            self.udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            self.udp.bind(("::", TARGET))
            self.tcp = socket.create_server(
                ("::", TARGET), family=socket.AF_INET6, dualstack_ipv6=True
            )
        self.name = name.encode()
        for work in (self._datagrams, self._connections):
            threading.Thread(target=work, daemon=True).start()

    def _datagrams(self) -> None:
        while True:
            try:
                _, peer = self.udp.recvfrom(99)
                self.udp.sendto(self.name, peer)
            except (OSError, TypeError):  # shut down: no peer
                return

    def _connections(self) -> None:
        while True:
            try:
                connection, _ = self.tcp.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self.name)

    def close(self) -> None:
        for server in (self.udp, self.tcp):
            with suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()


class WireClient:
    """A datagram socket that no hook sees: its packets are translated."""

    def __init__(self, pod: NetNs, family: str, address: str) -> None:
        with pod.entered():
            self.socket = socket.socket(
                socket.AF_INET if family == "4" else socket.AF_INET6, socket.SOCK_DGRAM
            )
        self.socket.connect((address, PORT))
        self.socket.settimeout(1)

    def ask(self) -> str:
        try:
            self.socket.send(b"?")
            return self.socket.recv(9).decode()
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "nobody")

    def close(self) -> None:
        self.socket.close()


class HookedClient:
    """A process in the agent's cgroup: its sockets are translated."""

    def __init__(
        self, agent: AgentNode, pod: NetNs, kind: str, family: str, address: str, port: int = PORT
    ) -> None:
        procs = Path(str(agent.config["paths"]["cgroup"])) / "cgroup.procs"  # type: ignore[index]  # a dict
        command = [sys.executable, "-c", CLIENT, kind, family, address, str(port)]
        with pod.entered():
            self.process = subprocess.Popen(
                command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                preexec_fn=lambda: procs.write_text("0"),  # noqa: PLW1509  writes one file
            )  # fmt: skip

    def ask(self) -> str:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.communicate(timeout=5)


class World:
    def __init__(self, agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]):
        self.agent = agent
        self.operator = operator
        self.pods = pods
        self.addresses = {name: agent.add(pods[name], name) for name in "abc"}
        self.servers = {name: Server(pods[name], name) for name in "bc"}
        self.clients: list[WireClient | HookedClient] = []

    def service(
        self, ready: str, draining: str = "", protocol: int = UDP, affinity: int = 0
    ) -> None:
        """The Service with these pods; the agent has it when this returns."""
        service = pb.Service(
            namespace="ns",
            name="dns",
            cluster_ips=[parse(vip) for vip in VIPS.values()],
            ports=[pb.ServicePort(name="p", protocol=protocol, port=PORT)],
            affinity_seconds=affinity,
        )
        resources = [pb.Resource(name="service/ns/dns", service=service)]
        for number in range(2):
            endpoints = [
                pb.SliceEndpoint(
                    address=parse(self.addresses[name][number]),
                    ready=name in ready,
                    serving=True,
                    terminating=name in draining,
                )
                for name in ready + draining
            ]
            item = pb.Slice(
                namespace="ns",
                service="dns",
                ports=[pb.SlicePort(name="p", protocol=protocol, port=TARGET)],
                endpoints=endpoints,
            )
            resources.append(pb.Resource(name=f"slice/ns/dns-{number}", slice=item))
        self.operator.wait_acknowledged(self.operator.set(*resources))

    def no_service(self) -> None:
        gone = ("service/ns/dns", "slice/ns/dns-0", "slice/ns/dns-1")
        self.operator.wait_acknowledged(self.operator.set(gone=gone))

    def wire(self, family: str) -> WireClient:
        client = WireClient(self.pods["a"], family, VIPS[family])
        self.clients.append(client)
        return client

    def hooked(
        self,
        kind: str,
        family: str,
        address: str = "",
        port: int = PORT,
        where: NetNs | None = None,
    ) -> HookedClient:
        target = address or VIPS[family]
        client = HookedClient(self.agent, where or self.pods["a"], kind, family, target, port)
        self.clients.append(client)
        return client

    def metric(self, name: str) -> float:
        with self.agent.node.entered():
            scrape = socket.create_connection(("127.0.0.1", 9880), 5)
        with scrape:
            scrape.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: scrape.recv(1 << 16), b"")).decode()
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        return float(line.rpartition(" ")[2])

    def swept(self) -> None:
        """Returns when the sweeps that changes so far ask for are done."""
        time.sleep(0.7)

    def close(self) -> None:
        for one in (*self.clients, *self.servers.values()):
            one.close()


@pytest.fixture
def world(agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]) -> Iterator[World]:
    agent.start()
    made = World(agent, operator, pods)
    yield made
    made.close()


def other(name: str) -> str:
    return "c" if name == "b" else "b"


CLIENTS: dict[str, Callable[[World, str], WireClient | HookedClient]] = {
    "packets": lambda world, family: world.wire(family),
    "unconnected socket": lambda world, family: world.hooked("unconnected", family),
}


@FAMILIES
@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
def test_datagrams_follow_the_backends(
    world: World, family: str, make: Callable[[World, str], WireClient | HookedClient]
) -> None:
    """They stay when a backend comes, go on when theirs goes, and stay there when it comes back;
    through a drain they stay to its end."""
    world.service("bc")
    client = make(world, family)
    first = client.ask()
    assert first in {"b", "c"}, world.agent.log
    second = other(first)
    world.service(second)
    assert eventually(lambda: client.ask() == second, 3), world.agent.log
    world.service("bc")
    world.swept()
    assert {client.ask() for _ in range(8)} == {second}
    world.service(first, draining=second)
    world.swept()
    assert {client.ask() for _ in range(8)} == {second}
    world.service(first)
    assert eventually(lambda: client.ask() == first, 3), world.agent.log


@FAMILIES
def test_connected_sockets_to_a_vanished_backend_are_ended(world: World, family: str) -> None:
    """Those that were translated; not one that connected to the backend's address itself."""
    world.service("b")
    address = world.addresses["b"][int(family == "6")]
    translated = world.hooked("connected", family)
    itself = world.hooked("connected", family, address, TARGET)
    assert translated.ask() == itself.ask() == "b", world.agent.log
    world.service("c")
    assert eventually(lambda: translated.ask() == ENDED, 3), world.agent.log
    assert itself.ask() == "b"
    assert world.metric("weir_sockets_destroyed_total") == 1


@FAMILIES
@pytest.mark.parametrize("place", ["pod", "node"])
def test_connected_sockets_of_a_service_that_goes_are_ended(
    world: World, family: str, place: str
) -> None:
    world.service("b")
    where = world.agent.node if place == "node" else None
    client = world.hooked("connected", family, where=where)
    assert client.ask() == "b"
    world.no_service()
    assert eventually(lambda: client.ask() == ENDED, 3), world.agent.log


@FAMILIES
def test_flows_from_before_the_service_are_translated(world: World, family: str) -> None:
    client = world.wire(family)
    assert client.ask() not in {"b", "c"}
    world.service("b")
    assert eventually(lambda: client.ask() == "b", 3), world.agent.log


@FAMILIES
def test_affinity_ends_with_the_backend(world: World, family: str) -> None:
    def connect() -> str:
        with world.pods["a"].entered():
            client = socket.create_connection((VIPS[family], PORT), 2)
        with client:
            return client.recv(9).decode()

    world.service("bc", protocol=TCP, affinity=600)
    first = connect()
    assert {connect() for _ in range(8)} == {first}
    world.service(other(first), protocol=TCP, affinity=600)
    world.swept()
    assert {connect() for _ in range(8)} == {other(first)}
    world.service("bc", protocol=TCP, affinity=600)
    assert {connect() for _ in range(8)} == {other(first)}


def test_flows_are_listed_and_flushed(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Filters, the table for people, and what a flush leaves."""
    world.service("b")
    assert world.wire("4").ask() == "b"
    assert world.wire("6").ask() == "b"
    where = ("--socket", str(world.agent.folder / "run" / "agent.sock"))

    def flows(*words: str) -> list[dict[str, object]]:
        assert main(["ct", "list", "-o", "json", *words, *where]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (to_vip, to_backend) = flows("--service", "ns/dns", "--address", VIPS["4"])
    if to_vip["translation"] != "to backend":
        to_vip, to_backend = to_backend, to_vip
    assert to_vip["destination"] == {"address": VIPS["4"], "port": PORT, "pod": ""}
    assert to_vip["translated"] == f"{world.addresses['b'][0]}:{TARGET}"
    assert to_backend["translation"] == "replies from"
    assert to_backend["translated"] == f"{VIPS['4']}:{PORT}"
    for flow in (to_vip, to_backend):
        assert flow["node"] == "node1"
        assert flow["service"] == "ns/dns"
        assert flow["protocol"] == "UDP"
        assert isinstance(flow["source"], dict)
        assert flow["source"]["pod"] == "ns/a"
        assert isinstance(flow["seconds_left"], int)
        assert 0 < flow["seconds_left"] <= 180
    assert to_backend["direction"] == "local"
    assert to_backend["state"] == "replied"
    assert len(flows("--pod", "ns/b")) == 2
    assert len(flows("--port", str(TARGET), "--protocol", "udp")) == 4
    assert flows("--protocol", "sctp") == []
    assert main(["ct", "flush", "--dry-run", "--pod", "ns/b", *where]) == 0
    shown = capsys.readouterr().out
    assert "2 flows would be forgotten" in shown
    assert "replies from 10.96.0.10:53" in shown
    assert main(["ct", "flush", *where]) == 1
    assert "--all" in capsys.readouterr().err
    assert main(["ct", "flush", "--pod", "ns/b", "-o", "json", *where]) == 0
    assert json.loads(capsys.readouterr().out) == [{"node": "node1", "data": {"flows": 2}}]
    assert flows("--pod", "ns/b") == []
    assert len(flows("--port", str(PORT))) == 2
    assert main(["ct", "flush", "--all", *where]) == 0
    assert capsys.readouterr().out.split()[-2] == "node1"
    assert flows("--port", str(PORT)) == []
