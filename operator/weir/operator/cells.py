# SPDX-License-Identifier: Apache-2.0
"""In which cell each member is: pods by their labels alone, pods' addresses, ipBlocks' prefixes and
nodes; and what the next flush has to look at.

A pod's address is in the cell of its pod's group and of the longest prefix that contains it, so a
prefix that comes or goes takes addresses with it (`follow`): by whole cells where it can, one by
one where it must.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from weir.api.address import Addr, Cidr, is_ipv4
from weir.operator.classes import Cell, Classes, Content, Settled, Space
from weir.operator.matching import Group, Matcher
from weir.operator.objects import Key
from weir.operator.prefixes import Changes, Prefix, PrefixTree, SortedInts
from weir.operator.selectors import IpBlock

UNSENT = -1
# A pod's address, a pod by uid (its labels alone), an ipBlock's prefix, a node.
Member = Addr | str | Cidr | Key


@dataclass(slots=True)
class Dirty:
    """What a flush has to look at."""

    groups: set[Group] = field(default_factory=set)
    prefixes: set[Prefix] = field(default_factory=set)
    emptied: set[Group] = field(default_factory=set)
    # With the class number that was sent last (UNSENT: send in any case), and pods' nodes.
    members: dict[object, int] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)


class Cells:
    """`group_of`: of the pod that has an address. `addresses`: all that a pod has."""

    def __init__(self, matcher: Matcher, group_of: Callable[[Addr], Group | None]) -> None:
        self._matcher = matcher
        self._group_of = group_of
        self.addresses = SortedInts()
        self.ports: Counter[tuple[str, int]] = Counter()  # the named ones that policies use
        self.classes: Classes[object] = Classes()
        self.dirty = Dirty()
        self._tree = PrefixTree()
        self._cells: dict[object, Cell[object]] = {}
        self._prefix_cells: dict[Prefix, Cell[object]] = {}
        self._groups_at: dict[Prefix | Space, set[Group]] = defaultdict(set)

    @property
    def prefixes(self) -> int:
        return len(self._prefix_cells)

    def number(self, member: object) -> int | None:
        """Of the class that a member is in since it was last settled; None: in none."""
        cell = self._cells.get(member)
        return cell.number if cell is not None else None

    def cell(self, member: Member) -> Cell[object] | None:
        return self._cells.get(member)

    def put(self, member: Member, new: Cell[object] | None) -> None:
        """Into a cell, out of the one it is in; None: only out."""
        old = self._cells.get(member)
        self.dirty.members.setdefault(member, old.number if old else UNSENT)
        if old is not None and old is not new:
            self.classes.discard(old, member)
            del self._cells[member]
        if new is not None:
            self.classes.add(new, member)
            self._cells[member] = new

    # Pods and their addresses

    def put_pod(self, uid: str, group: Group | None) -> None:
        self._move(uid, group, Space.PODS)

    def locate(self, addr: Addr) -> None:
        """Bring a pod's address to the cell of its longest prefix, or nobody's out of its cell."""
        group = self._group_of(addr)
        if group is None:
            self._move(addr, None, space_of(addr))
        else:
            prefix = self._tree.lookup(int.from_bytes(addr, "big"))
            self._move(addr, group, prefix or space_of(addr))

    def _move(self, member: Member, group: Group | None, at: Prefix | Space) -> None:
        new: Cell[object] | None = None
        if group is not None:
            new = group.cells.get(at)
            if new is None:
                new = group.cells[at] = Cell(self._content(group, at))
                self._groups_at[at].add(group)
        self.put(member, new)

    # Prefixes

    def add_block(self, number: int, block: IpBlock) -> None:
        self._follow(self._tree.add(number, block))

    def remove_block(self, number: int, block: IpBlock) -> None:
        self._follow(self._tree.remove(number, block))

    def _follow(self, changes: Changes) -> None:
        """Addresses go to the prefix that is now their longest."""
        self.dirty.prefixes.update(changes.touched)
        for prefix in changes.added:
            cell = self._prefix_cells[prefix] = Cell(self._prefix_content(prefix))
            self._cells[prefix.cidr] = cell
            self.classes.add(cell, prefix.cidr)
            self.dirty.members[prefix.cidr] = UNSENT
        for prefix in changes.removed:
            self.classes.discard(self._prefix_cells.pop(prefix), prefix.cidr)
            del self._cells[prefix.cidr]
            self.dirty.members[prefix.cidr] = UNSENT
        for prefix in sorted(changes.added, key=lambda prefix: prefix.cidr.bits):
            self._fill(prefix)
        for prefix in changes.removed:
            self._clear(prefix)
            self.dirty.prefixes.discard(prefix)

    def _home(self, prefix: Prefix) -> Prefix | Space:
        """Where addresses in a prefix are that are in no longer one than this one's parent."""
        parent = self._tree.parent(prefix)
        space = space_of(prefix.cidr.address)
        return parent if parent is not None and space_of(parent.cidr.address) is space else space

    def _fill(self, prefix: Prefix) -> None:
        """Take to a new prefix what is in it, by whole cells if that is most of its parent."""
        inside = self.addresses.between(prefix.first, prefix.last)
        if len(inside) * 2 < len(self.addresses):
            for number in inside:
                self.locate(Addr(number.to_bytes(16, "big")))
            return
        home = self._home(prefix)
        first, last = (Addr(n.to_bytes(16, "big")) for n in (prefix.first, prefix.last))
        for group in list(self._groups_at.get(home, ())):
            cell = group.cells[home]
            found = [a for a in cell.members if isinstance(a, bytes) and first <= a <= last]
            if len(found) == len(cell.members):
                self._rename(group, home, prefix)
            else:
                for addr in found:
                    self.locate(Addr(addr))

    def _clear(self, prefix: Prefix) -> None:
        """Take what is in a removed prefix to its parent."""
        home = self._home(prefix)
        for group in list(self._groups_at.get(prefix, ())):
            if home not in group.cells:
                self._rename(group, prefix, home)
            else:
                for addr in list(group.cells[prefix].members):
                    if isinstance(addr, bytes):
                        self.locate(Addr(addr))
                self.dirty.emptied.add(group)

    def _rename(self, group: Group, old: Prefix | Space, new: Prefix | Space) -> None:
        """A cell's place, without touching its members."""
        cell = group.cells[new] = group.cells.pop(old)
        self._groups_at[old].discard(group)
        if not self._groups_at[old]:
            del self._groups_at[old]
        self._groups_at[new].add(group)
        cell.content = self._content(group, new)
        self.classes.touch(cell)

    # Named ports

    def use_port(self, name: str, protocol: int) -> None:
        self.ports[name, protocol] += 1
        if self.ports[name, protocol] == 1:
            self.dirty.groups.update(self._matcher.with_port(name, protocol))

    def leave_port(self, name: str, protocol: int) -> None:
        self.ports[name, protocol] -= 1
        if not self.ports[name, protocol]:
            del self.ports[name, protocol]
            self.dirty.groups.update(self._matcher.with_port(name, protocol))

    # Contents and classes

    def _content(self, group: Group, at: Prefix | Space) -> Content:
        ports = frozenset(p for p in group.ports if (p.name, p.protocol) in self.ports)
        if isinstance(at, Space):
            return Content(at, frozenset(group.selectors), ports)
        return Content(space_of(at.cidr.address), frozenset(group.selectors | at.blocks), ports)

    def _prefix_content(self, prefix: Prefix) -> Content:
        return Content(space_of(prefix.cidr.address), frozenset(prefix.blocks), frozenset())

    def settle(self) -> tuple[Dirty, Settled[object]]:
        """Bring classes in line with all that was dirty, and begin anew."""
        dirty, self.dirty = self.dirty, Dirty()
        for prefix in dirty.prefixes:
            own = self._prefix_cells[prefix]
            own.content = self._prefix_content(prefix)
            self.classes.touch(own)
            dirty.groups.update(self._groups_at.get(prefix, ()))
        for group in dirty.groups:
            for at, cell in group.cells.items():
                cell.content = self._content(group, at)
                self.classes.touch(cell)
        return dirty, self.classes.settle()

    def sweep(self, groups: Iterable[Group]) -> None:
        """Drop what has no pods left; only when all is settled, so that a class that refills keeps
        its number."""
        for group in groups:
            for place in [at for at, cell in group.cells.items() if not cell.members]:
                del group.cells[place]
                self._groups_at[place].discard(group)
                if not self._groups_at[place]:
                    del self._groups_at[place]
            if not group.pods:
                self._matcher.drop(group)


def space_of(addr: Addr) -> Space:
    return Space.IPV4 if is_ipv4(addr) else Space.IPV6
