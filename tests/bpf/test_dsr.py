# SPDX-License-Identifier: Apache-2.0
"""Direct server return: what one node writes into packets, and another takes out of them."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, TCP, UDP, IPOption, IPOption_NOP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6ExtHdrDestOpt, PadN
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.datapaths import Datapaths
from support.packet_node import (
    GATEWAY_MAC,
    HOST_MACS,
    PEER_MAC,
    POD_MACS,
    Book,
    Node,
    Outcome,
    World,
)
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, assert_packet

from weir.datapath.records import CtFlag, DropReason, Isolation, ServiceFlag
from weir.datapath.settings import Settings

SIZE = {4: 8, 6: 24}


@pytest.fixture(params=["vxlan", "native"])
def either(
    request: pytest.FixtureRequest,
    datapaths: Datapaths,
    settings: Settings,
    world: World,
    net: Book,
) -> Iterator[Node]:
    chosen = dataclasses.replace(settings, tunnel=request.param == "vxlan")
    made = Node(datapaths.get(chosen), world, net)
    yield made
    made.reader.close()


@pytest.fixture
def native(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[Node]:
    """Where an uplink's packet may have it: from the overlay's test runs bring no tunnel key."""
    made = Node(datapaths.get(dataclasses.replace(settings, tunnel=False)), world, net)
    yield made
    made.reader.close()


def carrying(
    net: Book, source: str, target: str, frontend: str, port: int, **fields: int
) -> Packet:
    """An IP header with what the client asked for."""
    if net.family == 4:
        value = port.to_bytes(2) + socket.inet_aton(frontend)
        option = IPOption(bytes([158, 8]) + value)
        return net.ip(source, target, options=[option], **fields)
    value = port.to_bytes(2) + socket.inet_pton(socket.AF_INET6, frontend)
    option = Raw(bytes([0x1E, 18]) + value)
    header = IPv6ExtHdrDestOpt(len=2, options=[option, PadN(optdata=b"")], autopad=0)
    return net.ip(source, target, **fields) / header


def onward(layers: Packet) -> bytes:
    return bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)


def to_pod(pod: str, layers: Packet) -> bytes:
    return bytes(Ether(dst=POD_MACS[pod], src=HOST_MACS[pod]) / layers)


def test_a_connections_first_packet_carries_it(either: Node, net: Book) -> None:
    node = either
    node.service(6, 80, (net.r, 8080), flags=ServiceFlag.DSR)
    out = node.arrives(net.ip(net.world, net.vip) / TCP(sport=4000, dport=80, flags="S"))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    ip = carrying(net, net.world, net.r, net.vip, 80, **net.ttl(63))
    assert_packet(out.packet, onward(ip / TCP(sport=4000, dport=8080, flags="S")))
    [flow] = node.flows().values()
    assert flow.flags & (CtFlag.SERVICE | CtFlag.SNAT | CtFlag.DSR) == CtFlag.SERVICE | CtFlag.DSR
    out = node.arrives(net.ip(net.world, net.vip) / TCP(sport=4000, dport=80, flags="A") / b"x")
    plain = net.ip(net.world, net.r, **net.ttl(63))
    assert_packet(out.packet, onward(plain / TCP(sport=4000, dport=8080, flags="A") / b"x"))
    assert list(node.tables.snat.items()) == []


def test_every_datagram_carries_it(either: Node, net: Book) -> None:
    node = either
    node.service(17, 53, (net.r, 5353), flags=ServiceFlag.DSR)
    for _ in range(2):
        out = node.arrives(net.ip(net.world, net.vip) / UDP(sport=4000, dport=53) / b"ask")
        ip = carrying(net, net.world, net.r, net.vip, 53, **net.ttl(63))
        assert_packet(out.packet, onward(ip / UDP(sport=4000, dport=5353) / b"ask"))


@pytest.mark.parametrize("backend", ["pod here", "another node"])
def test_not_for_every_backend(either: Node, net: Book, backend: str) -> None:
    """A pod here answers by this node anyway; another node's sockets cannot read it."""
    node = either
    target = net.b if backend == "pod here" else net.node2
    node.service(6, 80, (target, 8080), flags=ServiceFlag.DSR)
    out = node.arrives(net.ip(net.world, net.vip) / TCP(sport=4000, dport=80, flags="S"))
    assert (out.drops, len(out.packet)) == ({}, 54 if net.family == 4 else 74)
    assert not any(flow.flags & CtFlag.DSR for flow in node.flows().values())


