# SPDX-License-Identifier: Apache-2.0
"""What leaves and reaches the node: masquerade, overlay, path MTU, hop limit."""

from __future__ import annotations

import dataclasses

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.packet_node import (
    BOOKS,
    GATEWAY_MAC,
    HOST_MACS,
    PEER_MAC,
    POD_MACS,
    Book,
    Node,
    cidr,
)
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet

from weir.api.address import parse
from weir.datapath.records import DropReason, Isolation, Route, RouteFlag, SnatKind


def on_wire(layers: Packet) -> bytes:
    return bytes(Ether(src=GATEWAY_MAC, dst=PEER_MAC) / layers)


def to_pod(pod: str, layers: Packet) -> bytes:
    return bytes(Ether(dst=POD_MACS[pod], src=HOST_MACS[pod]) / layers)


@pytest.mark.parametrize("proto", ["tcp", "udp", "icmp"])
def test_masquerade_and_back(node: Node, net: Book, proto: str) -> None:
    """a → world leaves as node:61000..61003 → world, the reply comes back into a."""

    def there(port: int) -> Packet:
        if proto == "icmp":
            return net.echo(port)
        return (TCP if proto == "tcp" else UDP)(sport=port, dport=443) / Raw(b"abc")

    def back(port: int) -> Packet:
        if proto == "icmp":
            return net.echo(port, reply=True)
        layer = (
            TCP(sport=443, dport=port, flags="SA") if proto == "tcp" else UDP(sport=443, dport=port)
        )
        return layer / Raw(b"defg")

    assert node.from_pod("a", net.ip(net.a, net.world) / there(4000)).code == TC_ACT_REDIRECT
    out = node.leaves(net.ip(net.a, net.world) / there(4000))
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    assert 61000 <= port <= 61003
    assert_packet(out.packet, on_wire(net.ip(net.node, net.world) / there(port)))
    assert len(list(node.tables.snat.items())) == 2
    again = node.leaves(net.ip(net.a, net.world) / there(4000))
    assert_packet(again.packet, out.packet)
    node.isolate(a_ingress=Isolation(9, 0))
    reply = node.arrives(net.ip(net.world, net.node) / back(port))
    assert (reply.code, reply.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(reply.packet, to_pod("a", net.ip(net.world, net.a) / back(4000)))


def test_masquerade_runs_out_of_ports(node: Node, net: Book) -> None:
    """Four ports a remote: the fifth flow is refused, to another remote there are four more."""
    for sport in range(4):
        out = node.leaves(net.ip(net.a, net.world) / UDP(sport=1000 + sport, dport=9))
        assert out.drops == {}
    out = node.leaves(net.ip(net.a, net.world) / UDP(sport=2000, dport=9))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.SNAT_NO_PORT: 1})
    assert node.leaves(net.ip(net.a, net.world) / UDP(sport=2000, dport=10)).drops == {}
    rows = {k: dataclasses.replace(v, expires=1) for k, v in node.tables.snat.items()}
    node.tables.snat.update(rows)
    assert node.leaves(net.ip(net.a, net.world) / UDP(sport=2000, dport=9)).drops == {}


@pytest.mark.parametrize("who", ["node", "remote pod", "remote node", "kept range", "host"])
def test_not_masqueraded(node: Node, net: Book, who: str) -> None:
    bits = (net.world, 32 if net.family == 4 else 128)
    if who == "kept range":
        node.tables.routes.update(
            {cidr(bits, net.family): Route(parse("::"), RouteFlag.NO_MASQUERADE)}
        )
    source = net.node if who == "host" else net.a
    target = {"node": net.node, "remote pod": net.r, "remote node": net.node2}.get(who, net.world)
    layers = net.ip(source, target) / UDP(sport=1, dport=2)
    out = node.leaves(layers)
    assert out.code == TC_ACT_OK
    assert_packet(out.packet, on_wire(layers))
    assert list(node.tables.snat.items()) == []


@pytest.mark.parametrize("by", ["remote", "router"])
def test_error_about_a_masqueraded_flow(node: Node, net: Book, by: str) -> None:
    pod_sent = net.ip(net.a, net.world) / UDP(sport=4000, dport=443, chksum=0x1234) / Raw(b"x")
    node.from_pod("a", pod_sent)
    node.leaves(pod_sent)
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    wire = net.ip(net.node, net.world) / UDP(sport=port, dport=443, chksum=0x1234) / Raw(b"x")
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    router = "203.0.113.5" if net.family == 4 else "2001:db8:e::5"
    source = net.world if by == "remote" else router
    out = node.arrives(net.ip(source, net.node) / error / Raw(bytes(wire)))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("a", net.ip(source, net.a) / error / Raw(bytes(pod_sent))))


