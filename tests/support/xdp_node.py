# SPDX-License-Identifier: Apache-2.0
"""The packet ring's node with XDP before tc, as a packet of the uplink meets them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from support.packet_node import GATEWAY_MAC, PEER_MAC, Book, Node, Outcome, World
from support.packets import TC_ACT_REDIRECT, XDP_PASS, XDP_TX, assert_packet
from weir.datapath.datapath import Datapath
from weir.datapath.records import EventKind


class XdpNode(Node):
    """`arrives` runs XDP, and then tc on what XDP passes on, which must be unchanged. What XDP
    sent out is told as tc would: a redirection with the frame's MAC addresses as they came."""

    def __init__(self, datapath: Datapath, world: World, book: Book) -> None:
        super().__init__(datapath, world, book)
        # Who listens for new flows hears of them from tc.
        datapath.set_event_mask(1 << EventKind.DROP)

    sent_by_xdp = 0
    passed_by_xdp = 0

    def arrives(self, layers: Packet, program: str = "from_uplink", device: str = "ul") -> Outcome:
        frame = bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)
        if program != "from_uplink" or device != "ul":
            return super().arrives(layers, program, device)
        out = self.run_xdp(device, frame)
        if out.code == XDP_PASS:
            self.passed_by_xdp += 1
            assert_packet(out.packet, frame)
            assert out.drops == {}
            return super().arrives(layers, program, device)
        assert out.code == XDP_TX
        self.sent_by_xdp += 1
        # From the uplink to the gateway, whose MAC address is the peer's.
        macs = bytes(Ether(src=GATEWAY_MAC, dst=PEER_MAC))[:12]
        assert_packet(out.packet[:12], macs)
        return replace(out, code=TC_ACT_REDIRECT, packet=frame[:12] + out.packet[12:])

    @contextmanager
    def expect(self, sent: int, passed: int = 0) -> Iterator[None]:
        """How many packets XDP sends and passes on in the block."""
        before = self.sent_by_xdp, self.passed_by_xdp
        yield
        found = self.sent_by_xdp - before[0], self.passed_by_xdp - before[1]
        assert found == (sent, passed), f"(sent, passed on) by XDP: {found}"
