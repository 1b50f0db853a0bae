# SPDX-License-Identifier: Apache-2.0
"""Reads the events that the programs put into the ring buffer."""

from __future__ import annotations

from weir.datapath import libbpf
from weir.datapath.codec import Codec
from weir.datapath.records import Event

# Records of one drain: the rest stays in the ring, whose descriptor stays readable.
DRAIN = 4096


class EventReader:
    """For asyncio: `loop.add_reader(reader.fd, …)`, then `drain()` when it is readable."""

    def __init__(self, ring: int, codec: Codec[Event]) -> None:
        self._codec = codec
        self._ring = libbpf.Ring(ring, codec.size, DRAIN)

    @property
    def fd(self) -> int:
        return self._ring.fd

    @property
    def malformed(self) -> int:
        return self._ring.malformed

    def drain(self) -> list[Event]:
        """What is there now, DRAIN events at most; does not block."""
        return list(self._codec.decode_all(self._ring.drain()))

    def close(self) -> None:
        self._ring.close()
