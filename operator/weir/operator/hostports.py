# SPDX-License-Identifier: Apache-2.0
"""Ports of a node that several of its pods claim, or a pod and a Service's node port.

The scheduler sees to it that there are none among the pods that it places, but not for pods that
name their node themselves, and it knows nothing of node ports. Of pods, the one that was created
first has the port; a node port, which is the same on all nodes, comes before both.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from weir.api.address import V4_PREFIX, Addr, is_ipv4
from weir.operator.frontends import HEARD, PortOf, Rank, port_text
from weir.operator.objects import HostPort, Key, Pod, Problem

ANY = (Addr(V4_PREFIX + bytes(4)), Addr(bytes(16)))
Claim = tuple[Rank, Addr]  # the address empty: all
Place = tuple[PortOf, str]  # a port on a node
Judged = dict[Key, tuple[Pod, tuple[Problem, ...]]]


def overlap(one: Addr, other: Addr) -> bool:
    """Whether two host IPs have an address in common. Empty: all addresses."""
    if not one or not other or one == other:
        return True
    return is_ipv4(one) is is_ipv4(other) and (one in ANY or other in ANY)


@dataclass(slots=True)
class HostPorts:
    """All pods with host ports. `node_port` tells the Service whose node port a port is."""

    node_port: Callable[[PortOf], Key | None]
    _pods: dict[Key, Pod] = field(default_factory=dict)
    _claims: dict[PortOf, dict[str, list[Claim]]] = field(default_factory=dict)

    def change(self, key: Key, new: Pod | None) -> Judged:
        """The pods concerned, as they are to be used, and what is wrong with each. The changed
        one is among them, unless it is gone."""
        old = self._pods.pop(key, None)
        if new is not None and not (new.host_ports and new.live and new.node):
            plain, new = new, None
        else:
            plain = None
        if old is None and new is None:
            return {} if plain is None else {key: (plain, ())}
        places = {(_port(p), pod.node) for pod in (old, new) if pod for p in pod.host_ports}
        before = {place: set(self._winners(place)) for place in places}
        if old is not None:
            self._drop(old)
        if new is not None:
            self._pods[key] = new
            self._add(new)
        concerned = {key}
        for place, winners in before.items():
            if changed := winners.symmetric_difference(self._winners(place)):
                concerned |= {rank[1] for rank, _ in changed}
                concerned |= {rank[1] for rank, _ in self._at(place)[:HEARD]}
        judged = self._judge_all(concerned)
        return judged if plain is None else {**judged, key: (plain, ())}

    def node_ports(self, ports: Iterable[PortOf]) -> Judged:
        """These may have got another owner among Services, or lost it."""
        claims = [
            claim for port in ports for at in self._claims.get(port, {}).values() for claim in at
        ]
        return self._judge_all({rank[1] for rank, _ in claims})

    def _add(self, pod: Pod) -> None:
        for port in pod.host_ports:
            at = self._claims.setdefault(_port(port), {}).setdefault(pod.node, [])
            insort(at, (_rank(pod), port.host_ip or Addr(b"")))

    def _drop(self, pod: Pod) -> None:
        for port in pod.host_ports:
            nodes = self._claims[_port(port)]
            nodes[pod.node].remove((_rank(pod), port.host_ip or Addr(b"")))
            if not nodes[pod.node]:
                del nodes[pod.node]
                if not nodes:
                    del self._claims[_port(port)]

    def _at(self, place: Place) -> list[Claim]:
        port, node = place
        return self._claims.get(port, {}).get(node, [])

    def _winners(self, place: Place) -> list[Claim]:
        won: list[Claim] = []
        for claim in self._at(place):
            if not any(overlap(claim[1], other) for _, other in won):
                won.append(claim)
        return won

    def _judge_all(self, keys: set[Key]) -> Judged:
        return {key: self._judge(self._pods[key]) for key in sorted(keys) if key in self._pods}

    def _judge(self, pod: Pod) -> tuple[Pod, tuple[Problem, ...]]:
        kept: list[HostPort] = []
        problems: list[Problem] = []
        for wanted in pod.host_ports:
            port = _port(wanted)
            address = wanted.host_ip or Addr(b"")
            service = self.node_port(port)
            owners = [
                rank for rank, other in self._winners((port, pod.node)) if overlap(address, other)
            ]
            if service is not None:
                words = f"is the node port of Service {service}: use another hostPort"
            elif owners[0] != _rank(pod):
                words = f"on node {pod.node} is pod {owners[0][1]}'s, which was created first: "
                words += "use another hostPort, or put this pod on another node"
            else:
                kept.append(wanted)
                continue
            problems.append(Problem("spec.containers.ports.hostPort", f"{port_text(port)} {words}"))
        return replace(pod, host_ports=tuple(kept)) if problems else pod, tuple(problems)


def _port(wanted: HostPort) -> PortOf:
    return wanted.protocol, wanted.host_port


def _rank(pod: Pod) -> Rank:
    return pod.created, pod.key
