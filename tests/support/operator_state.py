# SPDX-License-Identifier: Apache-2.0
"""The compiler driven by API JSON, and its resources as a naive agent would join them."""

from __future__ import annotations

from collections.abc import Mapping
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
    _at: dict[str, tuple[frozenset[int], dict[tuple[str, int], int]]] = field(default_factory=dict)

    def take(self, changes: list[Change]) -> None:
        self._at.clear()
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
        return [r for r in self.resources.values() if r.WhichOneof("kind") == kind]

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
        return self.content(class_of(best)) if best is not None else (frozenset(), {})

    def allows(self, source: str, target: str, protocol: str, port: int) -> bool:
        if source == target:
            return True
        return self._judge(True, source, target, target, protocol, port) and self._judge(
            False, target, source, target, protocol, port
        )

    def _judge(
        self, egress: bool, own: str, peer: str, target: str, protocol: str, port: int
    ) -> bool:
        subject, _ = self.at(own)
        others, _ = self.at(peer)
        _, named = self.at(target)
        isolated = False
        for resource in self.named("policy"):
            policy = resource.policy
            if policy.subject not in subject or not (policy.egress if egress else policy.ingress):
                continue
            isolated = True
            for rule in policy.rules:
                if rule.egress is not egress:
                    continue
                if not rule.any_peer and not others.intersection(rule.peers):
                    continue
                number = PROTOCOLS[protocol]
                if not rule.ports or any(
                    p.protocol == number
                    and (
                        named.get((p.name, number)) == port if p.name else p.first <= port <= p.last
                    )
                    for p in rule.ports
                ):
                    return True
        return not isolated

    def meaning(self) -> dict[str, object]:
        """Everything with numbers replaced by what they mean, to compare two compilers."""
        meant: dict[str, object] = {}
        for name, resource in self.resources.items():
            kind = resource.WhichOneof("kind")
            if kind in ("address", "prefix", "pod"):
                selectors, ports = self.content(class_of(getattr(resource, kind)))
                keys = sorted(self.selector_key(number) for number in selectors)
                meant[name] = (keys, sorted(ports.items()))
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
        """No two of equal content but of different spaces (pods, IPv4, IPv6), none that is of two
        or that nobody is in, no selector that nobody names."""
        spaces: dict[int, set[str]] = {}
        for kind in ("address", "prefix", "pod"):
            for resource in self.named(kind):
                message = getattr(resource, kind)
                at = b""
                if kind != "pod":
                    at = message.address if kind == "address" else message.cidr.address
                space = ("4" if at.startswith(V4_PREFIX) else "6") if at else kind
                spaces.setdefault(class_of(message), set()).add(space)
        assert all(len(found) == 1 for found in spaces.values()), spaces
        contents = [
            (*spaces[c.number], frozenset(c.selectors), tuple(str(p) for p in c.named_ports))
            for c in (getattr(r, "class") for r in self.named("class"))
        ]
        assert len(contents) == len(set(contents))
        used = {
            class_of(getattr(r, kind))
            for kind in ("address", "prefix", "pod")
            for r in self.named(kind)
        }
        assert used == {getattr(r, "class").number for r in self.named("class")}
        named = {r.policy.subject for r in self.named("policy")}
        named |= {p for r in self.named("policy") for rule in r.policy.rules for p in rule.peers}
        assert named == {r.selector.number for r in self.named("selector")}


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
        }[kind]
        update(at, parsed)

    def flush(self) -> list[Change]:
        self.last = self.compiler.flush()
        self.view.take(self.last)
        return self.last
