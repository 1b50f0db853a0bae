# SPDX-License-Identifier: Apache-2.0
"""ClusterNetworkPolicy v1alpha2, parsed by the letter of its API; what cannot be understood fails
closed, as its types say for peers of a later version.

- An Accept rule loses the peers and protocols that cannot be understood; with none of either left,
  the rule goes. A Deny or Pass rule with any such becomes "Deny everything", in its place.
- Of a policy whose tier, priority or subject cannot be understood, nothing is accepted. In each
  direction where it has a Deny or a Pass, all pods that may be its subject are denied everything:
  those that what is understood of the subject selects, at worst all there are.
- A policy whose JSON cannot be read is like that, with a Deny in every direction in which it has
  anything.

`ClusterPolicies` says in condition Accepted, and by Events, what is not as written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from weir.api.address import parse_cidr
from weir.operator import wire
from weir.operator.claims import Tell
from weir.operator.conditions import Condition, Conditions
from weir.operator.objects import PROTOCOLS, Key, Parsed, Problem, key_of, port_number
from weir.operator.policy import Action, NetworkPolicy, PortRange, Rule, Tier, parse_label_selector
from weir.operator.selectors import EVERYTHING, InNamespaces, IpBlock, Nodes, Pods, Selector
from weir.operator.writes import Reference

API = "policy.networking.k8s.io/v1alpha2"
PATH = f"/apis/{API}/clusternetworkpolicies"
KIND = "ClusterNetworkPolicy"
ACCEPTED = "Accepted"
PROBLEMS_SHOWN = 3
PRIORITY_MOST = 1000
TIERS = {"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE}
ACTIONS = {"Accept": Action.ACCEPT, "Deny": Action.DENY, "Pass": Action.PASS}
EVERY_POD = Pods(InNamespaces(EVERYTHING), EVERYTHING)
LEFT_OUT = "the rule accepts nothing by it"
DENIES_ALL = "until that is changed the rule denies everything"
SUBJECT_DENIED = "until that is changed nothing is accepted, and all is denied where it has a Deny"

T = TypeVar("T")
_Peer = wire.ClusterSubject | wire.ClusterEgressPeer
_Rule = wire.ClusterIngressRule | wire.ClusterEgressRule


@dataclass(frozen=True, slots=True)
class ClusterPolicy:
    """`policy` is what is in force; None: nothing. `condition` is what its status says now."""

    key: Key
    uid: str
    generation: int
    policy: NetworkPolicy | None
    problems: tuple[Problem, ...]
    condition: Condition | None


_DECODER = msgspec.json.Decoder(wire.ClusterNetworkPolicy)


def read_cluster_policy(raw: msgspec.Raw) -> Parsed[ClusterPolicy]:
    """Problems are `ClusterPolicies`' to tell. DecodeError: not even its name can be read."""
    try:
        return parse_cluster_policy(_DECODER.decode(raw))
    except msgspec.DecodeError as error:
        return _unreadable(raw, error)


def parse_cluster_policy(raw: wire.ClusterNetworkPolicy) -> Parsed[ClusterPolicy]:
    spec = raw.spec
    doubts: list[Problem] = []
    tier = TIERS.get(spec.tier)
    if tier is None:
        doubts.append(Problem("spec.tier", f"{spec.tier!r} is neither Admin nor Baseline"))
    priority = spec.priority
    if priority is None or not 0 <= priority <= PRIORITY_MOST:
        text = f"{priority} is no priority: must be between 0 and {PRIORITY_MOST}"
        doubts.append(Problem("spec.priority", text))
        priority = 0
    subject, exact = _subject(spec.subject, doubts)
    problems = _consequence(doubts, SUBJECT_DENIED)
    certain = exact and not doubts
    rules = _rules(False, spec.ingress or (), certain, problems)
    rules += _rules(True, spec.egress or (), certain, problems)
    key = key_of(raw.metadata)
    return Parsed(
        ClusterPolicy(
            key,
            raw.metadata.uid,
            raw.metadata.generation or 0,
            _in_force(key, tier or Tier.ADMIN, priority, subject, rules),
            tuple(problems),
            _accepted(raw.status),
        )
    )


def _rules(
    egress: bool, written: Sequence[_Rule], certain: bool, problems: list[Problem]
) -> list[Rule]:
    """Of one direction. `certain`: whose rules they are, and when they apply, is understood."""
    made = [_rule(egress, i, rule, problems) for i, rule in enumerate(written)]
    if certain:
        return [rule for rule in made if rule is not None]
    fatal = [i for i, rule in enumerate(written) if rule.action != "Accept"]
    return [_deny_all(egress, i) for i in fatal[:1]]


