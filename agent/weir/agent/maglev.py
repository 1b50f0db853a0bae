# SPDX-License-Identifier: Apache-2.0
"""Maglev tables: every node gives the same client the same backend, without asking the others.

As in "Maglev: A Fast and Reliable Software Network Load Balancer" (Eisenbud et al., NSDI 2016,
section 3.4): each backend has a permutation of the table's entries of its own, and the backends
take turns, each taking the first free entry of its permutation. So all have equally many entries,
give or take one, and when one goes, few entries of the others move. Turns go by address, not by
arrival, so that nodes which heard of the backends in another order make the same table.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

MEMBERS_LIMIT = 1 << 16
"""A block's slots have 16 bits."""


def is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, int(number**0.5) + 1))


def fits(members: int, size: int) -> bool:
    """Whether a table is of use: one backend needs none, and each must get an entry."""
    return 1 < members <= min(size, MEMBERS_LIMIT)


def assign(members: Sequence[bytes], size: int) -> list[int]:
    """Which member each entry has. `size` is a prime; members differ."""
    preferences = [_preference(member, size) for member in members]
    at = [offset for offset, _ in preferences]
    skips = [skip for _, skip in preferences]
    entries = [-1] * size
    order = sorted(range(len(members)), key=members.__getitem__)
    left = size
    while True:
        for member in order:
            entry, skip = at[member], skips[member]
            while entries[entry] >= 0:
                entry += skip
                if entry >= size:
                    entry -= size
            entries[entry] = member
            at[member] = entry
            left -= 1
            if not left:
                return entries


def pack(entries: Sequence[int], width: int) -> bytes:
    """As blocks of `width` bytes each, the last one filled up with zeros."""
    packed = array("H", entries).tobytes()
    return packed.ljust(-(-len(packed) // width) * width, b"\0")


def _preference(member: bytes, size: int) -> tuple[int, int]:
    """First entry and step of a member's permutation: as the size is a prime, it visits all."""
    digest = blake2b(member, digest_size=16).digest()
    offset = int.from_bytes(digest[:8]) % size
    return offset, int.from_bytes(digest[8:]) % (size - 1) + 1
