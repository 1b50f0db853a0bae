# SPDX-License-Identifier: Apache-2.0
"""From objects to resources: pure, incremental, without clock or I/O.

Each method takes one object's new state (None: it is gone); `flush` gives the resources that
changed since the last. Policies' selectors are counted and numbered here; who they select is
`matching` for pods and `prefixes` for ipBlocks; `classes` makes classes of both.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from weir.api.address import Addr, Cidr, is_ipv4
from weir.operator import resources
from weir.operator.classes import Cell, Classes, Content, Space
from weir.operator.matching import Group, Matcher
from weir.operator.objects import EndpointSlice, Key, Namespace, Node, Pod
from weir.operator.policy import NetworkPolicy
from weir.operator.prefixes import Changes, Prefix, PrefixTree, SortedInts
from weir.operator.resources import Change
from weir.operator.selectors import IpBlock, Selector
from weir.operator.services import Service

UNSENT = -1
# What cells hold: a pod's address, a pod by uid (its labels alone), an ipBlock's prefix.
Member = Addr | str | Cidr


@dataclass(frozen=True, slots=True)
class Announced:
    """What a node's agent says of a pod there: the addresses that it gave it."""

    node: str
    addresses: tuple[Addr, ...]


@dataclass(slots=True, eq=False)
class _Placed:
    """A pod, and where it is in the compiler's state. No group: nowhere."""

    pod: Pod
    group: Group | None = None
    addresses: tuple[Addr, ...] = ()
    announced: bool = False

    def rank(self) -> tuple[bool, str, str]:
        """Who keeps an address that two pods claim: the one announced, else the younger."""
        return (self.announced, self.pod.created, self.pod.uid)


@dataclass(slots=True)
class _Numbered:
    number: int
    uses: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """An announcement that was not taken, and why."""

    node: str
    pod: str
    reason: str


@dataclass(slots=True)
class _Dirty:
    """What `flush` has to look at."""

    groups: set[Group] = field(default_factory=set)
    prefixes: set[Prefix] = field(default_factory=set)
    emptied: set[Group] = field(default_factory=set)
    # With the class number that was sent last (UNSENT: send in any case), and pods' nodes.
    members: dict[object, int] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)


