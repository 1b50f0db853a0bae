# SPDX-License-Identifier: Apache-2.0
"""What the addresses of LoadBalancers depend on besides the Services: pools, nodes, namespaces.

Every replica keeps it as it comes by, between the reflectors and the model, so that a new leader
need not list it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from weir.api.address import Addr
from weir.operator.objects import Key, Namespace, Node, Problem
from weir.operator.pools import KIND, Cluster, Pool, Range, range_of
from weir.operator.reflector import Consumer

KINDS = frozenset({KIND, "Node", "Namespace"})


@dataclass(slots=True)
class Surroundings:
    """A consumer that passes everything on. `news` is for the leader, who clears it."""

    consumer: Consumer
    news: asyncio.Event = field(default_factory=asyncio.Event)
    pools: dict[Key, Pool] = field(default_factory=dict)
    nodes: dict[Key, Node] = field(default_factory=dict)
    namespaces: dict[str, dict[str, str]] = field(default_factory=dict)
    generation: int = 0  # of pools and nodes, as far as they matter to pools
    moved: set[str] = field(
        default_factory=set
    )  # namespaces with other labels; taken by the leader
    _synced: set[str] = field(default_factory=set)

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        match kind:
            case "Node":
                self._node(key, new if isinstance(new, Node) else None)
            case "Namespace":
                self._namespace(key.name, new if isinstance(new, Namespace) else None)
            case _ if kind == KIND:
                self.pools.pop(key, None)
                if isinstance(new, Pool):
                    self.pools[key] = new
                self.generation += 1
                self.news.set()
        self.consumer.changed(kind, key, old, new)

    def _node(self, key: Key, new: Node | None) -> None:
        old = self.nodes.pop(key, None)
        if new is not None:
            self.nodes[key] = new
        if _taken(old) != _taken(new):
            self.generation += 1
            self.news.set()

    def _namespace(self, name: str, new: Namespace | None) -> None:
        self.namespaces.pop(name, None)
        if new is not None:
            self.namespaces[name] = dict(new.labels)
        self.moved.add(name)
        self.news.set()

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        self.consumer.problems(kind, key, problems)

    def synced(self, kind: str) -> None:
        self._synced.add(kind)
        self.news.set()
        self.consumer.synced(kind)

    @property
    def complete(self) -> bool:
        return self._synced >= KINDS

    def cluster(self, services: Iterable[tuple[str, Range]]) -> Cluster:
        """`services`: the Service CIDRs, with what to call them. In an order that does not depend
        on what came first, so that replicas name the same owner of what a pool overlaps."""
        nodes = sorted(self.nodes.values(), key=lambda node: node.key)
        pods = (
            (f"the pod CIDR of node {node.key.name}", range_of(cidr))
            for node in nodes
            for cidr in node.pod_cidrs
        )
        hosts: dict[Addr, str] = {}
        for node in nodes:
            hosts.update(dict.fromkeys(node.addresses, node.key.name))
        return Cluster((*sorted(services), *pods), hosts)


def _taken(node: Node | None) -> object:
    return (node.addresses, node.pod_cidrs) if node is not None else None
