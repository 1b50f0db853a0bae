# SPDX-License-Identifier: Apache-2.0
"""Who is where: rows of `addresses`, `prefixes` and `endpoints`.

An address is looked up in this order: a pod wired here, a node's address, a pod elsewhere. A
local pod's class is that of its labels (`pod` resource) joined with the ipBlocks that contain
the address; its policy is taken from that class. A local pod whose class is unknown is in the
rule set that lets nothing through, in audit mode too. A node's address has the class of the node's
labels, joined with ipBlocks likewise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from weir.agent.classes import NOTHING, ClassContent
from weir.agent.identity import (
    CLASS_FIRST,
    CLASS_HOST,
    CLASS_UNKNOWN,
    CLASS_WORLD,
    Identity,
)
from weir.agent.policy import PolicyTables, SubjectPolicy
from weir.agent.resources import WireClass
from weir.agent.rows import Rows
from weir.agent.rule_sets import DENY_ALL
from weir.api.address import Addr, Cidr, cidr
from weir.cni.endpoint import LocalEndpoint
from weir.datapath import records

LOCAL_HOST = 1
REMOTE_NODE = 2

NO_POLICY = SubjectPolicy(records.Isolation(0, 0), records.Isolation(0, 0))
# To its own node neither, as rules may deny that.
_NOTHING = records.Isolation(DENY_ALL, records.IsolationFlag.ORDERED | records.IsolationFlag.SHUT)
NOTHING_PASSES = SubjectPolicy(_NOTHING, _NOTHING)


@dataclass(frozen=True, slots=True)
class Located:
    """One address of a pod wired here, and its class number."""

    endpoint: LocalEndpoint
    number: int
    audit: bool = False


@dataclass(frozen=True, slots=True)
class NodeAddress:
    """flags: LOCAL_HOST or REMOTE_NODE. wire_class: of the node's labels, None: no selector's."""

    flags: int
    wire_class: WireClass | None = None


@dataclass(frozen=True, slots=True)
class _Labels:
    """What a pod is by its labels and its namespace's annotation."""

    content: ClassContent
    audit: bool = False


