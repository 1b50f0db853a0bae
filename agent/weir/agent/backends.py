# SPDX-License-Identifier: Apache-2.0
"""Rows of `backends`: many, so they are kept packed and become records only on their way out.

A service id's slots are one bytes object, 18 bytes each. Ids come and go whole (a change of a
service's backends has a new id), so what changed since the last plan are ids, not rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from weir.agent.rows import Change
from weir.api.address import Addr
from weir.datapath.records import Backend, BackendKey

ADDRESS_BYTES = 16
SLOT_BYTES = ADDRESS_BYTES + 2


def pack(backends: Iterable[Backend]) -> bytes:
    return b"".join(b.address + b.port.to_bytes(2) for b in backends)


def split(packed: bytes) -> list[bytes]:
    """The slots, still packed."""
    return [packed[at : at + SLOT_BYTES] for at in range(0, len(packed), SLOT_BYTES)]


def unpack(packed: bytes) -> Iterator[Backend]:
    for slot in split(packed):
        yield Backend(Addr(slot[:ADDRESS_BYTES]), int.from_bytes(slot[ADDRESS_BYTES:]))


class PackedRows(Mapping[BackendKey, Backend]):
    """The rows as a mapping; nothing but `BackendRows` changes it."""

    def __init__(self) -> None:
        self.slots: dict[int, bytes] = {}
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[BackendKey]:
        for number, packed in self.slots.items():
            for slot in range(len(packed) // SLOT_BYTES):
                yield BackendKey(number, slot)

    def __getitem__(self, key: BackendKey) -> Backend:
        at = key.slot * SLOT_BYTES
        packed = self.slots[key.service][at : at + SLOT_BYTES]
        if not packed:
            raise KeyError(key)
        return Backend(Addr(packed[:ADDRESS_BYTES]), int.from_bytes(packed[ADDRESS_BYTES:]))


class BackendRows:
    """As `Rows`, by service id."""

    def __init__(self) -> None:
        self.name = "backends"
        self._rows = PackedRows()
        self._changed: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Mapping[BackendKey, Backend]:
        return self._rows

    def slots(self, number: int) -> bytes:
        return self._rows.slots.get(number, b"")

    def put(self, number: int, packed: bytes) -> None:
        """All slots of an id that has none."""
        self._changed.setdefault(number, b"")
        self._rows.slots[number] = packed
        self._rows.count += len(packed) // SLOT_BYTES

    def drop(self, number: int) -> None:
        packed = self._rows.slots.pop(number)
        self._changed.setdefault(number, packed)
        self._rows.count -= len(packed) // SLOT_BYTES

    def take(self) -> dict[BackendKey, Change[Backend]]:
        """What changed since the last call, without what changed back."""
        changed, self._changed = self._changed, {}
        changes: dict[BackendKey, Change[Backend]] = {}
        for number, before in changed.items():
            after = self.slots(number)
            if before == after:
                continue
            # One of the two is empty: an id is never used twice between two calls.
            for slot, backend in enumerate(unpack(before)):
                changes[BackendKey(number, slot)] = Change(backend, None)
            for slot, backend in enumerate(unpack(after)):
                changes[BackendKey(number, slot)] = Change(None, backend)
        return changes
