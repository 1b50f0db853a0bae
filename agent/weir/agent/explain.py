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
from weir.agent.resources import Action
from weir.agent.rule_sets import describe_policy
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
    """An event for people and for JSON. verdict: "drop", "allow" or "audit", which is what would
    have been dropped for the reason. policies: of those that decided namespace/name,
    "ClusterNetworkPolicy NAME" or "BlockList NAME". rule: the one that denies it, if one does."""

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
    rule: str = ""


class Explainer:
    def __init__(self, projection: Projection, encoded: Mapping[str, bytes]) -> None:
        self._projection = projection
        self._encoded = encoded

    def explain(self, event: Event, clock: Callable[[], float] = time.time) -> Explained:
        passed = event.kind == EventKind.ALLOW
        policies, rule, near_miss = self._decided(event)
        behind = (time.monotonic_ns() - event.time_ns) / 1e9
        return Explained(
            time=clock() - behind,
            verdict=_kind(event.kind),
            reason=reason_text(event.reason) if not passed else "",
            direction=Direction(event.direction).name.lower() if event.direction < 2 else "",
            protocol=PROTOCOLS.get(event.protocol, str(event.protocol)),
            source=self.party(event.source, event.source_port),
            destination=self.party(event.destination, event.destination_port),
            policies=policies,
            near_miss=near_miss,
            bytes=event.length,
            rule=rule if not passed else "",
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

    def party(self, addr: Addr, port: int) -> Party:
        return Party(text(addr), port, self.pod_name(addr))

    def _decided(self, event: Event) -> tuple[tuple[str, ...], str, str]:
        """Policies, the rule that decided, a near miss."""
        if event.reason == DropReason.BLOCKED:
            lists = self._projection.blocks.names(event.rule)
            return tuple(f"BlockList {name}" for name in lists), "", ""
        if not event.rule and event.kind == EventKind.ALLOW:
            return (), "", ""
        policies, rule = self.deciders(event.rule, event.rule_set, event.reason)
        near_miss = self._near_miss(event) if event.rule_set and not event.rule else ""
        return policies, rule, near_miss

    def deciders(self, rule: int, rule_set: int, reason: int) -> tuple[tuple[str, ...], str]:
        """Policies that decided, and the rule by which, if one did, as people know them."""
        if rule:
            known = self._projection.rule_numbers.key(rule)
            if known is None:
                return (), ""
            return (describe_policy((known.namespace, known.policy)),), str(known)
        names = self._projection.policy.policies_of(rule_set)
        if reason != DropReason.UNKNOWN_PEER:
            # No rule denied it: so they did who let nothing through but what a rule allows.
            names = tuple(name for name in names if name[0]) or names
        return tuple(map(describe_policy, names)), ""

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
            verdict.of_resource(known[name], self._projection.identity)
            for name in self._projection.policy.policies_of(event.rule_set)
            if name in known
        )
        near_misses = verdict.near_misses(policies, question, {Action.ACCEPT})
        return next((near.text() for near in near_misses), "")


def reason_text(number: int) -> str:
    try:
        return DropReason(number).name.lower().replace("_", "-")
    except ValueError:
        return f"reason {number}"


def _kind(number: int) -> str:
    try:
        return EventKind(number).name.lower()
    except ValueError:
        return f"kind {number}"
