# SPDX-License-Identifier: Apache-2.0
"""Port ranges as the port prefixes that policy rows are keyed by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

PORT_BITS = 16
ANY_PROTOCOL = 17  # enum policy_level: LEVEL_ANY_PROTOCOL


class PortPrefix(NamedTuple):
    """The part of a policy key that a packet's protocol and port must match."""

    protocol: int
    port: int
    bits: int


EVERYTHING = PortPrefix(0, 0, ANY_PROTOCOL)


def prefixes(protocol: int, first: int, last: int) -> Iterator[PortPrefix]:
    """The fewest prefixes that cover exactly first..last, both included. 0-65535 is one."""
    while first <= last:
        size = first & -first or 1 << PORT_BITS
        while size > last - first + 1:
            size >>= 1
        yield PortPrefix(protocol, first, PORT_BITS - (size.bit_length() - 1))
        first += size
