# SPDX-License-Identifier: Apache-2.0
"""Headers of all kinds: fragments, options, extension headers, and what is cut or lies."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6MLReport2,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.packet_node import BOOKS, HOST_MACS, POD_MACS, Book, Node
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet

from weir.datapath.records import DropReason, Isolation

PROGRAMS = ["from_pod", "to_pod", "from_uplink", "to_uplink", "from_overlay", "to_overlay"]


def first_fragment(net: Book, source: str, target: str, number: int = 7) -> Packet:
    udp = UDP(sport=1, dport=2, len=40, chksum=0x5555) / Raw(b"x" * 16)
    if net.family == 4:
        return net.ip(source, target, flags="MF", id=number) / udp
    return net.ip(source, target) / IPv6ExtHdrFragment(offset=0, m=1, id=number, nh=17) / udp


def later_fragment(net: Book, source: str, target: str, number: int = 7) -> Packet:
    if net.family == 4:
        return net.ip(source, target, frag=3, id=number, proto=17) / Raw(b"y" * 16)
    header = IPv6ExtHdrFragment(offset=3, m=0, id=number, nh=17)
    return net.ip(source, target) / header / Raw(b"y" * 16)


def test_fragments_go_with_the_first(node: Node, net: Book) -> None:
    node.isolate(b_ingress=node.allow(1, 0, proto=17, port=2, bits=16))
    assert node.from_pod("a", first_fragment(net, net.a, net.b)).code == TC_ACT_REDIRECT
    later = later_fragment(net, net.a, net.b)
    out = node.from_pod("a", later)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, bytes(Ether(dst=POD_MACS["b"], src=HOST_MACS["b"]) / later))
    assert len(node.flows()) == 1
    unknown = node.from_pod("a", later_fragment(net, net.a, net.b, number=8))
    assert (unknown.code, unknown.drops) == (TC_ACT_SHOT, {DropReason.FRAGMENT: 1})


def test_fragments_to_a_service_and_out(node: Node, net: Book) -> None:
    """Translation changes ports in the first fragment only, addresses in all."""
    node.service(17, 2, (net.b, 2222))
    first = node.from_pod("a", first_fragment(net, net.a, net.vip))
    assert Ether(first.packet)[UDP].dport == 2222
    later = node.from_pod("a", later_fragment(net, net.a, net.vip))
    expected = Ether(dst=POD_MACS["b"], src=HOST_MACS["b"]) / later_fragment(net, net.a, net.b)
    assert_packet(later.packet, bytes(expected))
    first = node.leaves(first_fragment(net, net.a, net.world))
    assert first.drops == {}
    later = node.leaves(later_fragment(net, net.a, net.world))
    assert later.packet[14:] == bytes(later_fragment(net, net.node, net.world))


@pytest.mark.parametrize("mapped", ["source", "destination", "both"])
def test_mapped_addresses_in_ipv6_headers_are_no_ipv4(node: Node, mapped: str) -> None:
    source, target = BOOKS[6].a, BOOKS[6].b
    if mapped != "destination":
        source = f"::ffff:{BOOKS[4].a}"
    if mapped != "source":
        target = f"::ffff:{BOOKS[4].b}"
    out = node.from_pod("a", IPv6(src=source, dst=target) / UDP(sport=1, dport=2))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.MALFORMED: 1})


def test_fragments_for_the_host_pass(node: Node, net: Book) -> None:
    assert node.arrives(later_fragment(net, net.world, net.node)).code == TC_ACT_OK
    out = node.arrives(later_fragment(net, net.world, net.a))
    assert out.drops == {DropReason.FRAGMENT: 1}


def extended(chain: list[Packet]) -> Packet:
    net = BOOKS[6]
    packet = net.ip(net.a, net.b)
    for header in chain:
        packet = packet / header
    return packet / UDP(sport=1, dport=2)


@pytest.mark.parametrize(
    ("chain", "code"),
    [
        ([IPv6ExtHdrHopByHop()], TC_ACT_REDIRECT),
        ([IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting()], TC_ACT_REDIRECT),
        ([IPv6ExtHdrDestOpt() for _ in range(6)], TC_ACT_REDIRECT),
        ([IPv6ExtHdrDestOpt() for _ in range(7)], TC_ACT_SHOT),
    ],
    ids=["hop by hop", "two", "six", "seven"],
)
def test_extension_headers(node: Node, chain: list[Packet], code: int) -> None:
    v6 = Node(node.datapath, node.world, BOOKS[6])
    v6.isolate(b_ingress=v6.allow(1, 0, proto=17, port=2, bits=16))
    out = v6.from_pod("a", extended(chain))
    v6.reader.close()
    assert out.code == code
    assert out.drops == ({} if code == TC_ACT_REDIRECT else {DropReason.MALFORMED: 1})


def test_ipv4_options(node: Node) -> None:
    v4 = Node(node.datapath, node.world, BOOKS[4])
    v4.isolate(b_ingress=v4.allow(1, 0, proto=17, port=2, bits=16))
    options = [IPOption_NOP() for _ in range(8)]
    packet = v4.book.ip(v4.book.a, v4.book.b, options=options) / UDP(sport=1, dport=2)
    out = v4.from_pod("a", packet)
    v4.reader.close()
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})


@pytest.mark.parametrize("what", ["solicitation", "MLD", "router solicitation", "mDNS"])
def test_link_scope_is_quiet(node: Node, net: Book, what: str) -> None:
    """Sent by every pod's kernel, and duplicate address detection needs silence."""
    link = "fe80::1234"
    packets = {
        "solicitation": IPv6(src="::", dst="ff02::1:ff00:2") / ICMPv6ND_NS(tgt="fd00:1::2"),
        "MLD": IPv6(src=link, dst="ff02::16") / ICMPv6MLReport2(),
        "router solicitation": IPv6(src=link, dst="ff02::2") / ICMPv6DestUnreach(type=133),
        "mDNS": IP(src=BOOKS[4].a, dst="224.0.0.251") / UDP(sport=5353, dport=5353),
    }
    out = node.from_pod("a", packets[what])
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.NOT_UNICAST: 1})
    assert node.reader.drain() == []


