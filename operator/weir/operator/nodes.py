# SPDX-License-Identifier: Apache-2.0
"""Nodes, and which selectors of nodes select them.

There are few such selectors, and every node's labels are its own, so each node has a cell to
itself and is matched against each selector. A node that none selects is in no class: where no
policy names nodes, their labels cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from weir.api.address import Cidr
from weir.operator.cells import UNSENT, Cells
from weir.operator.classes import Cell, Content, Space
from weir.operator.objects import Key, Node
from weir.operator.selectors import Nodes as NodeSelector


class Nodes:
    """All of them, by name."""

    def __init__(self) -> None:
        self.known: dict[str, Node] = {}
        self._selectors: dict[int, NodeSelector] = {}

    def cidrs(self, name: str) -> tuple[Cidr, ...]:
        node = self.known.get(name)
        return node.pod_cidrs if node is not None else ()

    def change(self, key: Key, new: Node | None, cells: Cells) -> None:
        self.known.pop(key.name, None)
        if new is not None:
            self.known[key.name] = new
        self._match([key], cells)
        cells.dirty.members[key] = UNSENT

    def add(self, number: int, selector: NodeSelector, cells: Cells) -> None:
        self._selectors[number] = selector
        self._match([node.key for node in self.known.values()], cells)

    def remove(self, number: int, cells: Cells) -> None:
        del self._selectors[number]
        self._match([node.key for node in self.known.values()], cells)

    def _match(self, nodes: Iterable[Key], cells: Cells) -> None:
        for key in nodes:
            node = self.known.get(key.name)
            labels = dict(node.labels) if node is not None else {}
            numbers = frozenset(
                number
                for number, selector in self._selectors.items()
                if node is not None and selector.labels.matches(labels)
            )
            content = Content(Space.NODES, numbers, frozenset())
            cell = cells.cell(key)
            if not numbers:
                if cell is not None:
                    cells.put(key, None)
            elif cell is None:
                cells.put(key, Cell(content))
            elif cell.content != content:
                cell.content = content
                cells.classes.touch(cell)
