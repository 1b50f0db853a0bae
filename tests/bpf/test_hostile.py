# SPDX-License-Identifier: Apache-2.0
"""Packets of those who mean harm, or who come too late: what must not reach anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP, UDP
from support.datapaths import Datapaths
from support.packet_node import Book, Node, World
from support.packets import TC_ACT_REDIRECT

from weir.datapath.records import DropReason, ServiceFlag, SnatKind
from weir.datapath.settings import Settings


@pytest.fixture(params=[True, False], ids=["vxlan", "native"])
def tunnel(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture
def either(
    tunnel: bool, datapaths: Datapaths, settings: Settings, world: World, net: Book
) -> Iterator[Node]:
    chosen = dataclasses.replace(settings, tunnel=tunnel, xdp_services=True)
    made = Node(datapaths.get(chosen), world, net)
    yield made
    made.reader.close()


@pytest.mark.parametrize("who", ["node", "pod", "new pod"])
def test_clients_inside_get_no_direct_return(
    either: Node, tunnel: bool, net: Book, who: str
) -> None:
    """The backend may be on the client's own node, which takes its own address for a lie."""
    either.service(6, 80, (net.r, 8080), flags=ServiceFlag.DSR, at=net.node)
    client = {"node": net.node2, "pod": net.r, "new pod": net.unknown}[who]
    out = either.arrives(net.ip(client, net.node) / TCP(sport=4000, dport=80, flags="S"))
    if tunnel and who != "node":
        assert out.drops == {DropReason.SPOOFED_SOURCE: 1}
        return
    assert (out.code, out.drops, out.frame[1].src) == (TC_ACT_REDIRECT, {}, net.node)


def test_answers_do_not_look_like_the_overlay(
    datapaths: Datapaths, settings: Settings, world: World, net: Book
) -> None:
    """Its port is not given away: what comes there is the device's."""
    chosen = dataclasses.replace(settings, overlay_port=settings.snat_port_first)
    node = Node(datapaths.get(chosen), world, net)
    for sport in range(4000, 4003):
        assert node.leaves(net.ip(net.a, net.world) / UDP(sport=sport, dport=53)).drops == {}
    out = node.leaves(net.ip(net.a, net.world) / UDP(sport=4003, dport=53))
    taken = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    node.reader.close()
    assert chosen.overlay_port not in taken
    assert out.drops == {DropReason.SNAT_NO_PORT: 1}