def whole(net: Book, kind: str) -> Packet:
    quoted = net.ip(net.b, net.a) / UDP(sport=1, dport=2)
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    l4 = {
        "tcp": TCP(sport=1, dport=2, flags="S"),
        "udp": UDP(sport=1, dport=2),
        "icmp": net.echo(3),
        "error": error / Raw(bytes(quoted)),
    }
    return Ether(src=POD_MACS["a"], dst=HOST_MACS["a"]) / net.ip(net.a, net.b) / l4[kind]


@pytest.mark.parametrize("kind", ["tcp", "udp", "icmp", "error"])
def test_truncated(node: Node, net: Book, kind: str) -> None:
    """A packet cut anywhere, with the length in its header as it was, never gets through, in
    no program; nothing is recorded of it."""
    frame = bytes(whole(net, kind))
    header = 20 if net.family == 4 else 40
    for program in PROGRAMS:
        for length in range(14 + header, len(frame)):
            out = node.run(program, "pa", frame[:length])
            assert out.code != TC_ACT_REDIRECT, (program, length)
            if program in {"from_pod", "to_pod", "from_overlay", "to_overlay"}:
                assert out.code == TC_ACT_SHOT, (program, length)
                assert out.drops == {DropReason.MALFORMED: 1}, (program, length)
    assert node.flows() == {}


@pytest.mark.parametrize("kind", ["tcp", "udp", "icmp", "error"])
def test_truncated_with_honest_length(node: Node, net: Book, kind: str) -> None:
    """The IP length says that it is short: too short for its transport header."""
    needed = {"tcp": 20, "udp": 8, "icmp": 8, "error": 8 + (28 if net.family == 4 else 48)}[kind]
    for length in range(needed):
        layers = whole(net, kind).payload
        raw = Raw(bytes(layers.payload)[:length])
        proto = {"tcp": 6, "udp": 17}.get(kind, net.icmp_proto)
        field = {"proto": proto} if net.family == 4 else {"nh": proto}
        out = node.from_pod("a", net.ip(net.a, net.b, **field) / raw)
        assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.MALFORMED: 1}), length


@pytest.mark.parametrize(
    ("at", "value"),
    [(14, 0x55), (14, 0x44), (14, 0x4F), (16, 0xFF), (17, 0x05)],
    ids=["version 5", "header of 16", "header past the end", "too long", "shorter than header"],
)
def test_lying_ipv4_header(node: Node, at: int, value: int) -> None:
    v4 = Node(node.datapath, node.world, BOOKS[4])
    frame = bytearray(bytes(whole(BOOKS[4], "udp")))
    frame[at] = value
    out = v4.run("from_pod", "pa", bytes(frame))
    v4.reader.close()
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.MALFORMED: 1})


def test_padding_is_not_read(node: Node, net: Book) -> None:
    """Ethernet pads short frames: what follows the IP packet is not its transport header."""
    node.isolate(b_ingress=Isolation(1, 0))
    field = {"proto": 17} if net.family == 4 else {"nh": 17}
    empty = bytes(Ether(src=POD_MACS["a"], dst=HOST_MACS["a"]) / net.ip(net.a, net.b, **field))
    out = node.run("from_pod", "pa", empty + bytes(UDP(sport=1, dport=2)))
    assert out.drops == {DropReason.MALFORMED: 1}
