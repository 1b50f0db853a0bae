# SPDX-License-Identifier: Apache-2.0
"""Rows of `blocked`: the prefixes of all BlockLists, each with the number of one that has it.

A list's number comes of its name, so that a restart moves no row. Two names with one number only
make events name both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from weir.agent.rows import Rows
from weir.api.address import Cidr
from weir.datapath import records


class BlockTable:
    def __init__(self) -> None:
        self.rows: Rows[records.PrefixKey, records.Blocked] = Rows("blocked")
        self._lists: dict[str, frozenset[records.PrefixKey]] = {}
        self._numbers: dict[int, set[str]] = {}

    def set_list(self, name: str, cidrs: Iterable[Cidr]) -> None:
        old = self._lists.get(name, frozenset())
        new = frozenset(records.PrefixKey(cidr.bits, cidr.address) for cidr in cidrs)
        number = number_of(name)
        self._numbers.setdefault(number, set()).add(name)
        self._lists[name] = new
        row = records.Blocked(number)
        for key in new - old:
            if self.rows.get(key) is None:
                self.rows.put(key, row)
        self._release(old - new, number)

    def remove_list(self, name: str) -> None:
        old = self._lists.pop(name, None)
        if old is None:
            return
        number = number_of(name)
        self._numbers[number].discard(name)
        if not self._numbers[number]:
            del self._numbers[number]
        self._release(old, number)

    def _release(self, keys: Iterable[records.PrefixKey], number: int) -> None:
        """Rows that bear a list's number go to another list that has the prefix, or away."""
        for key in keys:
            row = self.rows.get(key)
            if row is None or row.rule != number:
                continue
            heir = next((name for name, others in self._lists.items() if key in others), None)
            self.rows.set(key, None if heir is None else records.Blocked(number_of(heir)))

    def names(self, number: int) -> tuple[str, ...]:
        return tuple(sorted(self._numbers.get(number, ())))

    def owner(self, key: records.PrefixKey) -> str:
        row = self.rows.get(key)
        names = self.names(row.rule) if row is not None else ()
        return " or ".join(f"BlockList {name}" for name in names) or "a BlockList"


def number_of(name: str) -> int:
    return zlib.crc32(name.encode())
