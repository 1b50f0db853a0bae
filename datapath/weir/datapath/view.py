# SPDX-License-Identifier: Apache-2.0
"""A walk over a large table that looks at a few members of each entry.

Making records of 262,144 entries takes seconds of Python; taking the expiry out of each takes
milliseconds. And who decides by what it saw must not delete what has changed since, so a batch
deletes only entries whose decisive members still are as they were read.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any, Generic, Protocol, TypeVar

from weir.datapath import libbpf
from weir.datapath.codec import Codec, Leaf, layout_of
from weir.datapath.errors import LayoutMismatch

K = TypeVar("K")
V = TypeVar("V")
Row = tuple[Any, ...]


class BatchLike(Protocol):
    """What the agent's walks need of a batch; tests have one in memory."""

    def __len__(self) -> int: ...
    def rows(self) -> Iterable[Row]: ...
    def delete(self, picked: Sequence[int]) -> int: ...


class Columns:
    """Some members of a struct, in its order."""

    def __init__(self, leaves: Sequence[Leaf], size: int, paths: Sequence[str]) -> None:
        found = [leaf for leaf in leaves if leaf.path in paths]
        if [leaf.path for leaf in found] != list(paths):
            known = ", ".join(leaf.path for leaf in leaves)
            raise LayoutMismatch("view", ", ".join(paths), 0, f"members are {known}, in order")
        self._structs = [
            struct.Struct(layout_of(run, size, ">" if big else "<")) for big, run in _runs(found)
        ]
        last = found[-1] if found else None
        self.span = range(found[0].offset, last.offset + last.size) if last else range(0)

    def __bool__(self) -> bool:
        return bool(self._structs)

    def rows(self, data: bytes) -> Iterable[Row]:
        parts: list[Iterable[Row]] = [part.iter_unpack(data) for part in self._structs]
        return joined(parts)


def joined(parts: Sequence[Iterable[Row]]) -> Iterable[Row]:
    """Rows side by side."""
    return reduce(lambda left, right: map(operator.add, left, right), parts)


def _runs(leaves: Iterable[Leaf]) -> list[tuple[bool, list[Leaf]]]:
    """A Struct has one byte order: neighbours of the same order, or of none, go together."""
    runs: list[tuple[bool | None, list[Leaf]]] = []
    for leaf in leaves:
        order = None if leaf.size == 1 or leaf.form.endswith("s") else leaf.big
        if runs and (order is None or runs[-1][0] in {None, order}):
            before, run = runs[-1]
            runs[-1] = (order if before is None else before, [*run, leaf])
        else:
            runs.append((order, [leaf]))
    return [(bool(order), run) for order, run in runs]


class Batch(Generic[K, V]):
    """Entries as they were read."""

    def __init__(self, view: View[K, V], keys: bytes, values: bytes) -> None:
        self._view = view
        self._keys = keys
        self._values = values

    def __len__(self) -> int:
        return len(self._keys) // self._view.keys.size

    def rows(self) -> Iterable[Row]:
        """The view's members of each entry: those of the key, then those of the value."""
        view = self._view
        parts = []
        if view.key_columns:
            parts.append(view.key_columns.rows(self._keys))
        if view.value_columns:
            parts.append(view.value_columns.rows(self._values))
        return joined(parts)

    def records(self) -> Iterator[tuple[K, V]]:
        """The entries in full."""
        keys = self._view.keys.decode_all(self._keys)
        return zip(keys, self._view.values.decode_all(self._values), strict=True)

    def delete(self, picked: Sequence[int]) -> int:
        """Deletes these entries unless they changed in the members that the view watches. Returns
        how many it deleted."""
        view = self._view
        packed, values = (
            b"".join([data[at * size : (at + 1) * size] for at in picked])
            for data, size in (
                (self._keys, view.keys.size),
                (self._values, view.values.size),
            )
        )
        span = view.watched.span
        done, number = libbpf.delete_unchanged(
            view.fd, packed, view.keys.size, values, view.values.size, span
        )
        if number:
            raise libbpf.failure("delete from", view.name, number)
        return done


class View(Generic[K, V]):
    """`watched`: members of the value, next to each other, that must not change meanwhile."""

    def __init__(
        self,
        name: str,
        fd: int,
        chunk: int,
        keys: Codec[K],
        values: Codec[V],
        members: tuple[Sequence[str], Sequence[str], Sequence[str]],
    ) -> None:
        self.name = name
        self.fd = fd
        self.keys = keys
        self.values = values
        of_key, of_value, watched = members
        self.key_columns = Columns(keys.leaves, keys.size, of_key)
        self.value_columns = Columns(values.leaves, values.size, of_value)
        self.watched = Columns(values.leaves, values.size, watched)
        self._chunk = chunk

    def batches(self) -> Iterator[Batch[K, V]]:
        """All entries, read as the iteration goes: no snapshot."""
        for keys, values in libbpf.walk(self.fd, self.keys.size, self.values.size, self._chunk):
            yield Batch(self, keys, values)
