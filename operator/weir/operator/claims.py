# SPDX-License-Identifier: Apache-2.0
"""Between the objects as the API has them and as they are compiled: who gets what two claim.

Pod CIDRs of nodes, addresses and ports of Services, host ports of pods. The compiler is given
each object with what is its own; what it had to go without is told when things are settled, so
that a state which only passes (an object goes, another takes its place) is no problem of anybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from weir.api.address import Addr
from weir.operator import frontends, hostports
from weir.operator.compiler import Compiler
from weir.operator.frontends import Frontends
from weir.operator.hostports import HostPorts
from weir.operator.objects import Key, Node, Pod, Problem
from weir.operator.podcidrs import PodCidrs
from weir.operator.services import Service
from weir.operator.writes import Reference

Tell = Callable[[Reference, tuple[Problem, ...]], None]
_Object = tuple[str, Key]  # kind, and which


@dataclass(slots=True)
class Claims:
    """`told` are the problems of each object that has any, as they were told last."""

    compiler: Compiler
    tell: Tell
    told: dict[_Object, tuple[Problem, ...]] = field(default_factory=dict)
    _pod_cidrs: PodCidrs = field(default_factory=PodCidrs)
    _frontends: Frontends = field(default_factory=Frontends)
    _host_ports: HostPorts = field(init=False)
    _node_addresses: dict[Key, tuple[Addr, ...]] = field(default_factory=dict)
    _untold: dict[_Object, tuple[str, tuple[Problem, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._host_ports = HostPorts(self._frontends.node_port)

    def node(self, key: Key, new: Node | None) -> None:
        if new is None:
            self._gone("Node", key)
            self.compiler.node(key, None)
        for node, problems in self._pod_cidrs.change(key.name, new).values():
            self.compiler.node(node.key, node)
            self._note("Node", node.key, node.uid, problems)
        old = self._node_addresses.pop(key, ())
        if new is not None:
            self._node_addresses[key] = new.addresses
        self._take_services(self._frontends.nodes(old, new.addresses if new else ()))

    def service(self, key: Key, new: Service | None) -> None:
        if new is not None and not (new.cluster_ips and new.ports):
            new = None
        if new is None:
            self._gone("Service", key)
            self.compiler.service(key, None)
        self._take_services(self._frontends.change(key, new))
        if moved := self._frontends.moved():
            self._take_pods(self._host_ports.node_ports(moved))

    def pod(self, key: Key, new: Pod | None) -> None:
        if new is None:
            self._gone("Pod", key)
            self.compiler.pod(key, None)
        self._take_pods(self._host_ports.change(key, new))

    def _take_services(self, judged: frontends.Judged) -> None:
        for key, (service, problems) in judged.items():
            self.compiler.service(key, service)
            self._note("Service", key, service.uid, problems)

    def _take_pods(self, judged: hostports.Judged) -> None:
        for key, (pod, problems) in judged.items():
            self.compiler.pod(key, pod)
            self._note("Pod", key, pod.uid, problems)

    # Problems

    def _note(self, kind: str, key: Key, uid: str, problems: tuple[Problem, ...]) -> None:
        if problems or (kind, key) in self.told:
            self._untold[kind, key] = (uid, problems)
        else:
            self._untold.pop((kind, key), None)

    def _gone(self, kind: str, key: Key) -> None:
        self.told.pop((kind, key), None)
        self._untold.pop((kind, key), None)

    def settle(self) -> None:
        """Tell what is news."""
        untold, self._untold = self._untold, {}
        for (kind, key), (uid, noted) in untold.items():
            # A Service's may name one that had it meanwhile.
            problems = self._frontends.problems(key) if kind == "Service" else noted
            known = self.told.pop((kind, key), ())
            if problems:
                self.told[kind, key] = problems
            if problems != known:
                reference = Reference("v1", kind, key.namespace, key.name, uid, "", 0)
                self.tell(reference, problems)

    def counts(self) -> Counter[str]:
        """Objects with problems, by kind."""
        return Counter(kind for kind, _ in self.told)
