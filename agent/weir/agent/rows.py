# SPDX-License-Identifier: Apache-2.0
"""Desired rows of one map, with what changed since the last plan.

`changed` remembers the row that a key had at the last `take`, so that a plan sees old and new.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
K_key = TypeVar("K_key", bound=Hashable)
V_co = TypeVar("V_co", covariant=True)


class Change(NamedTuple, Generic[V]):
    """A row before and after; None: no row."""

    old: V | None
    new: V | None


class RowsLike(Protocol[K_key, V_co]):
    """What the reconciler and the views need of a map's desired rows."""

    name: str

    def __len__(self) -> int: ...

    @property
    def rows(self) -> Mapping[K_key, V_co]: ...


class Rows(Generic[K, V]):
    def __init__(self, name: str) -> None:
        self.name = name
        self._rows: dict[K, V] = {}
        self._changed: dict[K, V | None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Mapping[K, V]:
        return self._rows

    def get(self, key: K) -> V | None:
        return self._rows.get(key)

    def put(self, key: K, row: V) -> None:
        old = self._rows.get(key)
        if old == row:
            return
        self._changed.setdefault(key, old)
        self._rows[key] = row

    def drop(self, key: K) -> None:
        old = self._rows.pop(key, None)
        if old is not None:
            self._changed.setdefault(key, old)

    def set(self, key: K, row: V | None) -> None:
        if row is None:
            self.drop(key)
        else:
            self.put(key, row)

    @property
    def dirty(self) -> bool:
        return bool(self._changed)

    def take(self) -> dict[K, Change[V]]:
        """What changed since the last call, without what changed back."""
        changed, self._changed = self._changed, {}
        rows = self._rows
        changes = {key: Change(old, rows.get(key)) for key, old in changed.items()}
        unchanged = [key for key, change in changes.items() if change.old == change.new]
        for key in unchanged:
            del changes[key]
        return changes
