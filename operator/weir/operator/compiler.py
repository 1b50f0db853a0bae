# SPDX-License-Identifier: Apache-2.0
"""From objects to resources: pure, incremental, without clock or I/O.

Each method takes one object's new state (None: it is gone); `flush` gives the resources that
changed since the last. Policies' selectors are counted and numbered here; who they select is
`matching` for pods, `nodes` for nodes and the tree of `prefixes` for ipBlocks; `placing` says
where pods and their addresses are, `cells` and `classes` make classes of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from weir.api.address import Addr, Cidr
from weir.operator import resources
from weir.operator.cells import UNSENT, Dirty
from weir.operator.matching import Matcher
from weir.operator.nodes import Nodes
from weir.operator.objects import EndpointSlice, Key, Namespace, Node, Pod
from weir.operator.placing import Placing, Refusal
from weir.operator.policy import NetworkPolicy
from weir.operator.resources import Change
from weir.operator.selectors import IpBlock, Pods, Selector
from weir.operator.services import Service


@dataclass(slots=True)
class _Numbered:
    number: int
    uses: int = 0


class Compiler:
    """All state, from all objects, to resources."""

    def __init__(self) -> None:
        self._matcher = Matcher()
        self.nodes = Nodes()
        self._placing = Placing(self._matcher, self.nodes.cidrs)
        self._cells = self._placing.cells
        self._selectors: dict[Selector, _Numbered] = {}
        self._last_selector = 0
        self._policies: dict[Key, NetworkPolicy] = {}
        self._audited: set[str] = set()  # namespaces
        self._out: dict[str, Change] = {}

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
        old = self.nodes.cidrs(key.name)
        self.nodes.change(key, new, self._cells)
        if old != self.nodes.cidrs(key.name):
            self._placing.cidrs_changed(key.name)

    def namespace(self, key: Key, new: Namespace | None) -> None:
        name = key.name
        known = self._matcher.knows(name)
        # Without its object, its pods cannot be told by namespace labels: they are nowhere. Their
        # groups live on until `flush`, and may be filled again before.
        labels = new.labels if new is not None else None
        self._cells.dirty.groups.update(self._matcher.set_namespace(name, labels))
        if known is not (new is not None):
            self._placing.namespace_changed(name)
        audit = new is not None and new.audit
        if audit is not (name in self._audited):
            (self._audited.add if audit else self._audited.discard)(name)
            self._placing.tell_all(name)

    # Pods

    def pod(self, key: Key, new: Pod | None) -> None:
        self._placing.pod(key, new)

    def announce(self, node: str, uid: str, addresses: tuple[Addr, ...] | None) -> None:
        """A node's agent gave a pod these addresses; None: it took them back."""
        self._placing.announce(node, uid, addresses)

    def announced_by(self, node: str) -> list[str]:
        return self._placing.announced_by(node)

    @property
    def refusals(self) -> list[Refusal]:
        """Announcements that were not taken; to be cleared by who has read them."""
        return self._placing.refusals

    # Policies

    def policy(self, key: Key, new: NetworkPolicy | None) -> None:
        """Of any tier: those of the cluster are the ones whose key has no namespace."""
        old = self._policies.get(key)
        if old == new:
            return
        self._policies.pop(key, None)
        if new is not None:
            self._policies[key] = new
            # The new one's selectors before the old one's go, so that common ones keep numbers.
            for selector in _selectors(new):
                self._acquire(selector)
            for used in _port_names(new):
                self._cells.use_port(*used)
        self._emit(resources.policy(key, new, self._number))
        if old is None:
            return
        for selector in _selectors(old):
            self._release(selector)
        for used in _port_names(old):
            self._cells.leave_port(*used)

    def _number(self, selector: Selector) -> int:
        return self._selectors[selector].number

    def _acquire(self, selector: Selector) -> None:
        entry = self._selectors.get(selector)
        if entry is None:
            self._last_selector += 1
            entry = self._selectors[selector] = _Numbered(self._last_selector)
            self._emit(resources.selector(entry.number, selector))
            match selector:
                case IpBlock():
                    self._cells.add_block(entry.number, selector)
                case Pods():
                    changed = self._matcher.add(entry.number, selector)
                    self._cells.dirty.groups.update(changed)
                case _:
                    self.nodes.add(entry.number, selector, self._cells)
        entry.uses += 1

    def _release(self, selector: Selector) -> None:
        entry = self._selectors[selector]
        entry.uses -= 1
        if entry.uses:
            return
        del self._selectors[selector]
        self._emit(resources.selector(entry.number, None))
        match selector:
            case IpBlock():
                self._cells.remove_block(entry.number, selector)
            case Pods():
                changed = self._matcher.remove(entry.number, selector)
                self._cells.dirty.groups.update(changed)
            case _:
                self.nodes.remove(entry.number, self._cells)

    # Output

    def flush(self) -> list[Change]:
        """What changed since the last flush. Later ones may refer to earlier ones, never back."""
        dirty, settled = self._cells.settle()
        changes = list(self._out.values())
        self._out = {}
        changes += [resources.policy_class(n, content) for n, content in settled.changed.items()]
        changes += self._members(dirty, settled.moved)
        changes += [resources.policy_class(n, None) for n in settled.removed]
        self._cells.sweep(dirty.emptied)
        return changes

    def _members(self, dirty: Dirty, moved: Iterable[object]) -> Iterable[Change]:
        for member in {**dict.fromkeys(moved), **dirty.members}:
            number = self._cells.number(member)
            if number is not None and dirty.members.get(member, UNSENT) == number:
                continue  # it went to another cell of its class
            if isinstance(member, str):
                pod = self._placing.by_uid(member)
                where = pod.node if pod else dirty.nodes.get(member, "")
                audit = pod is not None and pod.key.namespace in self._audited
                yield resources.pod(member, where, pod, number, audit)
            elif isinstance(member, Cidr):
                yield resources.prefix(member, number)
            elif isinstance(member, bytes):
                owner = self._placing.owner(Addr(member))
                yield resources.address(Addr(member), owner, number)
            elif isinstance(member, Key):
                yield resources.node(member, self.nodes.known.get(member.name), number)

    def _emit(self, change: Change) -> None:
        self._out.pop(change.name, None)
        self._out[change.name] = change

    def counts(self) -> dict[str, int]:
        """For metrics."""
        return {
            "classes": len(self._cells.classes),
            "selectors": len(self._selectors),
            "groups": len(self._matcher),
            "policies": len(self._policies),
            "prefixes": self._cells.prefixes,
            **self._placing.counts(),
        }


def _selectors(policy: NetworkPolicy) -> list[Selector]:
    peers = [peer for rule in policy.rules for peer in rule.peers or ()]
    return [policy.subject, *peers]


def _port_names(policy: NetworkPolicy) -> list[tuple[str, int]]:
    return [(p.name, p.protocol) for rule in policy.rules for p in rule.ports if p.name]
