# SPDX-License-Identifier: Apache-2.0
"""Addresses and ports that several Services claim: the one that was created first has them.

Decided here, so that all replicas and agents agree. Cluster IPs come before all else, then node
ports on nodes' addresses, then external and load balancer IPs, port by port: these are text that
anybody may write, the others are allocated. What a Service does not get it goes without; a
change that moves a claim brings all Services back whose share it changes.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

from weir.api.address import Addr, text
from weir.operator.objects import PROTOCOL_NAMES, PROTOCOLS, Key, Problem
from weir.operator.services import Frontend, Service

PortOf = tuple[int, int]  # protocol, port
Rank = tuple[str, Key]  # when it was created, and which it is
K = TypeVar("K")
# Of those that claim the same, how many are told when another one has it. All would be too many.
HEARD = 16
Judged = dict[Key, tuple[Service, tuple[Problem, ...]]]


def port_text(port: PortOf) -> str:
    return f"{port[1]}/{PROTOCOL_NAMES[port[0]]}"


@dataclass(slots=True)
class Frontends:
    """All Services as the API has them, and who claims what, the first in front."""

    _services: dict[Key, Service] = field(default_factory=dict)
    _cluster_ips: dict[Addr, list[Rank]] = field(default_factory=dict)
    _node_ports: dict[PortOf, list[Rank]] = field(default_factory=dict)
    _external: dict[PortOf, dict[Addr, list[Rank]]] = field(default_factory=dict)
    _ports_at: dict[Addr, set[PortOf]] = field(default_factory=dict)  # of _external
    _nodes: Counter[Addr] = field(default_factory=Counter)
    _moved: set[PortOf] = field(default_factory=set)

    def change(self, key: Key, new: Service | None) -> Judged:
        """The Services concerned, as they are to be used, and what is wrong with each. The
        changed one is among them, unless it is gone."""
        old = self._services.pop(key, None)
        concerned = {key}
        if old is not None:
            self._drop(old)
            concerned.update(self._touched(old))
        if new is not None:
            self._services[key] = new
            self._add(new)
            concerned.update(self._touched(new))
        return self._judge_all(concerned)

    def nodes(self, old: Iterable[Addr], new: Iterable[Addr]) -> Judged:
        """A node's addresses change."""
        old, new = set(old), set(new)
        for addr in new - old:
            self._nodes[addr] += 1
        for addr in old - new:
            self._nodes[addr] -= 1
            if not self._nodes[addr]:
                del self._nodes[addr]
        return self._judge_all({key for addr in old ^ new for key in self._claim(addr, 1)})

    def node_port(self, port: PortOf) -> Key | None:
        """The Service that has it."""
        ranks = self._node_ports.get(port)
        return ranks[0][1] if ranks else None

    def problems(self, key: Key) -> tuple[Problem, ...]:
        """What is wrong with a Service as things are now."""
        return self._judge(self._services[key])[1] if key in self._services else ()

    def moved(self) -> set[PortOf]:
        """Node ports that may have got another owner since this was asked last."""
        moved, self._moved = self._moved, set()
        return moved

    # Claims

    def _add(self, service: Service) -> None:
        rank = _rank(service)
        for addr in service.cluster_ips:
            insort(self._cluster_ips.setdefault(addr, []), rank)
        for port in _node_ports(service):
            insort(self._node_ports.setdefault(port, []), rank)
            self._moved.add(port)
        for addr, port in _external(service):
            insort(self._external.setdefault(port, {}).setdefault(addr, []), rank)
            self._ports_at.setdefault(addr, set()).add(port)

    def _drop(self, service: Service) -> None:
        rank = _rank(service)
        for addr in service.cluster_ips:
            _remove(self._cluster_ips, addr, rank)
        for port in _node_ports(service):
            _remove(self._node_ports, port, rank)
            self._moved.add(port)
        for addr, port in _external(service):
            at = self._external[port]
            if _remove(at, addr, rank):
                self._ports_at[addr].discard(port)
                if not self._ports_at[addr]:
                    del self._ports_at[addr]
                if not at:
                    del self._external[port]

    def _touched(self, service: Service) -> Iterator[Key]:
        """Whose share a Service changes that has just come or gone."""
        rank = _rank(service)
        for addr in service.cluster_ips:
            yield from _behind(rank, self._cluster_ips.get(addr))
            yield from self._claim(addr, HEARD)
        for port in _node_ports(service):
            yield from _behind(rank, self._node_ports.get(port))
            for addr, ranks in self._external.get(port, {}).items():
                if addr in self._nodes:
                    yield ranks[0][1]
        for addr, port in _external(service):
            yield from _behind(rank, self._external.get(port, {}).get(addr))

    def _claim(self, addr: Addr, most: int) -> Iterator[Key]:
        """Of those with the address among their external ones, the first of each port."""
        for port in self._ports_at.get(addr, ()):
            yield from (key for _, key in self._external[port][addr][:most])

    # Verdicts

    def _judge_all(self, keys: set[Key]) -> Judged:
        return {
            key: self._judge(self._services[key]) for key in sorted(keys) if key in self._services
        }

    def _judge(self, service: Service) -> tuple[Service, tuple[Problem, ...]]:
        problems: list[Problem] = []
        changed = replace(
            service,
            cluster_ips=self._own_cluster_ips(service, problems),
            external_ips=self._free_of_cluster_ips(
                service, service.external_ips, "spec.externalIPs", problems
            ),
            load_balancer_ips=self._free_of_cluster_ips(
                service, service.load_balancer_ips, "status.loadBalancer.ingress", problems
            ),
        )
        refused = tuple(self._refused(changed, problems))
        own = self._own_node_ports(service, problems)
        if not problems and not refused:
            return service, ()
        health = service.health_check_node_port
        return replace(
            changed,
            refused=refused,
            ports=tuple(
                port if not port.node_port or (port.protocol, port.node_port) in own
                else replace(port, node_port=0)
                for port in service.ports
            ),
            health_check_node_port=health if (PROTOCOLS["TCP"], health) in own else 0,
        ), tuple(problems)  # fmt: skip

    def _own_cluster_ips(self, service: Service, problems: list[Problem]) -> tuple[Addr, ...]:
        own: list[Addr] = []
        for addr in service.cluster_ips:
            first = self._cluster_ips[addr][0][1]
            if first == service.key:
                own.append(addr)
            else:
                words = f"{text(addr)} is the cluster IP of Service {first}, which was created "
                words += "first and keeps it: delete this Service and make it anew"
                problems.append(Problem("spec.clusterIPs", words))
        return tuple(own)

    def _free_of_cluster_ips(
        self, service: Service, addresses: tuple[Addr, ...], where: str, problems: list[Problem]
    ) -> tuple[Addr, ...]:
        free: list[Addr] = []
        for addr in addresses:
            first = next((r[1] for r in self._cluster_ips.get(addr, ())), service.key)
            if first == service.key:
                free.append(addr)
            else:
                words = f"{text(addr)} is the cluster IP of Service {first}: use another address"
                problems.append(Problem(where, words))
        return tuple(free)

    def _refused(self, service: Service, problems: list[Problem]) -> Iterator[Frontend]:
        for addr, port in _external(service):
            first = self._external[port][addr][0][1]
            owner = self.node_port(port) if addr in self._nodes else None
            if first != service.key:
                words = f"{port_text(port)} of {text(addr)} is Service {first}'s, which was created"
                words += " first and keeps it: use another port or address"
            elif owner is not None:
                words = f"{port_text(port)} of {text(addr)}, which is a node's address, is the "
                words += f"node port of Service {owner}: use another port or address"
            else:
                continue
            yield Frontend(addr, *port)
            if first != service.key or owner != service.key:  # its own node port does the same
                external = addr in service.external_ips
                where = "spec.externalIPs" if external else "status.loadBalancer.ingress"
                problems.append(Problem(where, words))

    def _own_node_ports(self, service: Service, problems: list[Problem]) -> set[PortOf]:
        own: set[PortOf] = set()
        for port in _node_ports(service):
            first = self._node_ports[port][0][1]
            if first == service.key:
                own.add(port)
                continue
            words = f"{port_text(port)} is the node port of Service {first}, which was created "
            words += "first and keeps it: choose another"
            health = port == (PROTOCOLS["TCP"], service.health_check_node_port)
            where = "spec.healthCheckNodePort" if health else "spec.ports.nodePort"
            problems.append(Problem(where, words))
        return own


def _behind(rank: Rank, ranks: list[Rank] | None) -> Iterator[Key]:
    """Those that have it after the first one, or have heard from whom they did not get it."""
    if ranks and rank <= ranks[0]:
        yield from (key for _, key in ranks[:HEARD])


def _rank(service: Service) -> Rank:
    return service.created, service.key


def _external(service: Service) -> Iterator[tuple[Addr, PortOf]]:
    for addr in (*service.external_ips, *service.load_balancer_ips):
        for port in service.ports:
            yield addr, (port.protocol, port.port)


def _node_ports(service: Service) -> list[PortOf]:
    """The one for health checks is one too: the node itself answers there."""
    ports = dict.fromkeys((p.protocol, p.node_port) for p in service.ports if p.node_port)
    if service.health_check_node_port:
        ports[PROTOCOLS["TCP"], service.health_check_node_port] = None
    return list(ports)


def _remove(claims: dict[K, list[Rank]], at: K, rank: Rank) -> bool:
    """Whether nobody is left there."""
    ranks = claims[at]
    ranks.remove(rank)
    if not ranks:
        del claims[at]
    return not ranks
