# SPDX-License-Identifier: Apache-2.0
"""Policy classes: who is in one with whom, and under which number.

A *cell* is a set of members that cannot differ in content: the pods of equal labels and named
ports in one namespace, at addresses in one longest ipBlock prefix. A *class* is all cells of
equal content, so no two classes have equal content. Numbers are stateful: whatever a change
does to the contents, each number stays with the largest part that had it, so that the fewest
members move. `settle` works through the cells that changed and the classes they are or were in.
"""

from __future__ import annotations

import enum
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from weir.operator.objects import Port

M = TypeVar("M", bound=Hashable)


class Space(enum.Enum):
    """What a class is of. A class never holds members of two spaces, so that a block of all
    IPv4 addresses, say, changes the content of classes but takes none apart."""

    PODS = enum.auto()  # by uid: their labels and named ports alone
    IPV4 = enum.auto()
    IPV6 = enum.auto()
    NODES = enum.auto()  # by name: their labels alone


@dataclass(frozen=True, slots=True)
class Content:
    """What tells a class from others: its space, the selectors, and the used named ports."""

    space: Space
    selectors: frozenset[int]
    ports: frozenset[Port]


@dataclass(slots=True, eq=False)
class Cell(Generic[M]):
    """`content` is what it ought to be; the class it is in follows at `settle`."""

    content: Content
    members: set[M] = field(default_factory=set)
    number: int = 0  # 0: in no class yet


@dataclass(slots=True, eq=False)
class _Class(Generic[M]):
    content: Content
    cells: set[Cell[M]] = field(default_factory=set)
    weight: int = 0  # members in all cells


@dataclass(frozen=True, slots=True)
class Settled(Generic[M]):
    """What `settle` changed: contents by class number, classes gone, members to place anew."""

    changed: dict[int, Content]
    removed: list[int]
    moved: set[M]


class Classes(Generic[M]):
    """All cells with members, grouped to classes."""

    def __init__(self) -> None:
        self._classes: dict[int, _Class[M]] = {}
        self._by_content: dict[Content, int] = {}
        self._dirty: dict[Cell[M], None] = {}  # a set that keeps order, for equal runs
        self._moved: set[M] = set()
        self._last = 0

    def __len__(self) -> int:
        return len(self._classes)

    def items(self) -> Iterable[tuple[int, Content, int]]:
        """Number, content and members' count of each class."""
        for number, cls in self._classes.items():
            yield number, cls.content, cls.weight

    def add(self, cell: Cell[M], member: M) -> None:
        if member in cell.members:
            return
        cell.members.add(member)
        self._moved.add(member)
        if cell.number:
            self._classes[cell.number].weight += 1
        else:
            self._dirty[cell] = None

    def discard(self, cell: Cell[M], member: M) -> None:
        if member not in cell.members:
            return
        cell.members.discard(member)
        if cell.number:
            self._classes[cell.number].weight -= 1
        if not cell.members:
            self._dirty[cell] = None

    def touch(self, cell: Cell[M]) -> None:
        """The cell's content has, or may have, changed."""
        self._dirty[cell] = None

    def settle(self) -> Settled[M]:
        sources: set[int] = set()
        wanted: dict[Content, list[Cell[M]]] = defaultdict(list)
        for cell in self._dirty:
            cls = self._classes.get(cell.number)
            if cls is not None and cell.members and cell.content == cls.content:
                continue
            if cls is not None:
                cls.cells.discard(cell)
                cls.weight -= len(cell.members)
                sources.add(cell.number)
            if cell.members:
                wanted[cell.content].append(cell)
            else:
                cell.number = 0
        self._dirty.clear()
        settled = self._assign(sources, wanted)
        self._moved = set()
        return settled

    def _assign(self, sources: set[int], wanted: dict[Content, list[Cell[M]]]) -> Settled[M]:
        """Match numbers with contents, the largest common part first; the rest get new numbers."""
        involved = set(sources)
        involved.update(n for c in wanted if (n := self._by_content.get(c)) is not None)
        order: dict[Content, int] = {content: i for i, content in enumerate(wanted)}
        parts: dict[tuple[int, Content], int] = defaultdict(int)
        for number in involved:
            stayed = self._classes[number]
            if stayed.cells:
                order.setdefault(stayed.content, len(order))
                parts[number, stayed.content] += stayed.weight
        for content, cells in wanted.items():
            for cell in cells:
                if cell.number:
                    parts[cell.number, content] += len(cell.members)
        chosen: dict[Content, int] = {}
        taken: set[int] = set()
        for (number, content), _ in sorted(
            parts.items(), key=lambda item: (-item[1], item[0][0], order[item[0][1]])
        ):
            if number not in taken and content not in chosen:
                chosen[content] = number
                taken.add(number)
        before = {number: self._classes.pop(number) for number in involved}
        had = {stayed.content: number for number, stayed in before.items()}
        for content in had:
            self._by_content.pop(content, None)
        changed: dict[int, Content] = {}
        for content in order:
            number = chosen.get(content, 0)
            if not number:
                self._last += 1
                number = self._last
            old = had.get(content, 0)
            self._fill(number, content, old, before.get(old), wanted.get(content, []))
            if number not in before or before[number].content != content:
                changed[number] = content
        removed = [number for number in before if number not in self._classes]
        return Settled(changed, removed, self._moved)

    def _fill(
        self,
        number: int,
        content: Content,
        old: int,
        stayed: _Class[M] | None,
        arriving: list[Cell[M]],
    ) -> None:
        """Make class `number` of all cells with `content`: those that stayed in the class that
        had it, whose number was `old`, and those arriving."""
        made = _Class[M](content)
        moving = arriving
        if stayed is not None:
            made.cells = stayed.cells
            made.weight = stayed.weight
            if old != number:
                moving = [*arriving, *stayed.cells]
        made.cells.update(arriving)
        made.weight += sum(len(cell.members) for cell in arriving)
        for cell in moving:
            if cell.number != number:
                cell.number = number
                self._moved |= cell.members
        self._classes[number] = made
        self._by_content[content] = number
