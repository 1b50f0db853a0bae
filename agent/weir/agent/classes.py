# SPDX-License-Identifier: Apache-2.0
"""The agent's class numbers: one number for one content, kept across operators and restarts.

A number never changes its meaning. The planner relies on that: it may mix old and new rows
without changing what a number says. What released numbers meant is remembered until `reclaim`,
which is called when the kernel holds exactly the desired rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from weir.agent.resources import NamedPort

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class ClassContent:
    """What a class is: the keys of the selectors that select it, and its named ports."""

    selectors: frozenset[str]
    ports: frozenset[NamedPort]

    def __or__(self, other: ClassContent) -> ClassContent:
        return ClassContent(self.selectors | other.selectors, self.ports | other.ports)

    def __le__(self, other: ClassContent) -> bool:
        return self.selectors <= other.selectors and self.ports <= other.ports


NOTHING = ClassContent(frozenset(), frozenset())


class Numbers(Generic[K]):
    """Numbers for keys, counted by use. A number is never given out twice: 32 bits last longer
    than a node, and no row left behind by a crash can be taken for another key's."""

    def __init__(self, first: int) -> None:
        self._first = first
        self._next = first
        self._numbers: dict[K, int] = {}
        self._keys: dict[int, K] = {}
        self._uses: Counter[int] = Counter()
        self._retired: set[int] = set()
        self.version = 0

    @property
    def next(self) -> int:
        return self._next

    def acquire(self, key: K) -> int:
        number = self._numbers.get(key)
        if number is None:
            number = self._next
            self._next += 1
            self._numbers[key] = number
            self._keys[number] = key
            self.version += 1
        self._retired.discard(number)
        self._uses[number] += 1
        return number

    def release(self, number: int) -> None:
        self._uses[number] -= 1
        if self._uses[number] <= 0:
            del self._uses[number]
            self._retired.add(number)

    def reserve(self, numbers: Iterable[int]) -> None:
        """Numbers that the kernel mentions: new ones come after them."""
        self._next = max(self._next, max(numbers, default=0) + 1)

    def restore(self, known: Iterable[tuple[int, K]], following: int) -> None:
        """Take over remembered numbers, unused until acquired, and the next to give out."""
        self._next = max(self._next, following)
        for number, key in known:
            if number < self._first or number in self._keys or key in self._numbers:
                continue
            self._numbers[key] = number
            self._keys[number] = key
            self._retired.add(number)
            self._next = max(self._next, number + 1)

    def retired(self) -> frozenset[int]:
        """Released numbers, which rows in the kernel may still mention."""
        return frozenset(self._retired)

    def reclaim(self, numbers: Iterable[int]) -> None:
        """Forget released numbers that no row mentions any more."""
        for number in numbers:
            if number in self._retired:
                self._retired.remove(number)
                del self._numbers[self._keys.pop(number)]
                self.version += 1

    def key(self, number: int) -> K | None:
        return self._keys.get(number)

    def number(self, key: K) -> int | None:
        """The number of a key that is in use or not reclaimed yet."""
        return self._numbers.get(key)

    def items(self) -> list[tuple[int, K]]:
        return list(self._keys.items())
