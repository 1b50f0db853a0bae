# SPDX-License-Identifier: Apache-2.0
"""A map as a typed table. All calls are batched; one table is safe for one writer."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Protocol, TypeVar

from weir.datapath import libbpf
from weir.datapath.codec import Codec
from weir.datapath.errors import TableFull
from weir.datapath.view import View

K = TypeVar("K")
V = TypeVar("V")

# Entries a call: enough to make the call's cost vanish, little enough to hold in memory.
CHUNK = 4096


class TableLike(Protocol[K, V]):
    """What the reconciler needs of a table; tests have one in memory."""

    name: str
    max_entries: int

    def items(self) -> Iterator[tuple[K, V]]: ...
    def get(self, key: K) -> V | None: ...
    def update(self, rows: Mapping[K, V]) -> None: ...
    def delete(self, keys: Iterable[K]) -> None: ...


class Table(TableLike[K, V]):
    """A map of the kernel. Owns its descriptor."""

    def __init__(self, name: str, fd: int, keys: Codec[K], values: Codec[V]) -> None:
        self.name = name
        self.fd = fd
        self._keys = keys
        self._values = values
        self.max_entries = libbpf.map_info(fd, name).shape.max_entries

    def __repr__(self) -> str:
        return f"Table({self.name!r}, max_entries={self.max_entries})"

    def items(self) -> Iterator[tuple[K, V]]:
        """All entries, in chunks read as the iteration goes: no snapshot."""
        for keys, values in self._walk(self._values.size):
            yield from zip(
                self._keys.decode_all(keys), self._values.decode_all(values), strict=True
            )

    def _walk(self, value_size: int) -> Iterator[tuple[bytes, bytes]]:
        chunk = min(CHUNK, self.max_entries)
        return libbpf.walk(self.fd, self._keys.size, value_size, chunk)

    def view(
        self, keys: Sequence[str] = (), values: Sequence[str] = (), watched: Sequence[str] = ()
    ) -> View[K, V]:
        """A walk that looks at these members only, and deletes what has not changed in those that
        are `watched` (of the value)."""
        chunk = min(CHUNK, self.max_entries)
        members = (keys, values, watched)
        return View(self.name, self.fd, chunk, self._keys, self._values, members)

    def get(self, key: K) -> V | None:
        found = libbpf.lookup(self.fd, self._keys.encode(key), self._values.size)
        return None if found is None else self._values.decode(found)

    def update(self, rows: Mapping[K, V]) -> None:
        """Writes all rows, in the mapping's order. TableFull when they do not fit."""
        pending = iter(rows.items())
        while some := list(islice(pending, CHUNK)):
            keys = self._keys.encode_all([key for key, _ in some])
            values = self._values.encode_all([value for _, value in some])
            _, number = libbpf.update(self.fd, keys, self._keys.size, values, self._values.size)
            if number in {errno.E2BIG, errno.ENOSPC}:
                raise TableFull(self.name, self.max_entries, number)
            if number:
                raise libbpf.failure("update", self.name, number)

    def delete(self, keys: Iterable[K]) -> None:
        """Deletes these keys; an absent one is fine."""
        pending = iter(keys)
        while some := list(islice(pending, CHUNK)):
            packed = self._keys.encode_all(some)
            _, number = libbpf.delete(self.fd, packed, self._keys.size)
            if number:
                raise libbpf.failure("delete from", self.name, number)


class PerCpuTable(Table[K, V]):
    """A read-only view of a per-CPU map: each value is the sum over CPUs."""

    def __init__(self, name: str, fd: int, keys: Codec[K], values: Codec[V]) -> None:
        super().__init__(name, fd, keys, values)
        self._cpus = libbpf.possible_cpus()
        self._stride = -(-values.size // 8) * 8

    def items(self) -> Iterator[tuple[K, V]]:
        room = self._stride * self._cpus
        for keys, values in self._walk(room):
            for at, key in enumerate(self._keys.decode_all(keys)):
                yield key, self._sum(values[at * room : (at + 1) * room])

    def get(self, key: K) -> V | None:
        found = libbpf.lookup(self.fd, self._keys.encode(key), self._stride * self._cpus)
        return None if found is None else self._sum(found)

    def _sum(self, data: bytes) -> V:
        """Adds up the values' bytes as 64-bit counters, which all per-CPU values consist of."""
        rows = [
            memoryview(data[at : at + self._values.size]).cast("Q")
            for at in range(0, len(data), self._stride)
        ]
        totals = [sum(column) & 0xFFFF_FFFF_FFFF_FFFF for column in zip(*rows, strict=True)]
        return self._values.decode(b"".join(total.to_bytes(8, "little") for total in totals))

    def update(self, rows: Mapping[K, V]) -> None:
        raise TypeError(f"{self.name} is written by the programs only")