def test_options_of_the_clients_own(either: Node) -> None:
    """There is no sure place for ours then: the backend sees this node's address."""
    net = either.book
    if net.family == 6:
        return
    either.service(6, 80, (net.r, 8080), flags=ServiceFlag.DSR)
    asked = net.ip(net.world, net.vip, options=[IPOption_NOP() for _ in range(4)])
    out = either.arrives(asked / TCP(sport=4000, dport=80, flags="S"))
    assert (out.drops, out.frame[1].src) == ({}, net.node)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_the_backends_node(native: Node, net: Book, proto: str) -> None:
    """Takes it out before the pod sees it; the pod's answers come from the frontend."""
    node = native
    number, layer = (6, TCP) if proto == "tcp" else (17, UDP)
    node.service(number, 80, (net.r, 8080))
    node.isolate(b_egress=Isolation(9, 0))
    asks = layer(sport=4000, dport=8080) / Raw(b"ask")
    out = node.arrives(carrying(net, net.world, net.b, net.vip, 80) / asks)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("b", net.ip(net.world, net.b) / asks))
    answer = node.from_pod("b", net.ip(net.b, net.world) / layer(sport=8080, dport=4000))
    expected = net.ip(net.vip, net.world, **net.ttl(63)) / layer(sport=80, dport=4000)
    assert (answer.code, answer.packet[14:]) == (TC_ACT_REDIRECT, bytes(expected))


def test_another_nodes_port(native: Node, net: Book) -> None:
    node = native
    out = node.arrives(
        carrying(net, net.world, net.b, net.node2, 30080) / TCP(sport=4000, dport=8080)
    )
    assert len(out.packet) == (54 if net.family == 4 else 74)
    answer = node.from_pod("b", net.ip(net.b, net.world) / TCP(sport=8080, dport=4000, flags="SA"))
    assert (answer.frame[1].src, answer.frame.sport) == (net.node2, 30080)


def test_nobody_answers_as_what_is_no_frontend(native: Node, net: Book) -> None:
    node = native
    lie = carrying(net, net.world, net.b, net.world2, 80) / TCP(sport=4000, dport=8080)
    out = node.arrives(lie)
    assert_packet(out.packet, to_pod("b", lie))
    answer = node.from_pod("b", net.ip(net.b, net.world) / TCP(sport=8080, dport=4000, flags="SA"))
    assert (answer.frame[1].src, answer.frame.sport) == (net.b, 8080)


def believed(node: Node, layers: Packet) -> bool:
    """Whether an answer of pod b to the packet is the frontend's."""
    out = node.arrives(layers)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    asked = layers.lastlayer()
    while not hasattr(asked, "dport"):
        asked = asked.underlayer
    net, segment = node.book, type(asked)(sport=asked.dport, dport=asked.sport)
    return bool(node.from_pod("b", net.ip(net.b, layers.src) / segment).frame[1].src != net.b)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_from_outside_it_is_not_believed_with_an_overlay(node: Node, net: Book, proto: str) -> None:
    """Nodes send to pods through that alone. The packet is like any other for the pod."""
    node.service(6 if proto == "tcp" else 17, 80, (net.r, 8080))
    asks = (TCP if proto == "tcp" else UDP)(sport=4000, dport=8080)
    assert not believed(node, carrying(net, net.world, net.b, net.vip, 80) / asks)


@pytest.mark.parametrize("who", ["node", "pod"])
def test_from_inside_it_is_not_believed(native: Node, net: Book, who: str) -> None:
    """No node writes it for these, but a pod can."""
    native.service(17, 80, (net.r, 8080))
    source = net.node2 if who == "node" else net.r
    asks = UDP(sport=4000, dport=8080)
    assert not believed(native, carrying(net, source, net.b, net.vip, 80) / asks)


