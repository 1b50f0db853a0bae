# SPDX-License-Identifier: Apache-2.0
"""Sets of backends under service ids: rows of `backends` and `maglev`.

A set's backends never change in place: each change is a new id with slots of its own, so that the
reconciler can publish it by one update of each row that leads there. Survivors keep their slot, so
that a change moves few clients.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from weir.agent import maglev
from weir.agent.backends import BLOCK_BYTES, SLOT_BYTES, backend_rows, maglev_rows, pack, split
from weir.agent.frontends import SetName
from weir.agent.wanted import PortName, Wanted, port_of
from weir.datapath import records

LIMIT = 1 << 32
# Numbers used and freed just before a restart may linger in conntrack: stay clear of them.
GAP = 1 << 16

T = TypeVar("T", bound=Hashable)


class Counter:
    """Numbers of 32 bits that come round, without 0."""

    def __init__(self) -> None:
        self._next = 1

    def skip(self, used: Iterable[int]) -> None:
        highest = max(used, default=0)
        if highest:
            self._next = (highest + GAP) % LIMIT or 1

    def take(self) -> int:
        number = self._next
        self._next = (number + 1) % LIMIT or 1
        return number


class _Known(NamedTuple):
    id: int
    packed: bytes
    identity: int


class Adoption:
    """What the kernel holds after a restart: unchanged services keep ids, slots and identities."""

    def __init__(self) -> None:
        self._rows: dict[records.ServiceKey, _Known] = {}
        self._taken: set[tuple[str, int]] = set()

    def learn(
        self,
        services: Mapping[records.ServiceKey, records.Service],
        backends: Mapping[records.BackendKey, records.Backend],
    ) -> None:
        packed: dict[int, bytes] = {}
        for key, row in services.items():
            if row.id not in packed:
                slots = [backends.get(records.BackendKey(row.id, n)) for n in range(row.count)]
                known = [slot for slot in slots if slot is not None]
                packed[row.id] = pack(known) if len(known) == row.count else b""
            self._rows[key] = _Known(row.id, packed[row.id], row.identity)

    def forget(self) -> None:
        self._rows.clear()
        self._taken.clear()

    def backends(self, wanted: Wanted, name: SetName) -> tuple[int, bytes]:
        """The id that rows of this set had and its slots; (0, b"") if there is none to keep."""
        for row in wanted.rows if self._rows else ():
            known = self._rows.get(row.key) if row.backends == name else None
            if known is not None and self._take("id", known.id):
                return known.id, known.packed
        return 0, b""

    def identity(self, wanted: Wanted, port: PortName) -> int:
        """What rows of this port went by; 0 if there is none to keep."""
        for row in wanted.rows if self._rows else ():
            known = self._rows.get(row.key) if port_of(row.backends) == port else None
            if known is not None and known.identity and self._take("identity", known.identity):
                return known.identity
        return 0

    def _take(self, kind: str, number: int) -> bool:
        """Once each."""
        if (kind, number) in self._taken:
            return False
        self._taken.add((kind, number))
        return True


class SetTables:
    """`maglev_table_size` 0: no tables."""

    def __init__(self, adoption: Adoption) -> None:
        self.backends = backend_rows()
        self.maglev = maglev_rows()
        self.maglev_table_size = 0
        self.ids = Counter()
        self._adoption = adoption

    def publish(self, old: Mapping[SetName, int], wanted: Wanted) -> dict[SetName, int]:
        """Ids of the wanted sets. `old`: those that they replace."""
        left = dict(old)
        found: dict[SetName, int] = {}
        tables = wanted.tables
        for name, members in wanted.sets.items():
            before = left.pop(name, 0)
            number = before
            slots = self.backends.packed(before)
            if not before:
                number, slots = self._adoption.backends(wanted, name)
            packed = b"".join(stable_order(split(slots), members))
            if not before or packed != slots:
                if before:
                    self.drop(before)
                if not number or packed != slots:
                    number = self.ids.take()
                self.backends.put(number, packed)
            found[name] = number
            self._publish_table(number, split(packed), wanted=name in tables)
        for number in left.values():
            self.drop(number)
        return found

    def count(self, number: int) -> int:
        return len(self.backends.packed(number)) // SLOT_BYTES

    def drop(self, number: int) -> None:
        self.backends.drop(number)
        if number in self.maglev:
            self.maglev.drop(number)

    def _publish_table(self, number: int, members: Sequence[bytes], *, wanted: bool) -> None:
        there = number in self.maglev
        if wanted and maglev.fits(len(members), self.maglev_table_size):
            if not there:
                entries = maglev.assign(members, self.maglev_table_size)
                self.maglev.put(number, maglev.pack(entries, BLOCK_BYTES))
        elif there:
            self.maglev.drop(number)


def stable_order(slots: Sequence[T], wanted: Sequence[T]) -> Sequence[T]:
    """`wanted` in an order that moves as few of `slots` as possible: newcomers take the slots of
    those that left, and the last ones move into slots that stay empty."""
    if not slots:
        return wanted
    members = set(wanted)
    if members == set(slots) and len(slots) == len(members):
        return slots
    kept = set(slots) & members
    newcomers = iter([backend for backend in wanted if backend not in kept])
    result = [backend if backend in kept else next(newcomers, None) for backend in slots]
    result += newcomers
    length = len(members)
    tail = [backend for backend in result[length:] if backend is not None]
    return [backend if backend is not None else tail.pop() for backend in result[:length]]
