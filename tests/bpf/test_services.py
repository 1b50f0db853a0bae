# SPDX-License-Identifier: Apache-2.0
"""ClusterIPs in packets, for clients that the socket hooks do not see."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.packet_node import HOST_MACS, POD_MACS, Book, Node
from support.packets import TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet

from weir.datapath.records import CtFlag, DropReason, Isolation


def to_pod(pod: str, layers: Packet) -> bytes:
    return bytes(Ether(dst=POD_MACS[pod], src=HOST_MACS[pod]) / layers)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_there_and_back(node: Node, net: Book, proto: str) -> None:
    """a → VIP:80 becomes a → b:8080, and b's reply comes from the VIP."""
    layer, number = (TCP, 6) if proto == "tcp" else (UDP, 17)
    node.service(number, 80, (net.b, 8080))
    sent = net.ip(net.a, net.vip) / layer(sport=4000, dport=80) / Raw(b"hello")
    out = node.from_pod("a", sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(
        out.packet, to_pod("b", net.ip(net.a, net.b) / layer(sport=4000, dport=8080) / b"hello")
    )
    flags = sorted(
        entry.flags & (CtFlag.SERVICE | CtFlag.REV_NAT) for entry in node.flows().values()
    )
    assert flags == [CtFlag.SERVICE, CtFlag.REV_NAT]
    kind: dict[str, Any] = {"flags": "SA"} if proto == "tcp" else {}
    reply = node.from_pod(
        "b", net.ip(net.b, net.a) / layer(sport=8080, dport=4000, **kind) / b"you"
    )
    assert_packet(
        reply.packet,
        to_pod("a", net.ip(net.vip, net.a) / layer(sport=80, dport=4000, **kind) / b"you"),
    )
    assert node.from_pod("a", sent).code == TC_ACT_REDIRECT
    assert len(node.flows()) == 2


def test_policy_is_about_the_backend(node: Node, net: Book) -> None:
    node.service(6, 80, (net.b, 8080))
    node.isolate(b_ingress=node.allow(1, 0, proto=6, port=80, bits=16))
    out = node.from_pod("a", net.ip(net.a, net.vip) / TCP(sport=1, dport=80, flags="S"))
    assert out.drops == {DropReason.POLICY_INGRESS: 1}
    node.isolate(b_ingress=node.allow(1, 0, proto=6, port=8080, bits=16))
    out = node.from_pod("a", net.ip(net.a, net.vip) / TCP(sport=1, dport=80, flags="S"))
    assert out.code == TC_ACT_REDIRECT


def test_new_backends(node: Node, net: Book) -> None:
    """What runs stays where it is; new connections, and new datagram flows, go to the new one."""
    tcp = net.ip(net.a, net.vip) / TCP(sport=1, dport=80, flags="A")
    udp = net.ip(net.a, net.vip) / UDP(sport=1, dport=80)
    for proto in (6, 17):
        node.service(proto, 80, (net.b, 8080), number=proto)
    for packet in (tcp, udp):
        assert node.from_pod("a", packet).frame.dport == 8080
    for proto in (6, 17):
        node.service(proto, 80, (net.b, 9090), number=100 + proto)
    assert node.from_pod("a", tcp).frame.dport == 8080
    assert node.from_pod("a", udp).frame.dport == 8080
    new = net.ip(net.a, net.vip) / TCP(sport=2, dport=80, flags="S")
    assert node.from_pod("a", new).frame.dport == 9090
    new = net.ip(net.a, net.vip) / UDP(sport=2, dport=80)
    assert node.from_pod("a", new).frame.dport == 9090


def test_datagrams_to_what_is_no_service_any_more(node: Node, net: Book) -> None:
    udp = net.ip(net.a, net.vip) / UDP(sport=1, dport=80)
    node.service(17, 80, (net.b, 8080))
    assert node.from_pod("a", udp).frame.dport == 8080
    node.tables.services.delete([key for key, _ in node.tables.services.items()])
    assert node.from_pod("a", udp).frame.dport == 80
    node.isolate(a_egress=Isolation(9, 0))
    other = net.ip(net.a, net.vip) / UDP(sport=3, dport=80)
    node.service(17, 80, (net.a, 1))
    node.from_pod("a", other)
    node.tables.services.delete([key for key, _ in node.tables.services.items()])
    assert node.from_pod("a", other).drops == {DropReason.POLICY_EGRESS: 1}


def test_backends_are_all_used(node: Node, net: Book) -> None:
    node.service(17, 53, (net.b, 1), (net.b, 2), (net.b, 3))
    seen = {
        node.from_pod("a", net.ip(net.a, net.vip) / UDP(sport=port, dport=53)).frame.dport
        for port in range(1000, 1060)
    }
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("flags", ["S", "A"])
def test_no_backend_tcp_is_reset(node: Node, net: Book, flags: str) -> None:
    node.service(6, 80)
    node.isolate(a_ingress=Isolation(9, 0))
    segment = TCP(sport=4000, dport=80, flags=flags, seq=1000, ack=77, options=[("MSS", 1400)])
    out = node.from_pod(
        "a",
        net.ip(net.a, net.vip, id=0) / segment
        if net.family == 4
        else net.ip(net.a, net.vip) / segment,
    )
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    if flags == "S":
        reset = TCP(sport=80, dport=4000, flags="RA", seq=0, ack=1001, window=0)
    else:
        reset = TCP(sport=80, dport=4000, flags="R", seq=77, ack=0, window=0)
    fields = {"id": 0} if net.family == 4 else {}
    assert_packet(out.packet, to_pod("a", net.ip(net.vip, net.a, **fields) / reset))


def test_no_backend_udp_port_unreachable(node: Node, net: Book) -> None:
    node.service(17, 53)
    sent = net.ip(net.a, net.vip) / UDP(sport=4000, dport=53) / Raw(b"x" * 50)
    out = node.from_pod("a", sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    if net.family == 4:
        answer = net.ip(net.vip, net.a, id=0) / ICMP(type=3, code=3) / Raw(bytes(sent)[:28])
    else:
        answer = net.ip(net.vip, net.a) / ICMPv6DestUnreach(code=4) / Raw(bytes(sent)[:48])
    assert_packet(out.packet, to_pod("a", answer))


def test_reset_is_not_answered(node: Node, net: Book) -> None:
    node.service(6, 80)
    out = node.from_pod("a", net.ip(net.a, net.vip) / TCP(sport=1, dport=80, flags="R"))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.NO_BACKEND: 1})


