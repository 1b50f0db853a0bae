# SPDX-License-Identifier: Apache-2.0
"""How long the entries of a service's flow live: both sides of it keep it, and end it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet
from support.datapaths import Datapaths
from support.packet_node import Book, Node, World

from weir.api.address import parse
from weir.datapath.records import CtEntry, CtFlag, SnatEntry, SnatKind
from weir.datapath.settings import Settings

CLOSED, REPLIED, ESTABLISHED = 30, 180, 21600
SNAT_BRIEF, SNAT_STREAM, SNAT_TCP = 120, 200, 21600


@pytest.fixture
def native(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[Node]:
    chosen = dataclasses.replace(settings, tunnel=False)
    made = Node(datapaths.get(chosen), world, net)
    yield made
    made.reader.close()


class Flow:
    """A connection of a client outside to a backend here (b) or elsewhere (r)."""

    def __init__(self, node: Node, net: Book, proto: str, backend: str) -> None:
        self.node, self.net, self.proto, self.backend = node, net, proto, backend
        node.service(6 if proto == "tcp" else 17, 80, (getattr(net, backend), 8080))
        self.port = 4000

    def l4(self, sport: int, dport: int, flags: str) -> Packet:
        if self.proto == "udp":
            return UDP(sport=sport, dport=dport)
        return TCP(sport=sport, dport=dport, flags=flags)

    def ask(self, flags: str = "A") -> None:
        out = self.node.arrives(
            self.net.ip(self.net.world, self.net.vip) / self.l4(4000, 80, flags)
        )
        assert out.drops == {}
        if self.backend == "r":
            self.port = out.frame.sport

    def answer(self, flags: str = "A") -> None:
        l4 = self.l4(8080, self.port, flags)
        if self.backend == "r":
            out = self.node.arrives(self.net.ip(self.net.r, self.net.node) / l4)
        else:
            out = self.node.from_pod("b", self.net.ip(self.net.b, self.net.world) / l4)
        assert (out.drops, out.frame.sport) == ({}, 80)

    def front(self) -> CtEntry:
        [entry] = [e for e in self.node.flows().values() if e.flags & CtFlag.SERVICE]
        return entry

    def life(self) -> int:
        return round(self.front().expires - time.monotonic())

    def age(self, seconds: int) -> None:
        """Makes all entries as old as if nothing had come for that long."""
        for table in (self.node.tables.ct, self.node.tables.snat):
            table.update({  # type: ignore[attr-defined]
                key: dataclasses.replace(entry, expires=entry.expires - seconds)
                for key, entry in table.items()
            })  # fmt: skip


@pytest.fixture(params=["b", "r"], ids=["backend here", "backend elsewhere"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def near(actual: int, expected: int) -> bool:
    return expected - 3 <= actual <= expected + 1


def test_answers_alone_keep_datagrams_going(native: Node, net: Book, backend: str) -> None:
    flow = Flow(native, net, "udp", backend)
    flow.ask()
    for seconds in (25, 50, 50):
        flow.age(seconds)
        flow.answer()
        assert near(flow.life(), REPLIED)
    native.service(17, 80, (net.a, 9999), number=2)
    flow.ask()  # an answer from the old backend still fits
    flow.answer()


def test_a_reset_of_the_backends_ends_it(native: Node, net: Book, backend: str) -> None:
    flow = Flow(native, net, "tcp", backend)
    flow.ask("S")
    flow.answer("SA")
    flow.ask("A")
    assert near(flow.life(), ESTABLISHED)
    flow.answer("RA")
    assert near(flow.life(), CLOSED)
    assert flow.front().flags & CtFlag.RESET


def test_both_have_said_goodbye(native: Node, net: Book, backend: str) -> None:
    flow = Flow(native, net, "tcp", backend)
    flow.ask("S")
    flow.answer("SA")
    flow.ask("A")
    flow.answer("FA")
    assert flow.life() > CLOSED + 60
    flow.ask("FA")
    assert near(flow.life(), CLOSED)


def snat(node: Node, kind: SnatKind) -> SnatEntry:
    [entry] = [e for k, e in node.tables.snat.items() if k.kind == kind]
    return entry


def left(node: Node, kind: SnatKind) -> int:
    return round(snat(node, kind).expires - time.monotonic())


def test_ports_are_given_back(native: Node, net: Book) -> None:
    flow = Flow(native, net, "tcp", "r")
    flow.ask("S")
    flow.answer("SA")
    assert near(left(native, SnatKind.REVERSE), SNAT_BRIEF)
    flow.ask("A")
    assert near(left(native, SnatKind.REVERSE), SNAT_TCP)
    flow.answer("FA")
    flow.ask("FA")
    assert near(left(native, SnatKind.REVERSE), SNAT_BRIEF)


def test_ports_are_given_back_after_a_reset(native: Node, net: Book) -> None:
    flow = Flow(native, net, "tcp", "r")
    for flags in ("S", "A"):
        flow.ask(flags)
    flow.answer("R")
    assert near(left(native, SnatKind.REVERSE), SNAT_BRIEF)


def test_ports_of_datagrams_stay_while_answers_come(native: Node, net: Book) -> None:
    flow = Flow(native, net, "udp", "r")
    flow.ask()
    flow.age(25)
    flow.answer()
    assert near(left(native, SnatKind.REVERSE), SNAT_STREAM)
    assert near(left(native, SnatKind.FORWARD), SNAT_STREAM)


def test_a_masqueraded_connection_gives_its_port_back(native: Node, net: Book) -> None:
    node = native

    def sends(flags: str) -> None:
        packet = net.ip(net.a, net.world) / TCP(sport=4000, dport=443, flags=flags)
        node.from_pod("a", packet)
        assert node.leaves(packet).drops == {}

    sends("S")
    sends("A")
    port = snat(node, SnatKind.FORWARD).port
    assert near(left(node, SnatKind.REVERSE), SNAT_TCP)
    node.arrives(net.ip(net.world, net.node) / TCP(sport=443, dport=port, flags="FA"))
    sends("FA")
    assert near(left(node, SnatKind.REVERSE), SNAT_BRIEF)
    assert snat(node, SnatKind.REVERSE).address == parse(net.a)
