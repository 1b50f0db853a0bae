# SPDX-License-Identifier: Apache-2.0
"""A pod that is asked from outside the cluster by its own address answers with that address."""

from __future__ import annotations

from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether
from support.packet_node import GATEWAY_MAC, PEER_MAC, Book, Node
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, assert_packet


def test_answer_to_the_outside_is_not_masqueraded(node: Node, net: Book) -> None:
    """world → a arrives by the uplink; a → world leaves as it is."""
    asked = node.arrives(net.ip(net.world, net.a) / TCP(sport=4000, dport=80, flags="S"))
    assert (asked.code, asked.drops) == (TC_ACT_REDIRECT, {})
    answer = net.ip(net.a, net.world) / TCP(sport=80, dport=4000, flags="SA")
    assert node.from_pod("a", answer).code == TC_ACT_REDIRECT
    out = node.leaves(answer)
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    assert_packet(out.packet, bytes(Ether(src=GATEWAY_MAC, dst=PEER_MAC) / answer))
    assert list(node.tables.snat.items()) == []