def test_pods_error_about_a_masqueraded_reply(node: Node, net: Book) -> None:
    node.leaves(net.ip(net.a, net.world) / UDP(sport=4000, dport=443))
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    seen = net.ip(net.world, net.a) / UDP(sport=443, dport=4000, chksum=0x1234)
    wire = net.ip(net.world, net.node) / UDP(sport=443, dport=port, chksum=0x1234)
    out = node.leaves(net.ip(net.a, net.world) / error / Raw(bytes(seen)))
    assert out.drops == {}
    assert_packet(out.packet, on_wire(net.ip(net.node, net.world) / error / Raw(bytes(wire))))


def test_hop_limit(node: Node, net: Book) -> None:
    """Out of the cluster one hop less; the last hop is answered by the node."""
    out = node.from_pod("a", net.ip(net.a, net.world, **net.ttl(9)) / UDP(sport=1, dport=2))
    frame = Ether(src=POD_MACS["a"], dst=HOST_MACS["a"])
    expected = frame / net.ip(net.a, net.world, **net.ttl(8)) / UDP(sport=1, dport=2)
    assert out.code == TC_ACT_REDIRECT
    assert_packet(out.packet, bytes(expected))
    sent = net.ip(net.a, net.world, **net.ttl(1)) / UDP(sport=1, dport=2)
    out = node.from_pod("a", sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.TTL_EXCEEDED: 1})
    if net.family == 4:
        answer = net.ip(net.node, net.a, id=0) / ICMP(type=11) / Raw(bytes(sent)[:28])
    else:
        answer = net.ip(net.node, net.a) / ICMPv6TimeExceeded() / Raw(bytes(sent)[:48])
    assert_packet(out.packet, to_pod("a", answer))


def test_to_the_overlay(node: Node, net: Book) -> None:
    layers = net.ip(net.a, net.r) / UDP(sport=1, dport=2)
    out = node.from_pod("a", layers)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, bytes(Ether(src=POD_MACS["a"], dst=HOST_MACS["a"]) / layers))


@pytest.mark.parametrize("through", ["pod's address", "VIP"])
def test_too_big_for_the_overlay(node: Node, net: Book, through: str) -> None:
    """1400 bytes fit, one more is answered with the MTU and the packet as it was sent."""
    node.service(17, 2, (net.r, 2222))
    header = 28 if net.family == 4 else 48
    target = net.vip if through == "VIP" else net.r
    flags = {"flags": "DF"} if net.family == 4 else {}

    def packet(size: int) -> Packet:
        return net.ip(net.a, target, **flags) / UDP(sport=1, dport=2) / Raw(b"x" * (size - header))

    assert node.from_pod("a", packet(1400)).drops == {}
    sent = packet(1401)
    out = node.from_pod("a", sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.TOO_BIG: 1})
    if net.family == 4:
        error = ICMP(type=3, code=4, nexthopmtu=1400)
        answer = net.ip(net.node, net.a, id=0) / error / Raw(bytes(sent)[:28])
    else:
        answer = net.ip(net.node, net.a) / ICMPv6PacketTooBig(mtu=1400) / Raw(bytes(sent)[:48])
    assert_packet(out.packet, to_pod("a", answer))


def test_too_big_but_may_be_fragmented(node: Node) -> None:
    """IPv4 only: the host's stack cuts it up on its way to the overlay."""
    net = BOOKS[4]
    packet_node = Node(node.datapath, node.world, net)
    layers = net.ip(net.a, net.r) / UDP(sport=1, dport=2) / Raw(b"x" * 1400)
    out = packet_node.from_pod("a", layers)
    packet_node.reader.close()
    assert (out.code, out.drops) == (TC_ACT_OK, {})


def test_to_overlay_needs_a_route(node: Node, net: Book) -> None:
    assert node.leaves(net.ip(net.a, net.r) / UDP(), "to_overlay", "ov").code == TC_ACT_OK
    out = node.leaves(net.ip(net.node, net.world) / UDP(), "to_overlay", "ov")
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.NO_ROUTE: 1})


def test_overlay_without_a_tunnel_key_is_spoofed(node: Node, net: Book) -> None:
    """What was not encapsulated by a node cannot come out of the overlay (the accepted case
    needs a real device: tests/node)."""
    out = node.arrives(net.ip(net.r, net.a) / UDP(sport=1, dport=2), "from_overlay", "ov")
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.SPOOFED_SOURCE: 1})
