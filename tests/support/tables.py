# SPDX-License-Identifier: Apache-2.0
"""A table in memory with the kernel tables' Protocol, and with faults by script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from weir.datapath.errors import TableFull
from weir.datapath.table import TableLike

K = TypeVar("K")
V = TypeVar("V")


class FakeTable(TableLike[K, V]):
    """`fail_at(n, error)`: the n-th operation from now (1: the next) raises; it changes
    nothing. `log` has every update and delete as (operation, key), in order."""

    def __init__(self, name: str = "fake", max_entries: int = 1 << 30) -> None:
        self.name = name
        self.max_entries = max_entries
        self.rows: dict[K, V] = {}
        self.log: list[tuple[str, K]] = []
        self._faults: dict[int, Exception] = {}
        self._operations = 0

    def fail_at(self, operation: int, error: Exception) -> None:
        self._faults[self._operations + operation] = error

    def _operation(self) -> None:
        self._operations += 1
        fault = self._faults.pop(self._operations, None)
        if fault is not None:
            raise fault

    def items(self) -> Iterator[tuple[K, V]]:
        self._operation()
        yield from list(self.rows.items())

    def get(self, key: K) -> V | None:
        self._operation()
        return self.rows.get(key)

    def update(self, rows: Mapping[K, V]) -> None:
        self._operation()
        for key, value in rows.items():
            if key not in self.rows and len(self.rows) >= self.max_entries:
                raise TableFull(self.name, self.max_entries, 7)
            self.log.append(("update", key))
            self.rows[key] = value

    def delete(self, keys: Iterable[K]) -> None:
        self._operation()
        for key in keys:
            self.log.append(("delete", key))
            self.rows.pop(key, None)