class Compiler:
    """All state, from all objects, to resources."""

    def __init__(self) -> None:
        self._matcher = Matcher()
        self._tree = PrefixTree()
        self._classes: Classes[object] = Classes()
        self._selectors: dict[Selector, _Numbered] = {}
        self._last_selector = 0
        self._policies: dict[Key, NetworkPolicy] = {}
        self._used_ports: Counter[tuple[str, int]] = Counter()
        self._nodes: dict[str, Node] = {}
        self._pods: dict[Key, _Placed] = {}
        self._by_uid: dict[str, _Placed] = {}
        self._in_namespace: dict[str, dict[Key, None]] = defaultdict(dict)
        self._announced: dict[str, Announced] = {}
        self._claims: dict[Addr, list[_Placed]] = {}
        self._addresses = SortedInts()
        self._cells: dict[object, Cell[object]] = {}
        self._prefix_cells: dict[Prefix, Cell[object]] = {}
        self._groups_at: dict[Prefix | Space, set[Group]] = defaultdict(set)
        self._dirty = _Dirty()
        self._out: dict[str, Change] = {}
        self.refusals: list[Refusal] = []

    # Services, slices, nodes and namespaces

    def service(self, key: Key, new: Service | None) -> None:
        """None also for one that nodes are not to serve."""
        if new is not None and not (new.cluster_ips and new.ports):
            new = None
        self._emit(resources.service(key, new))

    def slice(self, key: Key, new: EndpointSlice | None) -> None:
        if new is not None and not (new.service and new.served):
            new = None
        self._emit(resources.endpoint_slice(key, new))

    def node(self, key: Key, new: Node | None) -> None:
        old = self._nodes.pop(key.name, None)
        if new is not None:
            self._nodes[key.name] = new
        self._emit(resources.node(key, new))
        if (old.pod_cidrs if old else ()) != (new.pod_cidrs if new else ()):
            for uid, announced in list(self._announced.items()):
                if announced.node == key.name and uid in self._by_uid:
                    self._place(self._by_uid[uid])

    def namespace(self, key: Key, new: Namespace | None) -> None:
        known = self._matcher.knows(key.name)
        if new is None:
            # Its pods cannot be told by namespace labels any more: they are nowhere. Their groups
            # live on until `flush`, and may be filled again before.
            self._dirty.groups.update(self._matcher.set_namespace(key.name, None))
            for pod in list(self._in_namespace.get(key.name, ())):
                self._place(self._pods[pod])
            return
        self._dirty.groups.update(self._matcher.set_namespace(key.name, new.labels))
        if not known:
            for pod in list(self._in_namespace.get(key.name, ())):
                self._place(self._pods[pod])

    # Pods

    def pod(self, key: Key, new: Pod | None) -> None:
        placed = self._pods.get(key)
        if placed is not None and (new is None or new.uid != placed.pod.uid):
            self._withdraw(placed)
            del self._pods[key]
            del self._in_namespace[key.namespace][key]
            del self._by_uid[placed.pod.uid]
            self._announced.pop(placed.pod.uid, None)
            placed = None
        if new is None:
            return
        if placed is None:
            placed = self._pods[key] = _Placed(new)
            self._in_namespace[key.namespace][key] = None
            self._by_uid[new.uid] = placed
        elif placed.pod == new:
            return
        placed.pod = new
        self._place(placed)

    def announce(self, node: str, uid: str, addresses: tuple[Addr, ...] | None) -> None:
        """A node's agent gave a pod these addresses; None: it took them back."""
        known = self._announced.get(uid)
        if addresses is None:
            if known is None or known.node != node:
                return
            del self._announced[uid]
        else:
            placed = self._by_uid.get(uid)
            if known is not None and known.node != node:
                if placed is None or placed.pod.node != node:
                    self._refuse(node, uid, f"announced by {known.node} already")
                    return
            elif known == Announced(node, addresses):
                return
            self._announced[uid] = Announced(node, addresses)
        if uid in self._by_uid:
            self._place(self._by_uid[uid])

    def announced_by(self, node: str) -> list[str]:
        return [uid for uid, announced in self._announced.items() if announced.node == node]

    def _effective(self, pod: Pod) -> tuple[tuple[Addr, ...], bool]:
        """A pod's addresses, and whether they are as announced; what an agent may not say is
        refused, and then the pod's status holds."""
        announced = self._announced.get(pod.uid)
        if announced is None:
            return pod.addresses, False
        if announced.node != pod.node:
            self._refuse(announced.node, str(pod.key), f"the pod is on {pod.node or 'no node'}")
            return pod.addresses, False
        node = self._nodes.get(pod.node)
        cidrs = node.pod_cidrs if node else ()
        for addr in announced.addresses:
            if not any(cidr.contains(addr) for cidr in cidrs):
                self._refuse(
                    announced.node,
                    str(pod.key),
                    f"{resources.text(addr)} is not in the node's pod CIDRs",
                )
                return pod.addresses, False
        return announced.addresses, True

    def _refuse(self, node: str, pod: str, reason: str) -> None:
        self.refusals.append(Refusal(node, pod, reason))

    def _place(self, placed: _Placed) -> None:
        """Bring a pod's group, its addresses and its node's resource in line with its state."""
        pod = placed.pod
        if not (pod.live and pod.node and self._matcher.knows(pod.key.namespace)):
            self._withdraw(placed)
            return
        addresses, announced = self._effective(pod)
        old_group = placed.group
        group = self._matcher.group(pod.key.namespace, pod.labels, pod.ports)
        if old_group is not group:
            group.pods += 1
            placed.group = group
            if old_group is not None:
                self._leave(old_group)
        self._move(pod.uid, group, Space.PODS)
        self._tell_pod(pod)
        gone = [addr for addr in placed.addresses if addr not in addresses]
        placed.addresses = addresses
        placed.announced = announced
        for addr in gone:
            self._unclaim(addr, placed)
        for addr in addresses:
            claims = self._claims.setdefault(addr, [])
            if placed not in claims:
                claims.append(placed)
            self._settle_claim(addr)

    def _withdraw(self, placed: _Placed) -> None:
        if placed.group is None:
            return
        for addr in placed.addresses:
            self._unclaim(addr, placed)
        placed.addresses = ()
        self._move(placed.pod.uid, None, Space.PODS)
        self._tell_pod(placed.pod)
        self._leave(placed.group)
        placed.group = None

    def _tell_pod(self, pod: Pod) -> None:
        self._dirty.members[pod.uid] = UNSENT
        self._dirty.nodes[pod.uid] = pod.node

    def _leave(self, group: Group) -> None:
        group.pods -= 1
        self._dirty.emptied.add(group)

    def _unclaim(self, addr: Addr, placed: _Placed) -> None:
        claims = self._claims[addr]
        claims.remove(placed)
        if claims:
            self._settle_claim(addr)
            return
        del self._claims[addr]
        self._addresses.discard(int.from_bytes(addr, "big"))
        self._move(addr, None, _space(addr))
        self._dirty.members[addr] = UNSENT

    def _settle_claim(self, addr: Addr) -> None:
        claims = self._claims[addr]
        if len(claims) > 1:
            claims.sort(key=_Placed.rank, reverse=True)
        self._addresses.add(int.from_bytes(addr, "big"))
        self._locate(addr)
        self._dirty.members[addr] = UNSENT  # its owner may be another

    def _locate(self, addr: Addr) -> None:
        """Bring an address to the cell of its longest prefix."""
        prefix = self._tree.lookup(int.from_bytes(addr, "big"))
        self._move(addr, self._claims[addr][0].group, prefix or _space(addr))

    def _move(self, member: Member, group: Group | None, at: Prefix | Space) -> None:
        """Into the cell of a group and a place, out of the one it is in; no group: only out."""
        old = self._cells.get(member)
        new: Cell[object] | None = None
        if group is not None:
            new = group.cells.get(at)
            if new is None:
                new = group.cells[at] = Cell(self._content(group, at))
                self._groups_at[at].add(group)
        self._dirty.members.setdefault(member, old.number if old else UNSENT)
        if old is not None and old is not new:
            self._classes.discard(old, member)
            del self._cells[member]
        if new is not None:
            self._classes.add(new, member)
            self._cells[member] = new

    # Policies

    def policy(self, key: Key, new: NetworkPolicy | None) -> None:
        old = self._policies.pop(key, None)
        if new is not None:
            self._policies[key] = new
            # The new one's selectors before the old one's go, so that common ones keep numbers.
            for selector in _selectors(new):
                self._acquire(selector)
            for used in _port_names(new):
                self._used_ports[used] += 1
                if self._used_ports[used] == 1:
                    self._dirty.groups.update(self._matcher.with_port(*used))
        self._emit(resources.policy(key, new, self._number))
        if old is None:
            return
        for selector in _selectors(old):
            self._release(selector)
        for used in _port_names(old):
            self._used_ports[used] -= 1
            if not self._used_ports[used]:
                del self._used_ports[used]
                self._dirty.groups.update(self._matcher.with_port(*used))

    def _number(self, selector: Selector) -> int:
        return self._selectors[selector].number

    def _acquire(self, selector: Selector) -> None:
        entry = self._selectors.get(selector)
        if entry is None:
            self._last_selector += 1
            entry = self._selectors[selector] = _Numbered(self._last_selector)
            self._emit(resources.selector(entry.number, selector))
            if isinstance(selector, IpBlock):
                self._follow(self._tree.add(entry.number, selector))
            else:
                self._dirty.groups.update(self._matcher.add(entry.number, selector))
        entry.uses += 1

    def _release(self, selector: Selector) -> None:
        entry = self._selectors[selector]
        entry.uses -= 1
        if entry.uses:
            return
        del self._selectors[selector]
        self._emit(resources.selector(entry.number, None))
        if isinstance(selector, IpBlock):
            self._follow(self._tree.remove(entry.number, selector))
        else:
            self._dirty.groups.update(self._matcher.remove(entry.number, selector))

    def _follow(self, changes: Changes) -> None:
        """Addresses go to the prefix that is now their longest."""
        self._dirty.prefixes.update(changes.touched)
        for prefix in changes.added:
            cell = self._prefix_cells[prefix] = Cell(self._prefix_content(prefix))
            self._cells[prefix.cidr] = cell
            self._classes.add(cell, prefix.cidr)
            self._dirty.members[prefix.cidr] = UNSENT
        for prefix in changes.removed:
            self._classes.discard(self._prefix_cells.pop(prefix), prefix.cidr)
            del self._cells[prefix.cidr]
            self._dirty.members[prefix.cidr] = UNSENT
        for prefix in sorted(changes.added, key=lambda prefix: prefix.cidr.bits):
            self._fill(prefix)
        for prefix in changes.removed:
            self._clear(prefix)
            self._dirty.prefixes.discard(prefix)

    def _home(self, prefix: Prefix) -> Prefix | Space:
        """Where addresses in a prefix are that are in no longer one than this one's parent."""
        parent = self._tree.parent(prefix)
        space = _space(prefix.cidr.address)
        return parent if parent is not None and _space(parent.cidr.address) is space else space

    def _fill(self, prefix: Prefix) -> None:
        """Take to a new prefix what is in it, by whole cells if that is most of its parent."""
        inside = self._addresses.between(prefix.first, prefix.last)
        if len(inside) * 2 < len(self._claims):
            for number in inside:
                self._locate(Addr(number.to_bytes(16, "big")))
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
                    self._locate(Addr(addr))

    def _clear(self, prefix: Prefix) -> None:
        """Take what is in a removed prefix to its parent."""
        home = self._home(prefix)
        for group in list(self._groups_at.get(prefix, ())):
            if home not in group.cells:
                self._rename(group, prefix, home)
            else:
                for addr in list(group.cells[prefix].members):
                    if isinstance(addr, bytes):
                        self._locate(Addr(addr))
                self._dirty.emptied.add(group)

    def _rename(self, group: Group, old: Prefix | Space, new: Prefix | Space) -> None:
        """A cell's place, without touching its members."""
        cell = group.cells[new] = group.cells.pop(old)
        self._groups_at[old].discard(group)
        if not self._groups_at[old]:
            del self._groups_at[old]
        self._groups_at[new].add(group)
        cell.content = self._content(group, new)
        self._classes.touch(cell)

    # Contents and output

    def _content(self, group: Group, at: Prefix | Space) -> Content:
        used = self._used_ports
        ports = frozenset(p for p in group.ports if (p.name, p.protocol) in used)
        if isinstance(at, Space):
            return Content(at, frozenset(group.selectors), ports)
        return Content(_space(at.cidr.address), frozenset(group.selectors | at.blocks), ports)

    def _prefix_content(self, prefix: Prefix) -> Content:
        space = _space(prefix.cidr.address)
        return Content(space, frozenset(prefix.blocks), frozenset())

    def flush(self) -> list[Change]:
        """What changed since the last flush. Later ones may refer to earlier ones, never back."""
        dirty, self._dirty = self._dirty, _Dirty()
        for prefix in dirty.prefixes:
            own = self._prefix_cells[prefix]
            own.content = self._prefix_content(prefix)
            self._classes.touch(own)
            dirty.groups.update(self._groups_at.get(prefix, ()))
        for group in dirty.groups:
            for at, cell in group.cells.items():
                cell.content = self._content(group, at)
                self._classes.touch(cell)
        settled = self._classes.settle()
        changes = list(self._out.values())
        self._out = {}
        changes += [resources.policy_class(n, content) for n, content in settled.changed.items()]
        changes += self._members(dirty, settled.moved)
        changes += [resources.policy_class(n, None) for n in settled.removed]
        self._sweep(dirty.emptied)
        return changes

    def _members(self, dirty: _Dirty, moved: Iterable[object]) -> Iterable[Change]:
        for member in {**dict.fromkeys(moved), **dirty.members}:
            cell = self._cells.get(member)
            number = cell.number if cell else None
            if number is not None and dirty.members.get(member, UNSENT) == number:
                continue  # it went to another cell of its class
            if isinstance(member, str):
                placed = self._by_uid.get(member)
                where = placed.pod.node if placed else dirty.nodes.get(member, "")
                yield resources.pod(member, where, placed.pod if placed else None, number)
            elif isinstance(member, Cidr):
                yield resources.prefix(member, number)
            elif isinstance(member, bytes):
                claims = self._claims.get(Addr(member))
                yield resources.address(Addr(member), claims[0].pod.key if claims else None, number)

    def _sweep(self, groups: Iterable[Group]) -> None:
        """Drop what has no pods left; only now, so that a class that refills keeps its number."""
        for group in groups:
            for place in [at for at, cell in group.cells.items() if not cell.members]:
                del group.cells[place]
                self._groups_at[place].discard(group)
                if not self._groups_at[place]:
                    del self._groups_at[place]
            if not group.pods:
                self._matcher.drop(group)

    def _emit(self, change: Change) -> None:
        self._out.pop(change.name, None)
        self._out[change.name] = change

    def counts(self) -> dict[str, int]:
        """For metrics."""
        return {
            "classes": len(self._classes),
            "selectors": len(self._selectors),
            "groups": len(self._matcher),
            "policies": len(self._policies),
            "pods": len(self._pods),
            "addresses": len(self._claims),
            "prefixes": len(self._prefix_cells),
            "announced": len(self._announced),
        }


def _space(addr: Addr) -> Space:
    return Space.IPV4 if is_ipv4(addr) else Space.IPV6


def _selectors(policy: NetworkPolicy) -> list[Selector]:
    peers = [peer for rule in policy.rules for peer in rule.peers or ()]
    return [policy.subject, *peers]


def _port_names(policy: NetworkPolicy) -> list[tuple[str, int]]:
    return [(p.name, p.protocol) for rule in policy.rules for p in rule.ports if p.name]