def test_of_a_connection_only_the_first_packet_is_believed(native: Node, net: Book) -> None:
    native.service(6, 80, (net.r, 8080))
    data = TCP(sport=4000, dport=8080, flags="A")
    assert not believed(native, carrying(net, net.world, net.b, net.vip, 80) / data)
    opens = TCP(sport=4001, dport=8080, flags="S")
    assert believed(native, carrying(net, net.world, net.b, net.vip, 80) / opens)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_denied_flow_is_not_turned_round(native: Node, net: Book, proto: str) -> None:
    """Else what the pod must not send any more would go on as answers."""
    node = native
    number, layer = (6, TCP) if proto == "tcp" else (17, UDP)
    node.service(number, 80, (net.r, 8080))
    node.isolate(b_egress=node.allow(9, 0))
    opened = net.ip(net.b, net.world) / layer(sport=8080, dport=4000)
    assert node.from_pod("b", opened).drops == {}
    node.forbid()
    turns = carrying(net, net.world, net.b, net.vip, 80) / layer(sport=4000, dport=8080)
    assert node.arrives(turns).drops == {DropReason.POLICY_EGRESS: 1}
    goes_on = net.ip(net.b, net.world) / layer(sport=8080, dport=4000)
    if proto == "tcp":
        goes_on[TCP].flags = "A"
    assert node.from_pod("b", goes_on).drops == {DropReason.POLICY_EGRESS: 1}


def test_an_allowed_flow_may_be_turned_round(native: Node, net: Book) -> None:
    """A late answer of the pod must not keep its client from the frontend."""
    native.service(17, 80, (net.r, 8080))
    opened = net.ip(net.b, net.world) / UDP(sport=8080, dport=4000)
    assert native.from_pod("b", opened).drops == {}
    native.datapath.bump()
    asks = UDP(sport=4000, dport=8080)
    assert believed(native, carrying(net, net.world, net.b, net.vip, 80) / asks)


def test_nobody_has_it_passed_on(either: Node, net: Book) -> None:
    """By way of another node's stack it would come to the pod's node as that node's word."""
    lie = carrying(net, net.world, net.r, net.vip, 80) / UDP(sport=4000, dport=8080)
    assert either.arrives(lie).drops == {DropReason.SPOOFED_SOURCE: 1}
    for target in (net.node, net.world2):
        other = carrying(net, net.world, target, net.vip, 80) / UDP(sport=4000, dport=8080)
        assert (either.arrives(other).code, either.arrives(other).drops) == (TC_ACT_OK, {})


def test_policy_is_about_the_client(native: Node, net: Book) -> None:
    node = native
    node.service(6, 80, (net.r, 8080))
    node.isolate(b_ingress=Isolation(9, 0))
    out = node.arrives(carrying(net, net.world, net.b, net.vip, 80) / TCP(sport=1, dport=8080))
    assert out.drops == {DropReason.POLICY_INGRESS: 1}


def test_an_error_about_an_answer(either: Node, net: Book) -> None:
    """It comes here, as the answers were the frontend's, and goes on to who sent them."""
    node = either
    node.service(17, 53, (net.r, 5353), flags=ServiceFlag.DSR)
    node.arrives(net.ip(net.world, net.vip) / UDP(sport=4000, dport=53) / b"ask")
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    seen = net.ip(net.vip, net.world) / UDP(sport=53, dport=4000, chksum=0x1234) / b"a"
    out = node.arrives(net.ip(net.world, net.vip) / error / Raw(bytes(seen)))
    sent = net.ip(net.r, net.world) / UDP(sport=5353, dport=4000, chksum=0x1234) / b"a"
    expected = net.ip(net.world, net.r, **net.ttl(63)) / error / Raw(bytes(sent))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, onward(expected))


def test_too_big_with_it(node: Node, net: Book) -> None:
    """The client is told what fits besides."""
    node.service(17, 53, (net.r, 5353), flags=ServiceFlag.DSR)
    header = 28 if net.family == 4 else 48
    flags = {"flags": "DF"} if net.family == 4 else {}
    fits = 1400 - SIZE[net.family]

    def sends(size: int) -> Outcome:
        udp = UDP(sport=4000, dport=53) / Raw(b"x" * (size - header))
        return node.arrives(net.ip(net.world, net.vip, **flags) / udp)

    assert sends(fits).drops == {}
    out = sends(fits + 1)
    assert out.drops == {DropReason.TOO_BIG: 1}
    told = out.frame[ICMP].nexthopmtu if net.family == 4 else out.frame[ICMPv6PacketTooBig].mtu
    assert told == fits
