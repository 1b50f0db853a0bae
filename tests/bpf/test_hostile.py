# SPDX-License-Identifier: Apache-2.0
"""Packets of those who mean harm, or who come too late: what must not reach anything."""

from __future__ import annotations

import dataclasses

from scapy.layers.inet import UDP
from support.datapaths import Datapaths
from support.packet_node import Book, Node, World

from weir.datapath.records import DropReason, SnatKind
from weir.datapath.settings import Settings


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
