# SPDX-License-Identifier: Apache-2.0
"""Packets of the host's own processes to services, past the socket hooks; and hairpins."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.packet_node import GATEWAY_MAC, HOST_MACS, PEER_MAC, POD_MACS, Book, Node
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet

from weir.datapath.records import DropReason, Isolation, ServiceFlag, SnatKind


def to_pod(pod: str, layers: Packet) -> bytes:
    return bytes(Ether(dst=POD_MACS[pod], src=HOST_MACS[pod]) / layers)


def snat_port(node: Node) -> int:
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    return port


def test_host_to_a_pod_here(node: Node, net: Book) -> None:
    node.service(6, 80, (net.b, 8080))
    node.isolate(b_ingress=Isolation(9, 0), b_egress=Isolation(9, 0))
    out = node.leaves(net.ip(net.node, net.vip) / TCP(sport=4000, dport=80, flags="S"))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    port = snat_port(node)
    there = to_pod("b", net.ip(net.node, net.b) / TCP(sport=port, dport=8080, flags="S"))
    assert_packet(out.packet, there)
    assert node.run("to_pod", "pb", Ether(there)).code == TC_ACT_OK
    back = node.from_pod("b", net.ip(net.b, net.node) / TCP(sport=8080, dport=port, flags="SA"))
    assert (back.code, back.drops) == (TC_ACT_OK, {})
    here = net.ip(net.vip, net.node) / TCP(sport=80, dport=4000, flags="SA")
    assert back.packet[14:] == bytes(here)


def test_host_to_a_backend_elsewhere(node: Node, net: Book) -> None:
    node.service(6, 80, (net.node2, 8080))
    out = node.leaves(net.ip(net.node, net.vip) / TCP(sport=4000, dport=80, flags="S"))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    port = snat_port(node)
    there = net.ip(net.node, net.node2, **net.ttl(63)) / TCP(sport=port, dport=8080, flags="S")
    assert out.packet[14:] == bytes(there)
    back = node.arrives(net.ip(net.node2, net.node) / TCP(sport=8080, dport=port, flags="SA"))
    assert (back.code, back.drops) == (TC_ACT_OK, {})
    here = net.ip(net.vip, net.node) / TCP(sport=80, dport=4000, flags="SA")
    assert back.packet[14:] == bytes(here)


def test_host_is_refused(node: Node, net: Book) -> None:
    fields = {"id": 0} if net.family == 4 else {}
    node.service(6, 80)
    sent = net.ip(net.node, net.vip, **fields) / TCP(sport=4000, dport=80, flags="S", seq=9)
    out = node.leaves(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    reset = TCP(sport=80, dport=4000, flags="RA", seq=0, ack=10, window=0)
    answer = Ether(src=PEER_MAC, dst=GATEWAY_MAC) / net.ip(net.vip, net.node, **fields) / reset
    assert_packet(out.packet, bytes(answer))
    node.service(6, 80, flags=ServiceFlag.LOCAL)
    out = node.leaves(sent)
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.NO_LOCAL_BACKEND: 1})


def test_host_learns_the_path_mtu(node: Node, net: Book) -> None:
    """From the VIP, about the packet as it was sent: it believes nothing from its own address."""
    node.service(17, 80, (net.r, 8080))
    fields = {"id": 0} if net.family == 4 else {}
    keep = {"flags": "DF"} if net.family == 4 else {}
    sent = net.ip(net.node, net.vip, **keep) / UDP(sport=4000, dport=80) / Raw(bytes(1390))
    out = node.leaves(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.TOO_BIG: 1})
    if net.family == 4:
        error, header = ICMP(type=3, code=4, nexthopmtu=1400), 20
    else:
        error, header = ICMPv6PacketTooBig(mtu=1400), 40
    quoted = Raw(bytes(sent)[: header + 8])
    answer = net.ip(net.vip, net.node, **fields) / error / quoted
    assert_packet(out.packet, bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / answer))


def test_host_is_told_that_the_hop_limit_ended(node: Node, net: Book) -> None:
    """About its own packet, as the other refusals."""
    node.service(17, 53, (net.node2, 5353))
    sent = net.ip(net.node, net.vip, **net.ttl(1)) / UDP(sport=4000, dport=53) / b"ask"
    out = node.leaves(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.TTL_EXCEEDED: 1})
    error = ICMP if net.family == 4 else ICMPv6TimeExceeded
    assert out.frame[error].type == (11 if net.family == 4 else 3)
    assert (out.frame[1].src, out.frame[1].dst) == (net.vip, net.node)
    assert bytes(out.frame[error].payload).startswith(bytes(sent)[:28])


@pytest.mark.forwarded
def test_what_is_forwarded_is_not_the_hosts(node: Node, net: Book) -> None:
    node.service(6, 80, (net.b, 8080))
    frame = Ether(src=GATEWAY_MAC, dst=PEER_MAC) / net.ip(net.world, net.vip) / TCP(dport=80)
    out = node.run("to_uplink", "ul", frame, ingress="ov")
    assert (out.code, out.packet) == (TC_ACT_OK, bytes(frame))


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_a_pod_reaches_itself(node: Node, net: Book, proto: str) -> None:
    """Through a frontend, in packets: it sees the node as its client, and never itself."""
    layer, number = (TCP, 6) if proto == "tcp" else (UDP, 17)
    node.service(number, 80, (net.a, 8080))
    node.isolate(a_egress=Isolation(9, 0), a_ingress=Isolation(9, 0))
    out = node.from_pod("a", net.ip(net.a, net.vip) / layer(sport=4000, dport=80))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    port = snat_port(node)
    assert_packet(out.packet, to_pod("a", net.ip(net.node, net.a) / layer(sport=port, dport=8080)))
    back = node.from_pod("a", net.ip(net.a, net.node) / layer(sport=8080, dport=port))
    assert (back.code, back.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(back.packet, to_pod("a", net.ip(net.vip, net.a) / layer(sport=80, dport=4000)))
