# SPDX-License-Identifier: Apache-2.0
"""Rows of `backends` and `maglev`: many, so they are kept packed and become records only on their
way out.

A service id's rows are one bytes object (backends: 18 bytes each). Ids come and go whole (a change
of a service's backends has a new id), so what changed since the last plan are ids, not rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from weir.agent.rows import Change
from weir.api.address import Addr
from weir.datapath.records import MAGLEV_BLOCK, Backend, BackendKey, MaglevBlock, MaglevKey

ADDRESS_BYTES = 16
SLOT_BYTES = ADDRESS_BYTES + 2
BLOCK_BYTES = 2 * MAGLEV_BLOCK


class Key(Protocol):
    """Of a row that belongs to a service id."""

    @property
    def service(self) -> int: ...


K = TypeVar("K", bound=Key)
V = TypeVar("V")


def pack(backends: Iterable[Backend]) -> bytes:
    return b"".join(b.address + b.port.to_bytes(2) for b in backends)


def split(packed: bytes) -> list[bytes]:
    """The slots, still packed."""
    return [packed[at : at + SLOT_BYTES] for at in range(0, len(packed), SLOT_BYTES)]


def unpack(packed: bytes) -> Iterator[Backend]:
    return map(_backend, split(packed))


def _backend(slot: bytes) -> Backend:
    return Backend(Addr(slot[:ADDRESS_BYTES]), int.from_bytes(slot[ADDRESS_BYTES:]))


class PackedRows(Mapping[K, V], Generic[K, V]):
    """The rows as a mapping; nothing but `IdRows` changes it."""

    def __init__(
        self,
        width: int,
        key: Callable[[int, int], K],
        place: Callable[[K], int],
        value: Callable[[bytes], V],
    ) -> None:
        self.width = width
        self.key = key
        self._place = place
        self.value = value
        self.packed: dict[int, bytes] = {}
        self.count = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[K]:
        for number, packed in self.packed.items():
            for place in range(len(packed) // self.width):
                yield self.key(number, place)

    def __getitem__(self, key: K) -> V:
        at = self._place(key) * self.width
        packed = self.packed[key.service][at : at + self.width]
        if not packed:
            raise KeyError(key)
        return self.value(packed)


class IdRows(Generic[K, V]):
    """As `Rows`, by service id."""

    def __init__(self, name: str, rows: PackedRows[K, V]) -> None:
        self.name = name
        self._rows = rows
        self._changed: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, number: int) -> bool:
        return number in self._rows.packed

    @property
    def rows(self) -> Mapping[K, V]:
        return self._rows

    def packed(self, number: int) -> bytes:
        return self._rows.packed.get(number, b"")

    def put(self, number: int, packed: bytes) -> None:
        """All rows of an id that has none."""
        self._changed.setdefault(number, b"")
        self._rows.packed[number] = packed
        self._rows.count += len(packed) // self._rows.width

    def drop(self, number: int) -> None:
        packed = self._rows.packed.pop(number)
        self._changed.setdefault(number, packed)
        self._rows.count -= len(packed) // self._rows.width

    def forget(self) -> None:
        """What changed since the last call of `take` is found in another way."""
        self._changed.clear()

    def take(self) -> dict[K, Change[V]]:
        """What changed since the last call, without what changed back."""
        changed, self._changed = self._changed, {}
        changes: dict[K, Change[V]] = {}
        for number, before in changed.items():
            after = self.packed(number)
            if before == after:
                continue
            # One of the two is empty, or the same rows come again: an id gets no others.
            for place, value in enumerate(self._values(before)):
                changes[self._rows.key(number, place)] = Change(value, None)
            for place, value in enumerate(self._values(after)):
                changes[self._rows.key(number, place)] = Change(None, value)
        return changes

    def _values(self, packed: bytes) -> Iterator[V]:
        value, width = self._rows.value, self._rows.width
        return (value(packed[at : at + width]) for at in range(0, len(packed), width))


def backend_rows() -> IdRows[BackendKey, Backend]:
    return IdRows("backends", PackedRows(SLOT_BYTES, BackendKey, lambda key: key.slot, _backend))


def maglev_rows() -> IdRows[MaglevKey, MaglevBlock]:
    return IdRows("maglev", PackedRows(BLOCK_BYTES, MaglevKey, lambda key: key.block, MaglevBlock))