class Placement:
    """`audit`: for all pods, whatever their own resource says."""

    def __init__(self, identity: Identity, policy: PolicyTables, *, audit: bool = False) -> None:
        self.addresses: Rows[Addr, records.Address] = Rows("addresses")
        self.prefixes: Rows[records.PrefixKey, records.Prefix] = Rows("prefixes")
        self.endpoints: Rows[Addr, records.Endpoint] = Rows("endpoints")
        self._identity = identity
        self._policy = policy
        self._pods: dict[Addr, WireClass] = {}
        self._members: dict[WireClass, set[Addr]] = {}
        self._prefixes: dict[Cidr, WireClass] = {}
        self._lengths: Counter[int] = Counter()
        self._longest_first: list[int] = []
        self._audit = audit
        self._uids: dict[str, tuple[WireClass, bool]] = {}
        self._nodes: Mapping[Addr, NodeAddress] = {}
        self._node_numbers: dict[Addr, int] = {}
        self._node_classes: set[WireClass | None] = set()
        self._local: dict[str, LocalEndpoint] = {}
        self._last: dict[str, _Labels] = {}
        self._located: dict[Addr, Located] = {}
        self._dirty: set[Addr] = set()
        self._dirty_prefixes: set[Cidr] = set()
        self._dirty_local = False
        self._dirty_nodes = False
        self._pooled: dict[tuple[int, int], records.Address] = {}

    # ---- inputs

    def set_pod_address(self, addr: Addr, wire: WireClass | None) -> None:
        old = self._pods.pop(addr, None)
        if old is not None:
            self._members[old].discard(addr)
            if not self._members[old]:
                del self._members[old]
        if wire is not None:
            self._pods[addr] = wire
            self._members.setdefault(wire, set()).add(addr)
        self._dirty.add(addr)

    def set_prefix(self, prefix: Cidr, wire: WireClass | None) -> None:
        if self._prefixes.pop(prefix, None) is not None:
            self._lengths[prefix.bits] -= 1
        if wire is not None:
            self._prefixes[prefix] = wire
            self._lengths[prefix.bits] += 1
        if (self._lengths[prefix.bits] > 0) is not (prefix.bits in self._longest_first):
            self._longest_first = sorted((+self._lengths).keys(), reverse=True)
        self._dirty_prefixes.add(prefix)
        self._dirty_local = self._dirty_nodes = True

    def set_pod(self, uid: str, wire: WireClass | None, *, audit: bool = False) -> None:
        if wire is None:
            self._uids.pop(uid, None)
        else:
            self._uids[uid] = (wire, audit)
        self._dirty_local = True

    def set_nodes(self, nodes: Mapping[Addr, NodeAddress]) -> None:
        """Every node's own addresses."""
        old, self._nodes = self._nodes, nodes
        changed = {addr for addr in old.keys() | nodes.keys() if old.get(addr) != nodes.get(addr)}
        if changed:
            self._dirty |= changed
            self._dirty_nodes = True
            self._node_classes = {node.wire_class for node in nodes.values()}

    def set_endpoint(self, endpoint: LocalEndpoint) -> None:
        self._local[endpoint.container_id] = endpoint
        self._dirty_local = True

    def remove_endpoint(self, container_id: str) -> None:
        self._last.pop(container_id, None)
        if self._local.pop(container_id, None) is not None:
            self._dirty_local = True

    def classes_changed(self, changed: Iterable[WireClass]) -> None:
        changed = set(changed)
        for wire in changed:
            self._dirty |= self._members.get(wire, set())
        prefixes = (
            {p for p, wire in self._prefixes.items() if wire in changed} if changed else set()
        )
        self._dirty_prefixes |= prefixes
        self._dirty_local |= bool(changed)
        self._dirty_nodes |= bool(prefixes) or not changed.isdisjoint(self._node_classes)

    # ---- questions

    @property
    def local(self) -> Mapping[str, LocalEndpoint]:
        return self._local

    def has_identity(self, uid: str) -> bool:
        known = self._uids.get(uid)
        return known is not None and self._identity.known(known[0])

    def located(self, addr: Addr) -> Located | None:
        return self._located.get(addr)

    # ---- projection

    def locate(self) -> None:
        """Classes of local pods and nodes; before the policy join, which needs the subjects."""
        if self._dirty_local:
            self._dirty_local = False
            self._locate_pods()
        if self._dirty_nodes:
            self._dirty_nodes = False
            self._locate_nodes()

    def project(self, moved_subjects: set[int]) -> None:
        """Rows; after the policy join."""
        while self._dirty_prefixes:
            self._project_prefix(self._dirty_prefixes.pop())
        dirty, self._dirty = self._dirty, set()
        for addr in dirty:
            self.addresses.set(addr, self._address_row(addr))
            if addr not in self._located:
                self.endpoints.drop(addr)
        for addr, located in self._located.items():
            if addr in dirty or located.number in moved_subjects:
                self.endpoints.put(addr, self._endpoint_row(located))

    def _locate_pods(self) -> None:
        wanted: dict[Addr, Located] = {}
        for endpoint in self._local.values():
            for addr in endpoint.addresses:
                wanted[addr] = self._pod(endpoint, addr)
        old, self._located = self._located, wanted
        for addr in old.keys() | wanted.keys():
            if old.get(addr) != wanted.get(addr):
                self._dirty.add(addr)
        for located in old.values():
            self._identity.unuse(located.number)
        self._policy.set_subjects(
            {item.number for item in wanted.values() if item.number >= CLASS_FIRST}
        )

    def _pod(self, endpoint: LocalEndpoint, addr: Addr) -> Located:
        """With one use of a number, given back when the endpoint is located anew."""
        if not endpoint.pod.uid:
            return Located(endpoint, CLASS_WORLD)
        labels = self._labels(endpoint, addr)
        if labels is None:
            return Located(endpoint, CLASS_UNKNOWN)
        content = labels.content | self._identity.content(self._prefix_number(addr))
        return Located(endpoint, self._identity.use(content), labels.audit or self._audit)

    def _labels(self, endpoint: LocalEndpoint, addr: Addr) -> _Labels | None:
        """A pod that is gone from the API but still runs keeps what it was."""
        known = self._uids.get(endpoint.pod.uid)
        if known is not None and self._identity.known(known[0]):
            content = self._identity.content(self._identity.number(known[0]))
            labels = self._last[endpoint.container_id] = _Labels(content, known[1])
            return labels
        last = self._last.get(endpoint.container_id)
        wire = self._pods.get(addr)
        if last is None and wire is not None and self._identity.known(wire):
            return _Labels(self._identity.content(self._identity.number(wire)))
        return last

    def _locate_nodes(self) -> None:
        numbers: dict[Addr, int] = {}
        for addr, node in self._nodes.items():
            numbers[addr] = self._node_number(addr, node)
        old, self._node_numbers = self._node_numbers, numbers
        for number in old.values():
            self._identity.unuse(number)
        self._dirty |= {a for a in old.keys() | numbers.keys() if old.get(a) != numbers.get(a)}

    def _node_number(self, addr: Addr, node: NodeAddress) -> int:
        """One use of a number, as `_pod` has it. Of no selector and no ipBlock: a fixed one."""
        content = self._identity.content(self._prefix_number(addr))
        if node.wire_class is not None:
            if not self._identity.known(node.wire_class):
                return CLASS_UNKNOWN
            content |= self._identity.content(self._identity.number(node.wire_class))
        if content == NOTHING:
            return CLASS_HOST if node.flags & LOCAL_HOST else CLASS_WORLD
        return self._identity.use(content)

    def _prefix_number(self, addr: Addr) -> int:
        """The class of the longest ipBlock prefix that contains an address."""
        for bits in self._longest_first:
            wire = self._prefixes.get(cidr(addr, bits))
            if wire is not None:
                return self._identity.number(wire)
        return CLASS_WORLD

    def _project_prefix(self, prefix: Cidr) -> None:
        wire = self._prefixes.get(prefix)
        key = records.PrefixKey(prefix.bits, prefix.address)
        row = records.Prefix(self._identity.number(wire)) if wire is not None else None
        self.prefixes.set(key, row)

    def _address_row(self, addr: Addr) -> records.Address | None:
        located = self._located.get(addr)
        if located is not None:
            return self._row(located.number, 0)
        if addr in self._nodes:
            return self._row(self._node_numbers[addr], self._nodes[addr].flags)
        wire = self._pods.get(addr)
        return self._row(self._identity.number(wire), 0) if wire is not None else None

    def _row(self, number: int, flags: int) -> records.Address:
        row = self._pooled.get((number, flags))
        if row is None:
            row = self._pooled[number, flags] = records.Address(number, flags)
        return row

    def _endpoint_row(self, located: Located) -> records.Endpoint:
        endpoint, number = located.endpoint, located.number
        if number == CLASS_UNKNOWN:
            policy = NOTHING_PASSES
        elif number == CLASS_WORLD:
            policy = NO_POLICY
        else:
            policy = self._policy.isolation(number)
            if located.audit:
                policy = SubjectPolicy(_audited(policy.egress), _audited(policy.ingress))
        return records.Endpoint(
            endpoint.ifindex,
            number,
            policy.egress,
            policy.ingress,
            endpoint.mac,
            endpoint.host_mac,
        )


def _audited(isolation: records.Isolation) -> records.Isolation:
    if not isolation.rule_set:
        return isolation
    return replace(isolation, levels=isolation.levels | records.IsolationFlag.AUDIT)
