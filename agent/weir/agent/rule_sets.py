# SPDX-License-Identifier: Apache-2.0
"""Rule sets, and what rows they have for a peer's class: pure functions of their rules.

A **rule set** is one direction's rules of the policies that select a subject. With NetworkPolicies
alone it is a union: any rule that matches allows. With rules of ClusterNetworkPolicies it is
*ordered*: rows carry the rank of their rule, and the first rule that matches decides. Rows of the
Admin tier have keys of their own (LEVEL_ADMIN), as both a rule that passes and one of the next tier
may match the same packets.

In place only what a union is made of may change. An ordered rule set's rules never do: a digest of
them is part of its key, so other rules are another rule set, with rows of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from weir.agent.classes import ClassContent
from weir.agent.ports import EVERYTHING, PortPrefix, prefixes
from weir.agent.resources import NamedPort, Tier
from weir.datapath import records
from weir.datapath.records import IsolationFlag, PolicyLevel, PolicyOrder, Verdict

CLASS_ANY = 0
# Rule set 1 has no rows: whoever is in it gets nothing through.
DENY_ALL = 1
FIRST_RULE_SET = 2
# Orders of the Admin tier.
RULES_MAX = int(PolicyOrder.NETWORK_POLICY)

PolicyName = tuple[str, str]
"""Namespace and name; of a ClusterNetworkPolicy, no namespace."""


class Stage(IntEnum):
    """Tiers as they are evaluated."""

    ADMIN = 0
    NETWORK_POLICY = 1
    BASELINE = 2


STAGES = {
    Tier.ADMIN: Stage.ADMIN,
    Tier.NETWORK_POLICY: Stage.NETWORK_POLICY,
    Tier.BASELINE: Stage.BASELINE,
}


FIRST_ORDER = {
    Stage.ADMIN: 0,
    Stage.NETWORK_POLICY: int(PolicyOrder.NETWORK_POLICY),
    Stage.BASELINE: int(PolicyOrder.BASELINE),
}


def describe_policy(name: PolicyName) -> str:
    """As its user knows it."""
    namespace, rest = name
    return f"{namespace}/{rest}" if namespace else f"ClusterNetworkPolicy {rest}"


@dataclass(frozen=True, slots=True)
class PortSpec:
    """Port prefixes, or the name of a port that the destination's class resolves."""

    prefixes: tuple[PortPrefix, ...] = ()
    name: str = ""
    protocol: int = 0


@dataclass(frozen=True, slots=True)
class PolicyRule:
    number: int
    index: int
    peers: frozenset[str] | None  # selector keys; None: every peer
    ports: tuple[PortSpec, ...]  # empty: everything
    verdict: Verdict = Verdict.ALLOW

    @property
    def digest(self) -> str:
        """Of what it says; numbers are the node's own."""
        peers = sorted(self.peers) if self.peers is not None else None
        return repr((self.index, int(self.verdict), peers, self.ports))


@dataclass(frozen=True, slots=True)
class PolicyContent:
    """A policy with selectors by key; None: does not isolate in that direction, or has no rules for
    it if it is a ClusterNetworkPolicy."""

    subject: str
    ingress: tuple[PolicyRule, ...] | None
    egress: tuple[PolicyRule, ...] | None
    stage: Stage = Stage.NETWORK_POLICY
    priority: int = 0

    def rules(self, egress: bool) -> tuple[PolicyRule, ...] | None:
        return self.egress if egress else self.ingress

    def digest(self, egress: bool) -> str:
        rules = [rule.digest for rule in self.rules(egress) or ()]
        return repr((int(self.stage), self.priority, rules))


@dataclass(frozen=True, slots=True)
class RuleName:
    """What a rule number in an event stands for."""

    namespace: str
    policy: str
    egress: bool
    index: int

    def __str__(self) -> str:
        where = "egress" if self.egress else "ingress"
        return f"{where} rule {self.index} of {describe_policy((self.namespace, self.policy))}"


@dataclass(frozen=True, slots=True)
class RuleSetKey:
    """A policy that gets other subjects counts as another one: when its rules change with them,
    no subject may be in a rule set that has old and new ones. digest: of an ordered set's rules."""

    egress: bool
    policies: tuple[PolicyName, ...]
    ports: frozenset[NamedPort]  # the subject's, where an ingress rule names a port
    subjects: tuple[str, ...] = ()  # of the policies, in their order
    digest: str = ""

    @property
    def ordered(self) -> bool:
        return bool(self.digest)


class Ranked(NamedTuple):
    """A rule in its place: of the Admin tier or not, and the order that its rows get."""

    admin: bool
    order: int
    rule: PolicyRule


