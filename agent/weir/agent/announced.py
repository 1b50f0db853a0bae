# SPDX-License-Identifier: Apache-2.0
"""Rows of `announced`: load balancers' addresses that this node answers ARP and ND requests for.

Which node that is comes from the operators. With which MAC address follows from the node's own
network: that of the uplink that is in the address's network, or else of the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weir.agent.rows import Rows
from weir.api.address import Addr, Cidr, is_ipv4
from weir.datapath import records


@dataclass(frozen=True, slots=True)
class Segment:
    """What an uplink leads to."""

    device: str
    ifindex: int
    mac: bytes
    networks: tuple[Cidr, ...]


class AnnouncedTable:
    """`announcing` is what the rows say, with where."""

    def __init__(self) -> None:
        self.rows: Rows[Addr, records.Announced] = Rows("announced")
        self.announcing: dict[Addr, Segment] = {}
        self._node = ""
        self._segments: tuple[Segment, ...] = ()
        self._nodes: dict[Addr, str] = {}

    def set_address(self, addr: Addr, node: str | None) -> None:
        if node is None:
            self._nodes.pop(addr, None)
        else:
            self._nodes[addr] = node
        self._put(addr)

    def set_facts(self, node: str, segments: tuple[Segment, ...]) -> None:
        if (node, segments) == (self._node, self._segments):
            return
        self._node, self._segments = node, segments
        for addr in self._nodes:
            self._put(addr)

    def nodes(self) -> Mapping[Addr, str]:
        return self._nodes

    def _put(self, addr: Addr) -> None:
        segment = self._segment(addr) if self._nodes.get(addr) == self._node else None
        if segment is None:
            self.rows.drop(addr)
            self.announcing.pop(addr, None)
        else:
            self.rows.put(addr, records.Announced(segment.mac))
            self.announcing[addr] = segment

    def _segment(self, addr: Addr) -> Segment | None:
        families = [
            s for s in self._segments if any(n.is_ipv4 == is_ipv4(addr) for n in s.networks)
        ]
        inside = [s for s in families if any(network.contains(addr) for network in s.networks)]
        return next(iter((*inside, *families, *self._segments)), None)
