# SPDX-License-Identifier: Apache-2.0
"""Where pods are: their groups, and which pod has which address.

An address is its pod's by the pod's status, or, earlier, by what the agent of its node announces.
Of two pods that claim one, the one whose agent announced it has it, else the younger.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from weir.api.address import Addr, Cidr, text
from weir.operator.cells import UNSENT, Cells
from weir.operator.matching import Group, Matcher
from weir.operator.objects import Key, Pod


@dataclass(frozen=True, slots=True)
class Announced:
    """What a node's agent says of a pod there: the addresses that it gave it."""

    node: str
    addresses: tuple[Addr, ...]


@dataclass(slots=True, eq=False)
class Placed:
    """A pod, and where it is in the compiler's state. No group: nowhere."""

    pod: Pod
    group: Group | None = None
    addresses: tuple[Addr, ...] = ()
    announced: bool = False

    def rank(self) -> tuple[bool, str, str]:
        """Who keeps an address that two pods claim: the one announced, else the younger."""
        return (self.announced, self.pod.created, self.pod.uid)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An announcement that was not taken, and why."""

    node: str
    pod: str
    reason: str


class Placing:
    """All pods. `cidrs_of`: a node's pod CIDRs, the only ones it may announce addresses of."""

    def __init__(self, matcher: Matcher, cidrs_of: Callable[[str], tuple[Cidr, ...]]) -> None:
        self._matcher = matcher
        self._cidrs_of = cidrs_of
        self.cells = Cells(matcher, self._group_of)
        self.refusals: list[Refusal] = []
        self._pods: dict[Key, Placed] = {}
        self._by_uid: dict[str, Placed] = {}
        self._in_namespace: dict[str, dict[Key, None]] = defaultdict(dict)
        self._announced: dict[str, Announced] = {}
        self._claims: dict[Addr, list[Placed]] = {}

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
            placed = self._pods[key] = Placed(new)
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

    def cidrs_changed(self, node: str) -> None:
        """What its agent announced may be its own now, or no more."""
        for uid in self.announced_by(node):
            if uid in self._by_uid:
                self._place(self._by_uid[uid])

    def namespace_changed(self, namespace: str) -> None:
        """It is known now, or no more: its pods are somewhere, or nowhere."""
        for pod in list(self._in_namespace.get(namespace, ())):
            self._place(self._pods[pod])

    def tell_all(self, namespace: str) -> None:
        """What nodes are told of the namespace's pods is another thing now."""
        for pod in self._in_namespace.get(namespace, ()):
            if self._pods[pod].group is not None:
                self._tell(self._pods[pod].pod)

    # What is where

    def by_uid(self, uid: str) -> Pod | None:
        placed = self._by_uid.get(uid)
        return placed.pod if placed is not None else None

    def owner(self, addr: Addr) -> Key | None:
        claims = self._claims.get(addr)
        return claims[0].pod.key if claims else None

    def _group_of(self, addr: Addr) -> Group | None:
        claims = self._claims.get(addr)
        return claims[0].group if claims else None

    def counts(self) -> dict[str, int]:
        return {
            "pods": len(self._pods),
            "addresses": len(self._claims),
            "announced": len(self._announced),
        }

    # Placing

    def _effective(self, pod: Pod) -> tuple[tuple[Addr, ...], bool]:
        """A pod's addresses, and whether they are as announced; what an agent may not say is
        refused, and then the pod's status holds."""
        announced = self._announced.get(pod.uid)
        if announced is None:
            return pod.addresses, False
        if announced.node != pod.node:
            self._refuse(announced.node, str(pod.key), f"the pod is on {pod.node or 'no node'}")
            return pod.addresses, False
        cidrs = self._cidrs_of(pod.node)
        for addr in announced.addresses:
            if not any(cidr.contains(addr) for cidr in cidrs):
                reason = f"{text(addr)} is not in the node's pod CIDRs"
                self._refuse(announced.node, str(pod.key), reason)
                return pod.addresses, False
        return announced.addresses, True

    def _refuse(self, node: str, pod: str, reason: str) -> None:
        self.refusals.append(Refusal(node, pod, reason))

    def _place(self, placed: Placed) -> None:
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
        self.cells.put_pod(pod.uid, group)
        self._tell(pod)
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

    def _withdraw(self, placed: Placed) -> None:
        if placed.group is None:
            return
        for addr in placed.addresses:
            self._unclaim(addr, placed)
        placed.addresses = ()
        self.cells.put_pod(placed.pod.uid, None)
        self._tell(placed.pod)
        self._leave(placed.group)
        placed.group = None

    def _tell(self, pod: Pod) -> None:
        self.cells.dirty.members[pod.uid] = UNSENT
        self.cells.dirty.nodes[pod.uid] = pod.node

    def _leave(self, group: Group) -> None:
        group.pods -= 1
        self.cells.dirty.emptied.add(group)

    def _unclaim(self, addr: Addr, placed: Placed) -> None:
        claims = self._claims[addr]
        claims.remove(placed)
        if claims:
            self._settle_claim(addr)
            return
        del self._claims[addr]
        self.cells.addresses.discard(int.from_bytes(addr, "big"))
        self.cells.locate(addr)
        self.cells.dirty.members[addr] = UNSENT

    def _settle_claim(self, addr: Addr) -> None:
        claims = self._claims[addr]
        if len(claims) > 1:
            claims.sort(key=Placed.rank, reverse=True)
        self.cells.addresses.add(int.from_bytes(addr, "big"))
        self.cells.locate(addr)
        self.cells.dirty.members[addr] = UNSENT  # its owner may be another