@dataclass(slots=True)
class RuleSet:
    number: int
    key: RuleSetKey
    subjects: set[int] = field(default_factory=set)
    ranked: list[Ranked] = field(default_factory=list)
    levels: int = 0
    selectors: set[str] = field(default_factory=set)
    keys: dict[int, tuple[records.PolicyKey, ...]] = field(default_factory=dict)

    @property
    def rules(self) -> list[PolicyRule]:
        return [ranked.rule for ranked in self.ranked]

    @property
    def isolation(self) -> records.Isolation:
        return records.Isolation(self.number, self.levels)

    @property
    def names_every_peers_port(self) -> bool:
        """An egress rule for every peer that names a port: each class resolves it itself."""
        return self.key.egress and any(
            rule.peers is None and any(spec.name for spec in rule.ports)
            for _, _, rule in self.ranked
        )

    def set_rules(self, policies: Iterable[tuple[PolicyName, PolicyContent]]) -> None:
        """Of its policies."""
        known = list(policies)
        self.ranked = ranked(known, self.key.egress)
        self.levels = _levels(self.rules)
        if self.key.ordered:
            self.levels |= IsolationFlag.ORDERED
            if all(content.stage != Stage.NETWORK_POLICY for _, content in known):
                self.levels |= IsolationFlag.DEFAULT_ALLOW
        if too_many(self.ranked):
            self.levels |= IsolationFlag.SHUT
            self.ranked = []

    def rows(
        self, peer: int, content: ClassContent | None
    ) -> Iterator[tuple[records.PolicyKey, records.PolicyVerdict]]:
        """For one peer class; content None: for CLASS_ANY. The first rule of those with one key."""
        egress = self.key.egress
        seen: set[tuple[bool, PortPrefix]] = set()
        for admin, order, rule in self.ranked:
            if rule.peers is None:
                if content is not None and not (egress and any(spec.name for spec in rule.ports)):
                    continue
            elif content is None or rule.peers.isdisjoint(content.selectors):
                continue
            named = self.key.ports if not egress else content.ports if content else frozenset()
            only_named = rule.peers is None and content is not None
            for match in _matches(rule, named, only_named):
                if (admin, match) not in seen:
                    seen.add((admin, match))
                    bits = match.bits | (PolicyLevel.ADMIN if admin else 0)
                    key = records.PolicyKey(self.number, peer, match.port, match.protocol, bits)
                    yield key, records.PolicyVerdict(rule.number, order, rule.verdict)


def ranked(policies: Sequence[tuple[PolicyName, PolicyContent]], egress: bool) -> list[Ranked]:
    """The rules of one direction, as they are evaluated: by tier, priority and name. Where a
    NetworkPolicy isolates, nothing comes as far as the Baseline tier."""
    found = []
    counts = dict.fromkeys(Stage, 0)
    stages = {content.stage for _, content in policies}
    if Stage.NETWORK_POLICY in stages:
        policies = [item for item in policies if item[1].stage != Stage.BASELINE]
    for _, content in sorted(policies, key=lambda item: (item[1].stage, item[1].priority, item[0])):
        stage = content.stage
        for rule in content.rules(egress) or ():
            found.append(Ranked(stage == Stage.ADMIN, FIRST_ORDER[stage] + counts[stage], rule))
            counts[stage] += stage != Stage.NETWORK_POLICY
    return found


def too_many(rules: Iterable[Ranked]) -> bool:
    """More than there are orders."""
    return any(item.order >= (RULES_MAX if item.admin else 1 << 16) for item in rules)


def _matches(
    rule: PolicyRule, named: frozenset[NamedPort], only_named: bool
) -> Iterator[PortPrefix]:
    if not rule.ports:
        yield EVERYTHING
    for spec in rule.ports:
        if spec.name:
            for port in named:
                if port.name == spec.name and port.protocol == spec.protocol:
                    yield PortPrefix(port.protocol, port.port, 16)
        elif not only_named:
            yield from spec.prefixes


def _levels(rules: Iterable[PolicyRule]) -> int:
    levels = 0
    for rule in rules:
        if not rule.ports:
            levels |= 1 << EVERYTHING.bits
        for spec in rule.ports:
            if spec.name:
                levels |= 1 << 16
            for prefix in spec.prefixes:
                levels |= 1 << prefix.bits
    return levels


def port_spec(protocol: int, first: int, last: int, name: str) -> PortSpec:
    if name:
        return PortSpec((), name, protocol)
    return PortSpec(tuple(prefixes(protocol, first, last)))
