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
from support.packets import TC_ACT_REDIRECT, assert_packet

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
def test_the_backends_node(node: Node, net: Book, proto: str) -> None:
    """Takes it out before the pod sees it; the pod's answers come from the frontend."""
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


def test_another_nodes_port(node: Node, net: Book) -> None:
    out = node.arrives(
        carrying(net, net.world, net.b, net.node2, 30080) / TCP(sport=4000, dport=8080)
    )
    assert len(out.packet) == (54 if net.family == 4 else 74)
    answer = node.from_pod("b", net.ip(net.b, net.world) / TCP(sport=8080, dport=4000, flags="SA"))
    assert (answer.frame[1].src, answer.frame.sport) == (net.node2, 30080)


def test_nobody_answers_as_what_is_no_frontend(node: Node, net: Book) -> None:
    lie = carrying(net, net.world, net.b, net.world2, 80) / TCP(sport=4000, dport=8080)
    out = node.arrives(lie)
    assert_packet(out.packet, to_pod("b", lie))
    answer = node.from_pod("b", net.ip(net.b, net.world) / TCP(sport=8080, dport=4000, flags="SA"))
    assert (answer.frame[1].src, answer.frame.sport) == (net.b, 8080)


def test_policy_is_about_the_client(node: Node, net: Book) -> None:
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
