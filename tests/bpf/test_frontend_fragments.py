# SPDX-License-Identifier: Apache-2.0
"""Fragments to services and back, each way of each kind: ports change in the first part only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.datapaths import Datapaths
from support.packet_node import Book, Node, World
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT

from weir.datapath.records import DropReason, SnatKind
from weir.datapath.settings import Settings

ID = 77


@pytest.fixture
def native(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[Node]:
    chosen = dataclasses.replace(settings, tunnel=False, masquerade=False)
    made = Node(datapaths.get(chosen), world, net)
    yield made
    made.reader.close()


def parts(
    net: Book, source: str, sport: int, target: str, dport: int, hops: int = 64
) -> list[Packet]:
    """A datagram in two parts, with a checksum that counts as none is checked."""
    udp = UDP(sport=sport, dport=dport, len=40, chksum=0x5555) / Raw(b"x" * 16)
    ttl = net.ttl(hops)
    if net.family == 4:
        return [
            net.ip(source, target, flags="MF", id=ID, **ttl) / udp,
            net.ip(source, target, frag=3, id=ID, proto=17, **ttl) / Raw(b"y" * 16),
        ]
    first = IPv6ExtHdrFragment(offset=0, m=1, id=ID, nh=17)
    later = IPv6ExtHdrFragment(offset=3, m=0, id=ID, nh=17)
    return [
        net.ip(source, target, **ttl) / first / udp,
        net.ip(source, target, **ttl) / later / Raw(b"y" * 16),
    ]


def headers(frame: bytes) -> tuple[str, str, int, int, int]:
    packet = Ether(frame)
    udp = packet[UDP]
    return packet[1].src, packet[1].dst, udp.sport, udp.dport, udp.chksum


def assert_parts(out: list[bytes], expected: list[Packet]) -> None:
    """The first without its checksum, which changes by what was translated; the later whole."""
    assert headers(out[0])[:4] == headers(bytes(Ether() / expected[0]))[:4]
    assert out[1][14:] == bytes(expected[1])


def test_to_a_pod_here_and_back(node: Node, net: Book) -> None:
    node.service(17, 53, (net.b, 5353))
    out = [node.arrives(part) for part in parts(net, net.world, 4000, net.vip, 53)]
    assert [(o.code, o.drops) for o in out] == [(TC_ACT_REDIRECT, {})] * 2
    assert_parts([o.packet for o in out], parts(net, net.world, 4000, net.b, 5353))
    back = [node.from_pod("b", part) for part in parts(net, net.b, 5353, net.world, 4000)]
    assert [(o.code, o.drops) for o in back] == [(TC_ACT_REDIRECT, {})] * 2
    assert_parts([o.packet for o in back], parts(net, net.vip, 53, net.world, 4000, 63))


def test_to_a_pod_elsewhere_and_back(native: Node, net: Book) -> None:
    node = native
    node.service(17, 53, (net.r, 5353))
    out = [node.arrives(part) for part in parts(net, net.world, 4000, net.vip, 53)]
    assert [(o.code, o.drops) for o in out] == [(TC_ACT_REDIRECT, {})] * 2
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    assert_parts([o.packet for o in out], parts(net, net.node, port, net.r, 5353, 63))
    back = [node.arrives(part) for part in parts(net, net.r, 5353, net.node, port)]
    assert [(o.code, o.drops) for o in back] == [(TC_ACT_REDIRECT, {})] * 2
    assert_parts([o.packet for o in back], parts(net, net.vip, 53, net.world, 4000, 63))


def test_a_later_part_without_the_first(node: Node, net: Book) -> None:
    """Nobody knows its ports: the host may have sent for it."""
    node.service(17, 53, (net.b, 5353))
    _, later = parts(net, net.world2, 4000, net.vip, 53)
    out = node.arrives(later)
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    _, to_pod = parts(net, net.world2, 4000, net.b, 5353)
    assert node.arrives(to_pod).drops == {DropReason.FRAGMENT: 1}
