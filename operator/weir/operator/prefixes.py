# SPDX-License-Identifier: Apache-2.0
"""Which ipBlocks contain an address: a tree of all their prefixes, `except`s included.

Every address's longest prefix P among them decides: for any prefix Q of an ipBlock, the address
is in Q exactly if P is. So the ipBlocks that contain the address are those that contain P, which
is kept with P. An IPv6 block never contains IPv4, although mapped addresses would lie in ::/0:
such a block gets the range of mapped IPv4 as one more `except`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weir.api.address import V4_BITS, V4_PREFIX, Addr, Cidr
from weir.operator.selectors import IpBlock

FEW = 64  # new values that are put in one by one rather than by sorting all
ALL_IPV4 = Cidr(Addr(V4_PREFIX + bytes(4)), V4_BITS)


class SortedInts:
    """A set of ints with range queries. A change costs next to nothing; a query sorts in what
    came since the last, and passes over what went, until that is half of all."""

    def __init__(self) -> None:
        self._all: set[int] = set()
        self._sorted: list[int] = []  # those in `_all` but the new ones, and the gone ones
        self._new: list[int] = []
        self._gone: set[int] = set()

    def __len__(self) -> int:
        return len(self._all)

    def add(self, value: int) -> None:
        if value in self._all:
            return
        self._all.add(value)
        if value in self._gone:
            self._gone.discard(value)
        else:
            self._new.append(value)

    def discard(self, value: int) -> None:
        if value in self._all:
            self._all.discard(value)
            self._gone.add(value)

    def between(self, low: int, high: int) -> list[int]:
        """All values from `low` to `high`, both included."""
        if len(self._gone) > len(self._all):
            self._sorted = sorted(self._all)
            self._new, self._gone = [], set()
        elif len(self._new) <= FEW:
            for value in self._new:
                insort(self._sorted, value)
            self._new = []
        else:
            self._sorted += self._new
            self._sorted.sort()
            self._new = []
        found = self._sorted[bisect_left(self._sorted, low) : bisect_right(self._sorted, high)]
        return [value for value in found if value in self._all] if self._gone else found


class Holes:
    """Ranges within a block: is something wholly in one of them? Two CIDRs never overlap in
    part, so after those within others are dropped, the last that begins before decides."""

    def __init__(self, cidrs: Iterable[Cidr]) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in sorted((bounds(cidr) for cidr in cidrs), key=lambda b: (b[0], -b[1])):
            if not self._lasts or first > self._lasts[-1]:
                self._firsts.append(first)
                self._lasts.append(last)

    def cover(self, first: int, last: int) -> bool:
        at = bisect_right(self._firsts, first) - 1
        return at >= 0 and last <= self._lasts[at]


@dataclass(slots=True, eq=False)
class Prefix:
    """A node of the tree. `blocks` are the numbers of the ipBlocks that contain all of it."""

    cidr: Cidr
    first: int
    last: int
    uses: int = 0
    blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Changes:
    """What adding or removing an ipBlock did to the tree, in the order to follow it up."""

    added: list[Prefix] = field(default_factory=list)
    removed: list[Prefix] = field(default_factory=list)
    touched: list[Prefix] = field(default_factory=list)  # `blocks` changed


def bounds(cidr: Cidr) -> tuple[int, int]:
    first = int.from_bytes(cidr.address, "big")
    return first, first | ((1 << (128 - cidr.bits)) - 1)


def _excepts(block: IpBlock) -> tuple[Cidr, ...]:
    if block.cidr.bits < V4_BITS and block.cidr.contains(ALL_IPV4.address):
        return (*block.excepts, ALL_IPV4)
    return block.excepts


class PrefixTree:
    """Prefixes by length, which is few lookups for an address: one a length in use."""

    def __init__(self) -> None:
        self._by_bits: dict[int, dict[int, Prefix]] = {}
        self._bits: list[int] = []  # lengths in use, longest first
        self._starts = SortedInts()

    def __iter__(self) -> Iterator[Prefix]:
        for level in self._by_bits.values():
            yield from level.values()

    def lookup(self, addr: int) -> Prefix | None:
        """The longest prefix that contains the address."""
        for bits in self._bits:
            shift = 128 - bits
            found = self._by_bits[bits].get(addr >> shift << shift)
            if found is not None:
                return found
        return None

    def parent(self, prefix: Prefix) -> Prefix | None:
        """The longest prefix that contains this one and is shorter."""
        for bits in self._bits:
            if bits < prefix.cidr.bits:
                shift = 128 - bits
                found = self._by_bits[bits].get(prefix.first >> shift << shift)
                if found is not None:
                    return found
        return None

    def add(self, number: int, block: IpBlock) -> Changes:
        changes = Changes()
        excepts = _excepts(block)
        for cidr in dict.fromkeys((block.cidr, *excepts)):
            self._use(cidr, changes)
        for prefix in self._contained(block.cidr, excepts):
            prefix.blocks.add(number)
            changes.touched.append(prefix)
        return changes

    def remove(self, number: int, block: IpBlock) -> Changes:
        changes = Changes()
        excepts = _excepts(block)
        for prefix in self._contained(block.cidr, excepts):
            prefix.blocks.discard(number)
            changes.touched.append(prefix)
        for cidr in dict.fromkeys((block.cidr, *excepts)):
            self._unuse(cidr, changes)
        return changes

    def _contained(self, cidr: Cidr, excepts: tuple[Cidr, ...]) -> Iterator[Prefix]:
        low, high = bounds(cidr)
        holes = Holes(excepts)
        for start in self._starts.between(low, high):
            for bits in self._bits:
                found = self._by_bits[bits].get(start)
                if (
                    found is not None
                    and bits >= cidr.bits
                    and not holes.cover(found.first, found.last)
                ):
                    yield found

    def _use(self, cidr: Cidr, changes: Changes) -> None:
        first, last = bounds(cidr)
        level = self._by_bits.get(cidr.bits)
        if level is None:
            level = self._by_bits[cidr.bits] = {}
            self._bits = sorted(self._by_bits, reverse=True)
        prefix = level.get(first)
        if prefix is None:
            prefix = Prefix(cidr, first, last)
            above = self.parent(prefix)
            if above is not None:
                prefix.blocks |= above.blocks
            level[first] = prefix
            self._starts.add(first)
            changes.added.append(prefix)
        prefix.uses += 1

    def _unuse(self, cidr: Cidr, changes: Changes) -> None:
        first, _ = bounds(cidr)
        level = self._by_bits[cidr.bits]
        prefix = level[first]
        prefix.uses -= 1
        if prefix.uses:
            return
        del level[first]
        if not level:
            del self._by_bits[cidr.bits]
            self._bits = sorted(self._by_bits, reverse=True)
        if not any(first in other for other in self._by_bits.values()):
            self._starts.discard(first)
        changes.removed.append(prefix)
