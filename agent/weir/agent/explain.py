# SPDX-License-Identifier: Apache-2.0
"""Events of the datapath in the words of the cluster: pods, policies, near misses.

A near miss is a rule of the policies that denied a packet which matches all but the port, or
all but the peer: most often that is the mistake.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from weir.agent import resources, verdict
from weir.agent.errors import BadResource
from weir.agent.tables import Projection
from weir.agent.verdict import PROTOCOLS, Question
from weir.agent.verdict import Party as End
from weir.api.address import Addr, text
from weir.datapath.records import Direction, DropReason, Event, EventKind


class Party(msgspec.Struct, frozen=True):
    """One end of a packet. pod: namespace/name, or a word for what else it is, or empty."""

    address: str
    port: int
    pod: str


class Explained(msgspec.Struct, frozen=True):
    """An event for people and for JSON. policies: namespace/name of those that decided, or
    "BlockList NAME"."""

    time: float
    verdict: str
    reason: str
    direction: str
    protocol: str
    source: Party
    destination: Party
    policies: tuple[str, ...]
    near_miss: str
    bytes: int


class Explainer:
    def __init__(self, projection: Projection, encoded: Mapping[str, bytes]) -> None:
        self._projection = projection
        self._encoded = encoded

    def explain(self, event: Event, clock: Callable[[], float] = time.time) -> Explained:
        dropped = event.kind == EventKind.DROP
        policies, near_miss = self._decided(event)
        behind = (time.monotonic_ns() - event.time_ns) / 1e9
        return Explained(
            time=clock() - behind,
            verdict="drop" if dropped else "allow",
            reason=reason_text(event.reason) if dropped else "",
            direction=Direction(event.direction).name.lower() if event.direction < 2 else "",
            protocol=PROTOCOLS.get(event.protocol, str(event.protocol)),
            source=self._party(event.source, event.source_port),
            destination=self._party(event.destination, event.destination_port),
            policies=policies,
            near_miss=near_miss,
            bytes=event.length,
        )

    def pod_name(self, addr: Addr) -> str:
        located = self._projection.placement.located(addr)
        if located is not None:
            return str(located.endpoint.pod)
        encoded = self._encoded.get(f"address/{addr.hex()}")
        if encoded is not None:
            try:
                _, item = resources.parse(encoded)
            except BadResource:
                return ""
            if isinstance(item, resources.Address):
                return f"{item.namespace}/{item.pod}"
        for node in self._projection.routes.nodes.values():
            if addr in node.addresses:
                return f"node {node.name}"
        return ""

    def addresses_of(self, pod: str) -> tuple[Addr, ...]:
        """Of namespace/name: none if no pod with addresses of its own is known by it."""
        for endpoint in self._projection.placement.local.values():
            if str(endpoint.pod) == pod:
                return endpoint.addresses
        namespace, _, name = pod.partition("/")
        found: list[Addr] = []
        for key, encoded in self._encoded.items():
            # Most are told apart without decoding them.
            if not key.startswith("address/") or name.encode() not in encoded:
                continue
            try:
                _, item = resources.parse(encoded)
            except BadResource:
                continue
            if isinstance(item, resources.Address) and (item.namespace, item.pod) == (
                namespace,
                name,
            ):
                found.append(item.address)
        return tuple(sorted(found))

    def rule_text(self, number: int) -> str:
        """What a rule's number stands for; empty if nobody knows."""
        rule = self._projection.rule_numbers.key(number) if number else None
        if rule is None:
            return ""
        direction = "egress" if rule.egress else "ingress"
        return f"{direction} rule {rule.index} of {verdict.title(rule.namespace, rule.policy)}"

    def _party(self, addr: Addr, port: int) -> Party:
        return Party(text(addr), port, self.pod_name(addr))

    def _decided(self, event: Event) -> tuple[tuple[str, ...], str]:
        if event.reason == DropReason.BLOCKED:
            lists = self._projection.blocks.names(event.rule)
            return tuple(f"BlockList {name}" for name in lists), ""
        if event.rule:
            rule = self._projection.rule_numbers.key(event.rule)
            return ((f"{rule.namespace}/{rule.policy}",) if rule else ()), ""
        if not event.rule_set:
            return (), ""
        policy = self._projection.policy
        names = tuple("/".join(name) for name in policy.policies_of(event.rule_set))
        return names, self._near_miss(event)

    def _near_miss(self, event: Event) -> str:
        egress = event.direction == Direction.EGRESS
        content = self._projection.identity.content
        ends = (
            End(text(event.source), content(event.source_class)),
            End(text(event.destination), content(event.destination_class)),
        )
        subject, peer = ends if egress else ends[::-1]
        question = Question(egress, subject, peer, event.protocol, event.destination_port)
        known = self._projection.policies()
        policies = (
            verdict.of_resource(known[name], self._projection.identity.selector_key)
            for name in self._projection.policy.policies_of(event.rule_set)
            if name in known
        )
        return next((near.text() for near in verdict.near_misses(policies, question)), "")


def reason_text(number: int) -> str:
    try:
        return DropReason(number).name.lower().replace("_", "-")
    except ValueError:
        return f"reason {number}"