def _in_force(
    key: Key, tier: Tier, priority: int, subject: Pods, rules: Sequence[Rule]
) -> NetworkPolicy | None:
    if not rules:
        return None
    return NetworkPolicy(
        key,
        subject,
        any(not rule.egress for rule in rules),
        any(rule.egress for rule in rules),
        tuple(rules),
        tier,
        priority,
    )


def _deny_all(egress: bool, index: int) -> Rule:
    return Rule(egress, index, None, (), Action.DENY)


def _consequence(problems: Iterable[Problem], words: str) -> list[Problem]:
    return [Problem(p.field, f"{p.message}: {words}") for p in problems]


class _RawSpec(wire.Struct):
    tier: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    subject: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    ingress: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    egress: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class _RawPolicy(wire.Struct):
    spec: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    status: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class _Meta(wire.Identity):
    uid: str = ""
    generation: int | None = None


class _WithMeta(wire.Struct):
    metadata: _Meta


def _unreadable(raw: msgspec.Raw, error: msgspec.DecodeError) -> Parsed[ClusterPolicy]:
    """What can still be read of it: tier, subject, and where it has rules."""
    meta = msgspec.json.decode(raw, type=_WithMeta).metadata
    parts = _try(raw, _RawPolicy) or _RawPolicy()
    spec = _try(parts.spec, _RawSpec)
    tier, subject, sides = Tier.ADMIN, EVERY_POD, [False, True]
    if spec is not None:
        tier = TIERS.get(_try(spec.tier, str) or "", tier)
        written = _try(spec.subject, wire.ClusterSubject)
        subject = _subject(written, [])[0] if written is not None else EVERY_POD
        given = ((False, spec.ingress), (True, spec.egress))
        sides = [egress for egress, rules in given if bytes(rules) not in (b"", b"null", b"[]")]
    text = f"cannot be read: {error}: until that is changed all is denied where it has rules"
    key = key_of(meta)
    return Parsed(
        ClusterPolicy(
            key,
            meta.uid,
            meta.generation or 0,
            _in_force(key, tier, 0, subject, [_deny_all(egress, 0) for egress in sides]),
            (Problem("", text),),
            _accepted(parts.status),
        )
    )


