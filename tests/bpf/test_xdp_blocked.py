# SPDX-License-Identifier: Apache-2.0
"""The blocklist, in XDP and in tc: one map, the same answers.

outsider -- uplink (dev ul): xdp_uplink, then from_uplink -- the node and its pods
"""

from __future__ import annotations

import time

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw
from support.kernel import KERNEL, XDP_INGRESS_KERNEL
from support.packet_node import GATEWAY_MAC, PEER_MAC, Book, Node, cidr
from support.packets import TC_ACT_OK, TC_ACT_SHOT, XDP_DROP, XDP_PASS, assert_packet

from weir.api.address import parse
from weir.datapath.records import Blocked, DropReason, EventKind, RuntimeFeature

RULE = 4711
WAYS = ["xdp", "tc"]


class Way:
    """One of the two programs that look at the blocklist."""

    def __init__(self, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        self.passes, self.drops = (
            (XDP_PASS, XDP_DROP) if name == "xdp" else (TC_ACT_OK, TC_ACT_SHOT)
        )

    def arrives(self, layers: Packet) -> tuple[bool, dict[DropReason, int]]:
        """(dropped, drop counters). What passes is unchanged."""
        frame = bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)
        out = (
            self.node.run_xdp("ul", frame)
            if self.name == "xdp"
            else self.node.run("from_uplink", "ul", frame)
        )
        assert out.code in (self.passes, self.drops)
        if out.code == self.passes:
            assert_packet(out.packet, frame)
        return out.code == self.drops, out.drops


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, node: Node) -> Way:
    return Way(node, request.param)


def block(node: Node, prefix: tuple[str, int], rule: int = RULE) -> None:
    node.tables.blocked.update({cidr(prefix, node.book.family): Blocked(rule)})


def whole(book: Book) -> int:
    return 32 if book.family == 4 else 128


DROPPED = (True, {DropReason.BLOCKED: 1})
PASSED: tuple[bool, dict[DropReason, int]] = (False, {})


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(TCP(sport=1, dport=80, flags="S"), id="tcp"),
        pytest.param(UDP(sport=1, dport=53) / Raw(b"abc"), id="udp"),
        pytest.param(Raw(b"\0" * 8), id="no transport"),
        pytest.param(Raw(b""), id="no payload"),
    ],
)
def test_blocked_source(way: Way, net: Book, payload: Packet) -> None:
    """Dropped to the node, to a pod, to anybody; it passes again once it is not blocked."""
    targets = [net.node, net.a, net.vip]
    block(way.node, (net.world, whole(net)))
    assert [way.arrives(net.ip(net.world, target) / payload) for target in targets] == [DROPPED] * 3
    way.node.tables.blocked.delete([cidr((net.world, whole(net)), net.family)])
    dropped, drops = way.arrives(net.ip(net.world, net.node) / payload)
    assert (dropped, drops) == PASSED


def test_longest_prefix_of_the_source_alone(way: Way, net: Book) -> None:
    """The prefix and no bit more; a blocked destination is none of this."""
    prefix, last, after = (
        (("198.51.100.0", 25), "198.51.100.127", "198.51.100.128")
        if net.family == 4
        else (("2001:db8:f::", 64), "2001:db8:f::ffff", "2001:db8:f:1::")
    )
    block(way.node, prefix)
    assert way.arrives(net.ip(last, net.node) / UDP()) == DROPPED
    assert way.arrives(net.ip(after, net.node) / UDP()) == PASSED
    assert way.arrives(net.ip(after, last) / UDP()) == PASSED


def test_families_do_not_meet(way: Way, net: Book) -> None:
    """All of one family is blocked, the other one passes."""
    everything = ("::", 0) if net.family == 6 else ("0.0.0.0", 0)
    # ::/0 as the agent writes it: mapped addresses are IPv4's.
    if net.family == 4:
        block(way.node, everything)
        assert way.arrives(net.ip(net.world, net.node) / UDP()) == DROPPED
        assert way.arrives(IPv6(src="2001:db8:f::9", dst="2001:db8::1") / UDP()) == PASSED
    else:
        block(way.node, ("2000::", 3))
        assert way.arrives(net.ip(net.world, net.node) / UDP()) == DROPPED
        assert way.arrives(IP(src="198.51.100.9", dst="192.0.2.1") / UDP()) == PASSED


