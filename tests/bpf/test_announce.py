# SPDX-License-Identifier: Apache-2.0
"""Requests for a load balancer's address, at the uplink: turned into replies in place.

neighbour --- uplink (dev ul) of node 1, which announces POOL and has MAC OURS
"""

from __future__ import annotations

import pytest
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6NDOptUnknown,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet
from support.packet_node import BOOKS, Node, mac
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, assert_packet

from weir.api.address import parse
from weir.datapath.records import Announced, RuntimeFeature

OURS, THEIRS = "02:00:00:00:0a:01", "02:00:00:00:0b:01"
BROADCAST = "ff:ff:ff:ff:ff:ff"
ZERO = "00:00:00:00:00:00"
POOL = {4: "192.0.2.100", 6: "2001:db8::100"}
NEIGHBOUR = {4: "192.0.2.50", 6: "2001:db8::50"}


@pytest.fixture(autouse=True)
def announced(node: Node) -> None:
    for address in POOL.values():
        node.tables.announced.update({parse(address): Announced(mac(OURS))})
    node.datapath.set_features(RuntimeFeature.ANNOUNCES)


def arp(**fields: object) -> ARP:
    made = {"op": 1, "hwsrc": THEIRS, "psrc": NEIGHBOUR[4], "hwdst": ZERO, "pdst": POOL[4]}
    return ARP(**(made | fields))


def request(layer: ARP, to: str = BROADCAST) -> Packet:
    return Ether(src=THEIRS, dst=to) / layer


def altered(at: int, byte: int) -> bytes:
    """The request with one byte of its header changed."""
    frame = bytearray(bytes(request(arp())))
    frame[at] = byte
    return bytes(frame)


def solicitation(
    *options: Packet,
    source: str = NEIGHBOUR[6],
    to: str = "ff02::1:ff00:100",
    target: str = POOL[6],
    hops: int = 255,
) -> Packet:
    frame = Ether(src=THEIRS, dst="33:33:ff:00:01:00")
    frame /= IPv6(src=source, dst=to, hlim=hops, tc=0xC0, fl=7) / ICMPv6ND_NS(tgt=target)
    for option in options:
        frame /= option
    return frame


SOURCE_MAC = ICMPv6NDOptSrcLLAddr(lladdr=THEIRS)
NONCE = ICMPv6NDOptUnknown(type=14, len=1, data=b"nonce.")


def advertisement(to: str, to_mac: str, solicited: int) -> bytes:
    return bytes(
        Ether(src=OURS, dst=to_mac)
        / IPv6(src=POOL[6], dst=to, hlim=255)
        / ICMPv6ND_NA(tgt=POOL[6], R=0, S=solicited, O=1)
        / ICMPv6NDOptDstLLAddr(lladdr=OURS)
    )


@pytest.mark.parametrize(
    ("asked", "asker"),
    [
        pytest.param(request(arp()), NEIGHBOUR[4], id="broadcast"),
        pytest.param(request(arp(), to=OURS), NEIGHBOUR[4], id="unicast probe"),
        pytest.param(request(arp(psrc="0.0.0.0")), "0.0.0.0", id="address conflict probe"),
    ],
)
def test_arp_request_becomes_the_reply(node: Node, asked: Packet, asker: str) -> None:
    out = node.run("from_uplink", "ul", asked)
    told = ARP(op=2, hwsrc=OURS, psrc=POOL[4], hwdst=THEIRS, pdst=asker)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, bytes(Ether(src=OURS, dst=THEIRS) / told))


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(solicitation(SOURCE_MAC), id="multicast"),
        pytest.param(solicitation(SOURCE_MAC, to=POOL[6]), id="unicast probe"),
        pytest.param(solicitation(to=POOL[6]), id="without options"),
        pytest.param(solicitation(NONCE, SOURCE_MAC), id="longer than its answer"),
    ],
)
def test_solicitation_becomes_the_advertisement(node: Node, asked: Packet) -> None:
    out = node.run("from_uplink", "ul", asked)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, advertisement(NEIGHBOUR[6], THEIRS, 1))


@pytest.mark.parametrize("options", [(), (NONCE,)], ids=["plain", "nonce"])
def test_duplicate_detection_is_told_to_all(node: Node, options: tuple[Packet, ...]) -> None:
    out = node.run("from_uplink", "ul", solicitation(*options, source="::"))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, advertisement("ff02::1", "33:33:00:00:00:01", 0))


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(request(arp(pdst="192.0.2.101")), id="ARP for another address"),
        pytest.param(request(arp(psrc=POOL[4])), id="gratuitous ARP of another node"),
        pytest.param(request(arp(op=2)), id="ARP reply"),
        pytest.param(altered(15, 6), id="ARP of another hardware"),
        pytest.param(altered(16, 0x88), id="ARP of another protocol"),
        pytest.param(bytes(request(arp()))[:40], id="ARP cut short"),
        pytest.param(solicitation(SOURCE_MAC, target="2001:db8::101"), id="NS for another"),
        pytest.param(solicitation(SOURCE_MAC, hops=254), id="NS through a router"),
        pytest.param(bytes(solicitation())[:70], id="NS cut short"),
        pytest.param(
            Ether(src=THEIRS, dst=OURS)
            / IPv6(src=NEIGHBOUR[6], dst="ff02::1", hlim=255)
            / ICMPv6ND_NA(tgt=POOL[6]),
            id="advertisement of another node",
        ),
    ],
)
def test_left_to_the_host(node: Node, frame: Packet | bytes) -> None:
    out = node.run("from_uplink", "ul", frame)
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    assert_packet(out.packet, bytes(frame))


@pytest.mark.parametrize("frame", [request(arp()), solicitation(SOURCE_MAC)], ids=["arp", "nd"])
@pytest.mark.parametrize("why", ["nothing is announced", "withdrawn"])
def test_silent_without_the_address(node: Node, frame: Packet, why: str) -> None:
    if why == "withdrawn":
        node.tables.announced.delete([parse(address) for address in POOL.values()])
    else:
        node.datapath.set_features(0)
    out = node.run("from_uplink", "ul", frame)
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    assert_packet(out.packet, bytes(frame))


def test_other_packets_pass_as_before(node: Node) -> None:
    for book in BOOKS.values():
        out = node.arrives(book.ip(book.world, book.node) / book.echo(1))
        assert (out.code, out.drops) == (TC_ACT_OK, {})