def unreachable(net: Book, source: str, destination: str, quoted: Packet) -> Packet:
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    return net.ip(source, destination) / error / Raw(bytes(quoted))


def test_error_about_a_flow_passes(node: Node, net: Book) -> None:
    """b answers a's datagram with port unreachable; both are closed to each other's flows."""
    node.isolate(a_ingress=Isolation(9, 0), b_egress=Isolation(9, 0))
    sent = net.ip(net.a, net.b) / UDP(sport=1, dport=2) / Raw(b"four")
    assert node.from_pod("a", sent).code == TC_ACT_REDIRECT
    error = unreachable(net, net.b, net.a, sent)
    out = node.from_pod("b", error)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("a", error))
    other = unreachable(
        net, net.b, net.a, net.ip(net.a, net.b) / UDP(sport=1, dport=3) / Raw(b"four")
    )
    assert node.from_pod("b", other).drops == {DropReason.INVALID_CT: 1}
    lie = unreachable(
        net, net.b, net.a, net.ip(net.world, net.b) / UDP(sport=1, dport=2) / Raw(b"four")
    )
    assert node.from_pod("b", lie).drops == {DropReason.INVALID_CT: 1}


@pytest.mark.parametrize("by", ["backend", "router"])
def test_error_about_a_service_flow(node: Node, net: Book, by: str) -> None:
    """The client sees an error that quotes the packet to the VIP. From the backend it comes as
    the VIP's, from a router as the router's."""
    node.service(17, 53, (net.b, 5353))
    sent = net.ip(net.a, net.vip) / UDP(sport=4000, dport=53, chksum=0x1234) / Raw(b"q")
    arrived = net.ip(net.a, net.b) / UDP(sport=4000, dport=5353, chksum=0x1234) / Raw(b"q")
    node.from_pod("a", sent)
    if by == "backend":
        out = node.from_pod("b", unreachable(net, net.b, net.a, arrived))
        expected = unreachable(net, net.vip, net.a, sent)
    else:
        out = node.arrives(unreachable(net, net.world, net.a, arrived))
        expected = unreachable(net, net.world, net.a, sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("a", expected))


def test_clients_error_about_a_reply_reaches_the_backend(node: Node, net: Book) -> None:
    node.service(17, 53, (net.b, 5353))
    node.from_pod("a", net.ip(net.a, net.vip) / UDP(sport=4000, dport=53) / Raw(b"q"))
    seen = net.ip(net.vip, net.a) / UDP(sport=53, dport=4000, chksum=0x1234) / Raw(b"r")
    sent = net.ip(net.b, net.a) / UDP(sport=5353, dport=4000, chksum=0x1234) / Raw(b"r")
    out = node.from_pod("a", unreachable(net, net.a, net.vip, seen))
    assert out.drops == {}
    assert_packet(out.packet, to_pod("b", unreachable(net, net.a, net.b, sent)))


def test_backend_on_the_node_itself(node: Node, net: Book) -> None:
    """A host-network backend here: through the stack, and its reply through to_pod."""
    node.service(6, 80, (net.node, 8080))
    out = node.from_pod("a", net.ip(net.a, net.vip) / TCP(sport=1, dport=80, flags="S"))
    assert (out.code, out.frame.dport) == (0, 8080)
    reply = net.ip(net.node, net.a) / TCP(sport=8080, dport=1, flags="SA")
    out = node.run("to_pod", "pa", Ether(to_pod("a", reply)))
    assert_packet(
        out.packet, to_pod("a", net.ip(net.vip, net.a) / TCP(sport=80, dport=1, flags="SA"))
    )