def test_malformed_further_in(way: Way, net: Book) -> None:
    """A later fragment, a cut TCP header, an ICMP error about nothing: blocked all the same."""
    block(way.node, (net.world, whole(net)))
    ip = net.ip(net.world, net.node)
    if net.family == 4:
        odd = [
            IP(src=net.world, dst=net.node, frag=100, proto=17) / Raw(b"x" * 8),
            IP(src=net.world, dst=net.node, proto=6) / Raw(b"\1"),
            ip / ICMP(type=3, code=3) / Raw(b"junk"),
            IP(src=net.world, dst=net.node, len=4000, proto=17) / Raw(b"x"),
        ]
    else:
        odd = [
            ip / IPv6ExtHdrFragment(offset=100, nh=17) / Raw(b"x" * 8),
            IPv6(src=net.world, dst=net.node, nh=6) / Raw(b"\1"),
            IPv6(src=net.world, dst=net.node, nh=58) / Raw(b"\1\4\0\0\0\0\0\0junk"),
            IPv6(src=net.world, dst=net.node, plen=4000, nh=17) / Raw(b"x"),
        ]
    assert [way.arrives(packet) for packet in odd] == [DROPPED] * len(odd)


def test_what_is_not_ip_passes(way: Way, net: Book) -> None:
    block(way.node, ("0.0.0.0", 0) if net.family == 4 else ("2000::", 3))
    assert way.arrives(ARP(psrc="198.51.100.9", pdst="192.0.2.1")) == PASSED


def test_behind_vlan_tags(node: Node, net: Book) -> None:
    """XDP sees tags that the device did not take off; tc's frames come without."""
    block(node, (net.world, whole(net)))
    ip = net.ip(net.world, net.node) / UDP()
    for tags, code in ((Dot1Q(vlan=5), XDP_DROP), (Dot1Q(vlan=5) / Dot1Q(vlan=6), XDP_DROP)):
        frame = bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / tags / ip)
        assert node.run_xdp("ul", frame).code == code


def test_tells_who_blocked_it_but_not_of_each(way: Way, net: Book) -> None:
    """Every packet is counted, the first is told, with the number of the object that says so."""
    block(way.node, (net.world, whole(net)))
    while way.node.reader.drain():
        pass
    packet = net.ip(net.world, net.node) / TCP(sport=4000, dport=80, flags="S")
    began = time.monotonic()
    for _ in range(20):
        assert way.arrives(packet) == DROPPED
    ticks = (time.monotonic() - began) / 0.01  # a hundred a second at most, on a slow machine all
    events = way.node.reader.drain()
    assert 1 <= len(events) <= 2 + ticks
    [first, *_] = events
    assert (first.reason, first.kind, first.rule) == (DropReason.BLOCKED, EventKind.DROP, RULE)
    assert (first.source, first.destination) == (parse(net.world), parse(net.node))
    assert (first.source_port, first.destination_port, first.protocol) == (4000, 80, 6)
    assert first.length == len(bytes(Ether() / packet))
    if way.name == "tc" or KERNEL >= XDP_INGRESS_KERNEL:
        assert first.ifindex == way.node.index["ul"]


def test_tc_leaves_to_xdp_what_xdp_does(node: Node, net: Book) -> None:
    block(node, (net.world, whole(net)))
    packet = net.ip(net.world, net.node) / UDP()
    node.datapath.set_features(RuntimeFeature.ANNOUNCES)  # others' bits
    assert node.arrives(packet).code == TC_ACT_SHOT
    row = node.datapath.runtime()
    node.tables.runtime.update({0: type(row)(0, 0, RuntimeFeature.XDP_BLOCKS)})
    assert node.arrives(packet).code == TC_ACT_OK
    node.datapath.set_features(0)
    assert node.arrives(packet).code == TC_ACT_OK
