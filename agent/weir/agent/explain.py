# SPDX-License-Identifier: Apache-2.0
"""Events of the datapath in the words of the cluster: pods, policies, near misses.

A near miss is a rule of the policies that denied a packet which matches all but the port, or
all but the peer: most often that is the mistake.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import msgspec

from weir.agent import resources
from weir.agent.errors import BadResource
from weir.agent.rule_sets import PolicyRule, describe_policy
from weir.agent.tables import Projection
from weir.api.address import Addr, text
from weir.datapath.records import Direction, DropReason, Event, EventKind, Verdict

PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}


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
            reason=_reason(event.reason) if not passed else "",
            direction=Direction(event.direction).name.lower() if event.direction < 2 else "",
            protocol=PROTOCOLS.get(event.protocol, str(event.protocol)),
            source=self._party(event.source, event.source_port),
            destination=self._party(event.destination, event.destination_port),
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

    def _party(self, addr: Addr, port: int) -> Party:
        return Party(text(addr), port, self.pod_name(addr))

    def _decided(self, event: Event) -> tuple[tuple[str, ...], str, str]:
        """Policies, the rule that decided, a near miss."""
        if event.reason == DropReason.BLOCKED:
            lists = self._projection.blocks.names(event.rule)
            return tuple(f"BlockList {name}" for name in lists), "", ""
        if event.rule:
            rule = self._projection.rule_numbers.key(event.rule)
            if rule is None:
                return (), "", ""
            return (describe_policy((rule.namespace, rule.policy)),), str(rule), ""
        if not event.rule_set or event.kind == EventKind.ALLOW:
            return (), "", ""
        names = self._projection.policy.policies_of(event.rule_set)
        if event.reason != DropReason.UNKNOWN_PEER:
            # No rule denied it: so they did who let nothing through but what a rule allows.
            names = tuple(name for name in names if name[0]) or names
        return tuple(map(describe_policy, names)), "", self._near_miss(event)

    def _near_miss(self, event: Event) -> str:
        egress = event.direction == Direction.EGRESS
        peer = event.destination_class if egress else event.source_class
        subject = event.source_class if egress else event.destination_class
        content = self._projection.identity.content(peer)
        named = self._projection.identity.content(peer if egress else subject).ports
        rule_set = self._projection.policy.rule_set(event.rule_set)
        for rule in rule_set.rules if rule_set is not None else ():
            if rule.verdict != Verdict.ALLOW:
                continue
            by_peer = rule.peers is None or not rule.peers.isdisjoint(content.selectors)
            by_port = _port_matches(rule, event, {(p.name, p.protocol, p.port) for p in named})
            label = self._projection.rule_numbers.key(rule.number)
            if by_peer == by_port or label is None:
                continue
            missed = "port" if by_peer else "peer"
            return f"{label} matches all but the {missed}"
        return ""


def _port_matches(rule: PolicyRule, event: Event, named: set[tuple[str, int, int]]) -> bool:
    if not rule.ports:
        return True
    port, protocol = event.destination_port, event.protocol
    for spec in rule.ports:
        if spec.name and (spec.name, protocol, port) in named and spec.protocol == protocol:
            return True
        for prefix in spec.prefixes:
            if prefix.protocol == protocol and prefix.port >> (16 - prefix.bits) == port >> (
                16 - prefix.bits
            ):
                return True
    return False


def _reason(number: int) -> str:
    try:
        return DropReason(number).name.lower().replace("_", "-")
    except ValueError:
        return f"reason {number}"


def _kind(number: int) -> str:
    try:
        return EventKind(number).name.lower()
    except ValueError:
        return f"kind {number}"
