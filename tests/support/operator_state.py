# SPDX-License-Identifier: Apache-2.0
"""The compiler driven by API JSON, and its resources as a naive agent would join them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from weir.api.address import V4_PREFIX, Addr, Cidr, parse
from weir.api.v1 import weir_pb2 as pb
from weir.operator import kinds
from weir.operator.compiler import Compiler
from weir.operator.objects import Key
from weir.operator.resources import Change

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
READERS: Mapping[str, Any] = {
    kind.name: kind.read
    for kind in (
        kinds.NAMESPACE,
        kinds.NODE,
        kinds.POD,
        kinds.SERVICE,
        kinds.SLICE,
        kinds.POLICY,
        kinds.CLUSTER_POLICY,
    )
}


def key(namespace: str, name: str) -> Key:
    return Key(namespace, name)


def class_of(message: object) -> int:
    return int(getattr(message, "class"))


@dataclass
class View:
    """All resources by name, as an agent holds them."""

    resources: dict[str, pb.Resource] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)  # pod resource: its node
    _named: dict[str, list[pb.Resource]] = field(default_factory=lambda: defaultdict(list))
    _at: dict[str, tuple[frozenset[int], dict[tuple[str, int], int]]] = field(default_factory=dict)

    def take(self, changes: list[Change]) -> None:
        self._at.clear()
        self._named.clear()
        for change in changes:
            if change.resource is None:
                self.resources.pop(change.name, None)
                self.nodes.pop(change.name, None)
            else:
                assert change.resource.name == change.name
                self.resources[change.name] = change.resource
                if change.node is not None:
                    self.nodes[change.name] = change.node

    def named(self, kind: str) -> list[pb.Resource]:
        if not self._named:
            for resource in self.resources.values():
                self._named[str(resource.WhichOneof("kind"))].append(resource)
        return self._named.get(kind, [])

    def selector_key(self, number: int) -> str:
        return self.resources[f"selector/{number}"].selector.key

    def content(self, number: int) -> tuple[frozenset[int], dict[tuple[str, int], int]]:
        message = getattr(self.resources[f"class/{number}"], "class")
        ports = {(p.name, p.protocol): p.port for p in message.named_ports}
        return frozenset(message.selectors), ports

    def at(self, address: str) -> tuple[frozenset[int], dict[tuple[str, int], int]]:
        """The selectors and named ports of an address: its own resource, else its prefix."""
        if address not in self._at:
            self._at[address] = self._look_up(address)
        return self._at[address]

    def _look_up(self, address: str) -> tuple[frozenset[int], dict[tuple[str, int], int]]:
        addr = parse(address)
        own = self.resources.get(f"address/{addr.hex()}")
        if own is not None:
            return self.content(class_of(own.address))
        best: pb.Prefix | None = None
        for resource in self.named("prefix"):
            prefix = resource.prefix
            cidr = Cidr(Addr(prefix.cidr.address), prefix.cidr.bits)
            if cidr.contains(addr) and (best is None or prefix.cidr.bits > best.cidr.bits):
                best = prefix
        blocks = self.content(class_of(best))[0] if best is not None else frozenset[int]()
        nodes = [r.node for r in self.named("node") if addr in r.node.addresses]
        for node in nodes:
            if class_of(node):
                blocks |= self.content(class_of(node))[0]
        return blocks, {}

    def node_of(self, address: str) -> str | None:
        """Of the pod that has the address."""
        own = self.resources.get(f"address/{parse(address).hex()}")
        for resource in self.named("pod") if own is not None else ():
            pod = resource.pod
            if own and (pod.namespace, pod.name) == (own.address.namespace, own.address.pod):
                return self.nodes[resource.name]
        return None

    def is_node_of(self, pod: str, address: str) -> bool:
        node = self.resources.get(f"node/{self.node_of(pod)}")
        return node is not None and parse(address) in node.node.addresses

    def decides(
        self, egress: bool, source: str, target: str, protocol: str, port: int
    ) -> tuple[bool, str, int | None]:
        """What one end says, and the tier, policy's resource and rule that decide; where that is
        no policy of the cluster, only whether NetworkPolicies do."""
        own, peer = (source, target) if egress else (target, source)
        question = _Question(self, egress, own, peer, target, PROTOCOLS[protocol], port)
        if not egress and self.is_node_of(own, peer):
            return True, "", None
        return (
            question.by_cluster(pb.TIER_ADMIN)
            or question.by_namespace()
            or question.by_cluster(pb.TIER_BASELINE)
            or (True, "", None)
        )

    def meaning(self) -> dict[str, object]:
        """Everything with numbers replaced by what they mean, to compare two compilers."""
        meant: dict[str, object] = {}
        for name, resource in self.resources.items():
            kind = resource.WhichOneof("kind")
            if kind in ("address", "prefix", "pod"):
                selectors, ports = self.content(class_of(getattr(resource, kind)))
                keys = sorted(self.selector_key(number) for number in selectors)
                meant[name] = (keys, sorted(ports.items()), resource.pod.audit)
            elif kind == "node":
                number = class_of(resource.node)
                selectors = self.content(number)[0] if number else frozenset()
                node = pb.Node()
                node.CopyFrom(resource.node)
                setattr(node, "class", 0)
                meant[name] = (str(node), sorted(self.selector_key(n) for n in selectors))
            elif kind == "policy":
                copy = pb.Policy()
                copy.CopyFrom(resource.policy)
                copy.subject = 0
                peers = []
                for rule in copy.rules:
                    peers.append([self.selector_key(number) for number in rule.peers])
                    del rule.peers[:]
                subject = self.selector_key(resource.policy.subject)
                meant[name] = (str(copy), subject, peers)
            elif kind == "selector":
                meant["selector/" + resource.selector.key] = True
            elif kind != "class":
                meant[name] = str(resource)
        return meant

    def check_classes(self) -> None:
        """No two of equal content but of different spaces (pods, IPv4, IPv6, nodes), none that is
        of two or that nobody is in, no selector that nobody names."""
        spaces: dict[int, set[str]] = {}
        for kind in ("address", "prefix", "pod"):
            for resource in self.named(kind):
                message = getattr(resource, kind)
                at = b""
                if kind != "pod":
                    at = message.address if kind == "address" else message.cidr.address
                space = ("4" if at.startswith(V4_PREFIX) else "6") if at else kind
                spaces.setdefault(class_of(message), set()).add(space)
        for resource in self.named("node"):
            if class_of(resource.node):
                spaces.setdefault(class_of(resource.node), set()).add("node")
        assert all(len(found) == 1 for found in spaces.values()), spaces
        contents = [
            (*spaces[c.number], frozenset(c.selectors), tuple(str(p) for p in c.named_ports))
            for c in (getattr(r, "class") for r in self.named("class"))
        ]
        assert len(contents) == len(set(contents))
        assert spaces.keys() == {getattr(r, "class").number for r in self.named("class")}
        named = {r.policy.subject for r in self.named("policy")}
        named |= {p for r in self.named("policy") for rule in r.policy.rules for p in rule.peers}
        assert named == {r.selector.number for r in self.named("selector")}


@dataclass
class _Question:
    """One flow as one end sees it."""

    view: View
    egress: bool
    own: str
    peer: str
    target: str
    protocol: int
    port: int

    def _policies(self) -> Iterator[pb.Policy]:
        subject, _ = self.view.at(self.own)
        for resource in self.view.named("policy"):
            policy = resource.policy
            if policy.subject in subject and (policy.egress if self.egress else policy.ingress):
                yield policy

    def by_cluster(self, tier: pb.Tier) -> tuple[bool, str, int | None] | None:
        """None: it passed, or nothing matched."""
        policies = [policy for policy in self._policies() if policy.tier == tier]
        for policy in sorted(policies, key=lambda policy: (policy.priority, policy.name)):
            for rule in policy.rules:
                if rule.egress is self.egress and self._matches(rule):
                    if rule.action == pb.ACTION_PASS:
                        return None
                    accepts = rule.action == pb.ACTION_ACCEPT
                    return accepts, f"ClusterNetworkPolicy {policy.name}", rule.index
        return None

    def by_namespace(self) -> tuple[bool, str, int | None] | None:
        policies = [p for p in self._policies() if p.tier == pb.TIER_NETWORK_POLICY]
        if not policies:
            return None
        allowed = any(
            rule.egress is self.egress and self._matches(rule)
            for policy in policies
            for rule in policy.rules
        )
        return allowed or self.view.is_node_of(self.own, self.peer), "NetworkPolicy", None

    def _matches(self, rule: pb.Rule) -> bool:
        others, _ = self.view.at(self.peer)
        _, named = self.view.at(self.target)
        if not rule.any_peer and not others.intersection(rule.peers):
            return False
        return not rule.ports or any(
            p.protocol == self.protocol
            and (
                named.get((p.name, self.protocol)) == self.port
                if p.name
                else p.first <= self.port <= p.last
            )
            for p in rule.ports
        )


@dataclass
class State:
    """A compiler and what it has told so far."""

    compiler: Compiler = field(default_factory=Compiler)
    view: View = field(default_factory=View)
    last: list[Change] = field(default_factory=list)

    def set(self, kind: str, at: Key, content: object) -> None:
        parsed = None
        if content is not None:
            result = READERS[kind](msgspec.Raw(msgspec.json.encode(content)))
            parsed = result.value
        compiler = self.compiler
        update: Any = {
            "Namespace": compiler.namespace,
            "Node": compiler.node,
            "Pod": compiler.pod,
            "Service": compiler.service,
            "EndpointSlice": compiler.slice,
            "NetworkPolicy": compiler.policy,
            "ClusterNetworkPolicy": lambda at, of: compiler.policy(at, of and of.policy),
        }[kind]
        update(at, parsed)

    def flush(self) -> list[Change]:
        self.last = self.compiler.flush()
        self.view.take(self.last)
        return self.last