def _try(raw: msgspec.Raw, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError:
        return None


class _Status(wire.Struct):
    conditions: list[Condition] | None = None


def _accepted(raw: msgspec.Raw) -> Condition | None:
    status = _try(raw, _Status)
    conditions = (status.conditions if status else None) or []
    return next((c for c in conditions if c.type == ACCEPTED), None)


# Parts


def _subject(raw: wire.ClusterSubject, problems: list[Problem]) -> tuple[Pods, bool]:
    """The pods that may be meant, and whether it is those exactly."""
    if (raw.namespaces is None) is (raw.pods is None):
        problems.append(Problem("spec.subject", "needs exactly one of namespaces and pods"))
        return EVERY_POD, False
    return _pods(raw, "spec.subject", problems)


def _pods(raw: wire.ClusterSubject, field: str, problems: list[Problem]) -> tuple[Pods, bool]:
    """Of one that has namespaces or pods."""
    if raw.pods is None:
        names, exact = parse_label_selector(raw.namespaces, f"{field}.namespaces", problems)
        return Pods(InNamespaces(names), EVERYTHING), exact
    where = f"{field}.pods"
    namespaces = raw.pods.namespace_selector
    names, exact = parse_label_selector(namespaces, f"{where}.namespaceSelector", problems)
    labels, whole = parse_label_selector(raw.pods.pod_selector, f"{where}.podSelector", problems)
    if raw.pods.pod_selector is None:
        problems.append(
            Problem(f"{where}.podSelector", "is missing; an empty one selects every pod")
        )
        whole = False
    return Pods(InNamespaces(names), labels), exact and whole


def _rule(egress: bool, index: int, raw: _Rule, problems: list[Problem]) -> Rule | None:
    """None: it accepts nothing."""
    where = f"spec.{'egress' if egress else 'ingress'}[{index}]"
    found: list[Problem] = []
    action = ACTIONS.get(raw.action)
    if action is None:
        found.append(Problem(f"{where}.action", f"{raw.action!r} is not Accept, Deny or Pass"))
    written: Sequence[_Peer]
    if isinstance(raw, wire.ClusterEgressRule):
        side, written = "to", raw.to or ()
    else:
        side, written = "from", raw.from_ or ()
    if not written:
        found.append(Problem(f"{where}.{side}", "needs at least one peer"))
    peers = [_peer(peer, f"{where}.{side}[{i}]", found) for i, peer in enumerate(written)]
    ports = [
        _protocol(protocol, f"{where}.protocols[{i}]", found)
        for i, protocol in enumerate(raw.protocols or ())
    ]
    accepts = action is Action.ACCEPT
    problems += _consequence(found, LEFT_OUT if accepts else DENIES_ALL)
    if found and not accepts:
        return _deny_all(egress, index)
    selectors = tuple(dict.fromkeys(s for peer in peers for s in peer or ()))
    ranges = tuple(dict.fromkeys(r for port in ports for r in port or ()))
    if not selectors or (ports and not ranges):
        return None
    return Rule(egress, index, selectors, ranges, action or Action.DENY)


def _peer(raw: _Peer, field: str, problems: list[Problem]) -> tuple[Selector, ...] | None:
    kinds: dict[str, object] = {"namespaces": raw.namespaces, "pods": raw.pods}
    if isinstance(raw, wire.ClusterEgressPeer):
        kinds |= {"nodes": raw.nodes, "networks": raw.networks}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        has = " and ".join(given) or "none that Weir knows"
        text = f"needs exactly one of {', '.join(kinds)}, has {has}"
        problems.append(Problem(field, text))
        return None
    if not isinstance(raw, wire.ClusterEgressPeer) or given[0] in ("namespaces", "pods"):
        pods, exact = _pods(raw, field, problems)
        return (pods,) if exact else None
    if raw.nodes is not None:
        labels, exact = parse_label_selector(raw.nodes, f"{field}.nodes", problems)
        return (Nodes(labels),) if exact else None
    return _networks(raw.networks or (), f"{field}.networks", problems)


def _networks(
    texts: Sequence[str], field: str, problems: list[Problem]
) -> tuple[Selector, ...] | None:
    """None unless all can be read."""
    found: list[Selector] = []
    if not texts:
        problems.append(Problem(field, "needs at least one CIDR"))
    for i, text in enumerate(texts):
        try:
            found.append(IpBlock(parse_cidr(text)))
        except ValueError as error:
            problems.append(Problem(f"{field}[{i}]", str(error)))
    return tuple(found) if found and len(found) == len(texts) else None


def _protocol(
    raw: wire.ClusterProtocol, field: str, problems: list[Problem]
) -> tuple[PortRange, ...] | None:
    matches = {"TCP": raw.tcp, "UDP": raw.udp, "SCTP": raw.sctp}
    given = [(name, match) for name, match in matches.items() if match is not None]
    if len(given) + bool(raw.destination_named_port) != 1:
        text = "needs exactly one of tcp, udp, sctp and destinationNamedPort"
        problems.append(Problem(field, text))
        return None
    if raw.destination_named_port:
        name = raw.destination_named_port
        return tuple(PortRange(protocol, 0, 0, name) for protocol in PROTOCOLS.values())
    name, match = given[0]
    where = f"{field}.{name.lower()}.destinationPort"
    port = match.destination_port or wire.DestinationPort()
    if (port.number is None) is (port.range is None):
        problems.append(Problem(where, "needs exactly one of number and range"))
        return None
    if port.range is None:
        first = last = port_number(port.number, f"{where}.number", problems)
    else:
        first = port_number(port.range.start, f"{where}.range.start", problems)
        last = port_number(port.range.end, f"{where}.range.end", problems)
    if first is None or last is None:
        return None
    if last < first:
        problems.append(Problem(f"{where}.range", f"{last} is below {first}"))
        return None
    return (PortRange(PROTOCOLS[name], first, last),)


# What is told of them


@dataclass(slots=True)
class ClusterPolicies:
    """Keeps what was told of each that has problems."""

    tell: Tell
    conditions: Conditions
    _told: dict[Key, tuple[str, tuple[Problem, ...]]] = field(default_factory=dict)

    @property
    def with_problems(self) -> int:
        return len(self._told)

    def change(self, key: Key, new: ClusterPolicy | None) -> NetworkPolicy | None:
        """What is in force of it."""
        path = f"{PATH}/{key.name}/status"
        told = self._told.pop(key, ("", ()))
        if new is None:
            self.conditions.forget(path)
            return None
        self.conditions.want(path, condition(new), new.condition)
        if new.problems:
            self._told[key] = (new.uid, new.problems)
            if told != self._told[key]:
                about = Reference(API, KIND, "", key.name, new.uid, "", new.generation)
                self.tell(about, new.problems)
        return new.policy


def condition(of: ClusterPolicy) -> Condition:
    if not of.problems:
        return Condition(ACCEPTED, "True", "Accepted", "in force as written", of.generation)
    shown = "; ".join(
        f"{p.field}: {p.message}" if p.field else p.message for p in of.problems[:PROBLEMS_SHOWN]
    )
    more = len(of.problems) - PROBLEMS_SHOWN
    text = f"{shown}; and {more} more problems" if more > 0 else shown
    return Condition(ACCEPTED, "False", "Invalid", text, of.generation)
