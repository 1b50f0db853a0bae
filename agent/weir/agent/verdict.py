# SPDX-License-Identifier: Apache-2.0
"""What policies say about one flow in one direction, and what would have to change.

Written from the specifications, over policies as the operator names them and classes by content:
no map, row or rule set is looked at, so that the answer can be held against what a node's maps say
(weir.agent.judge). The command evaluates policies that nobody has applied by it, too.

A near miss is a rule that would have let a denied flow through, and matches all but the port, or
all but the peer: most often that is the mistake.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from weir.agent import resources
from weir.agent.classes import NOTHING, ClassContent
from weir.agent.identity import Identity
from weir.agent.resources import Action, PortRange, Tier
from weir.agent.rule_sets import STAGES, describe_policy

PROTOCOLS = {1: "ICMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
NEAR_MISSES = 5
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Rule:
    index: int  # in spec.ingress or spec.egress
    peers: frozenset[str] | None  # selector keys; None: every peer
    ports: tuple[PortRange, ...]  # empty: everything
    action: Action = Action.ACCEPT


@dataclass(frozen=True, slots=True)
class Policy:
    """Selectors by key; None: says nothing about that direction."""

    namespace: str  # empty: a ClusterNetworkPolicy
    name: str
    subject: str
    egress: tuple[Rule, ...] | None
    ingress: tuple[Rule, ...] | None
    tier: Tier = Tier.NETWORK_POLICY
    priority: int = 0

    def rules(self, egress: bool) -> tuple[Rule, ...] | None:
        return self.egress if egress else self.ingress

    @property
    def order(self) -> tuple[int, int, str, str]:
        return (STAGES[self.tier], self.priority, self.namespace, self.name)

    @property
    def title(self) -> str:
        return describe_policy((self.namespace, self.name))


class Standing(enum.Enum):
    """What an end of a flow is, where that decides more than its class."""

    ORDINARY = "ordinary"
    UNKNOWN = "unknown"  # a pod's address, or a pod, whose class the node does not know
    ITSELF = "itself"  # the pod at the other end


@dataclass(frozen=True, slots=True)
class Party:
    """own_node: of the pod at the other end."""

    name: str  # for texts
    content: ClassContent = NOTHING
    standing: Standing = Standing.ORDINARY
    own_node: bool = False


@dataclass(frozen=True, slots=True)
class Question:
    """May the subject open this flow to the peer, or be its target?"""

    egress: bool
    subject: Party
    peer: Party
    protocol: int
    port: int  # of the target

    @property
    def direction(self) -> str:
        return "egress" if self.egress else "ingress"

    @property
    def target(self) -> Party:
        return self.peer if self.egress else self.subject


class Ground(enum.StrEnum):
    """What a decision rests on."""

    RULE = "rule"
    NO_RULE = "no-rule"
    NOT_ISOLATED = "not-isolated"
    ITSELF = "itself"
    OWN_NODE = "own-node"
    UNKNOWN_PEER = "unknown-peer"
    UNKNOWN_SUBJECT = "unknown-subject"


@dataclass(frozen=True, slots=True)
class Near:
    """missed: "port" or "peer". wants, has: of the rule and of the flow."""

    policy: str
    direction: str
    index: int
    missed: str
    wants: str
    has: str

    def text(self) -> str:
        return (
            f"{self.direction} rule {self.index} of {self.policy} matches all but the {self.missed}"
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """policies: those that select the subject and speak of the direction, as they are asked."""

    allowed: bool
    ground: Ground
    policies: tuple[Policy, ...] = ()
    by: Policy | None = None
    rule: Rule | None = None


def tier_text(tier: Tier) -> str:
    return tier.name.lower().replace("_", "-")


def of_resource(item: resources.Policy, identity: Identity) -> Policy:
    return Policy(
        item.namespace,
        item.name,
        identity.selector_key(item.subject),
        tuple(_rules(item, identity, True)) if item.egress else None,
        tuple(_rules(item, identity, False)) if item.ingress else None,
        item.tier,
        item.priority,
    )


def _rules(item: resources.Policy, identity: Identity, egress: bool) -> Iterator[Rule]:
    for rule in item.rules:
        if rule.egress != egress:
            continue
        if rule.action != Action.ACCEPT and not identity.knows_selectors(rule.peers):
            # Whom it is about is not known: it may not be fewer than were meant.
            yield Rule(rule.index, None, (), Action.DENY)
            continue
        peers = None if rule.any_peer else frozenset(map(identity.selector_key, rule.peers))
        yield Rule(rule.index, peers, rule.ports, rule.action)


def decide(selecting: Iterable[Policy], question: Question) -> Decision:
    """`selecting`: the policies that select the subject."""
    subject, peer = question.subject, question.peer
    if peer.standing is Standing.ITSELF:
        return Decision(True, Ground.ITSELF)
    if peer.own_node and not question.egress:
        return Decision(True, Ground.OWN_NODE)
    if subject.standing is Standing.UNKNOWN:
        return Decision(False, Ground.UNKNOWN_SUBJECT)
    speaking = (policy for policy in selecting if policy.rules(question.egress) is not None)
    about = tuple(sorted(speaking, key=lambda policy: policy.order))
    admin, isolating, baseline = (
        [policy for policy in about if policy.tier is tier]
        for tier in (Tier.ADMIN, Tier.NETWORK_POLICY, Tier.BASELINE)
    )
    if peer.standing is Standing.UNKNOWN and (admin or baseline):
        return Decision(False, Ground.UNKNOWN_PEER, about)
    first = _first(admin, question)
    if first is not None and first[1].action is not Action.PASS:
        return _decided(about, first)
    if isolating:
        if peer.own_node:
            return Decision(True, Ground.OWN_NODE, about)
        first = _first(isolating, question)
        if first is not None:
            return _decided(about, first)
        unknown = peer.standing is Standing.UNKNOWN
        ground = Ground.UNKNOWN_PEER if unknown else Ground.NO_RULE
        return Decision(False, ground, about)
    first = _first(baseline, question)
    if first is not None and first[1].action is not Action.PASS:
        return _decided(about, first)
    return Decision(True, Ground.OWN_NODE if peer.own_node else Ground.NOT_ISOLATED, about)


def _first(policies: Sequence[Policy], question: Question) -> tuple[Policy, Rule] | None:
    for policy in policies:
        for rule in policy.rules(question.egress) or ():
            if matches_peer(rule, question) and matches_port(rule, question):
                return policy, rule
    return None


def _decided(about: tuple[Policy, ...], by: tuple[Policy, Rule]) -> Decision:
    policy, rule = by
    return Decision(rule.action is Action.ACCEPT, Ground.RULE, about, policy, rule)


def missed(decision: Decision, question: Question) -> tuple[Near, ...]:
    """The near misses of a denial by policies, not of one for want of knowledge."""
    if decision.allowed or decision.ground not in (Ground.RULE, Ground.NO_RULE):
        return ()
    if decision.by is not None and decision.rule is not None:
        before = _until(decision.policies, (decision.by, decision.rule), question.egress)
        return near_misses(before, question, {Action.ACCEPT, Action.PASS})
    asked = (policy for policy in decision.policies if policy.tier is not Tier.BASELINE)
    return near_misses(asked, question, {Action.ACCEPT})


def _until(about: Sequence[Policy], by: tuple[Policy, Rule], egress: bool) -> Iterator[Policy]:
    """What comes before the rule that decided, in its tier."""
    policy, rule = by
    for other in about:
        if other.tier is policy.tier and other.order <= policy.order:
            rules = other.rules(egress) or ()
            if other is policy:
                rules = rules[: rules.index(rule)]
            yield Policy(
                other.namespace, other.name, other.subject, rules, rules, other.tier, other.priority
            )


# ---- rules


def matches_peer(rule: Rule, question: Question) -> bool:
    if rule.peers is None:
        return True
    unknown = question.peer.standing is Standing.UNKNOWN
    return not unknown and not rule.peers.isdisjoint(question.peer.content.selectors)


def matches_port(rule: Rule, question: Question) -> bool:
    if not rule.ports:
        return True
    named = question.target.content.ports
    for wanted in rule.ports:
        if wanted.protocol != question.protocol:
            continue
        if not wanted.name:
            if wanted.first <= question.port <= wanted.last:
                return True
        elif resources.NamedPort(wanted.name, question.protocol, question.port) in named:
            return True
    return False


def near_misses(
    policies: Iterable[Policy], question: Question, actions: Collection[Action]
) -> tuple[Near, ...]:
    """Rules with such actions that match but for one of the two things that they ask for."""
    found: list[Near] = []
    for policy in policies:
        for rule in policy.rules(question.egress) or ():
            by_peer, by_port = matches_peer(rule, question), matches_port(rule, question)
            if by_peer == by_port or rule.action not in actions:
                continue
            wants, has = _port_gap(rule, question) if by_peer else _peer_gap(rule, question)
            missed = "port" if by_peer else "peer"
            found.append(Near(policy.title, question.direction, rule.index, missed, wants, has))
            if len(found) == NEAR_MISSES:
                return tuple(found)
    return tuple(found)


def _port_gap(rule: Rule, question: Question) -> tuple[str, str]:
    has = port_text(question.protocol, question.port)
    names = {wanted.name for wanted in rule.ports if wanted.name}
    target = question.target
    if names:
        known = sorted(port for port in target.content.ports if port.name in names)
        meant = [f"{p.name} is {port_text(p.protocol, p.port)}" for p in known]
        has += (
            f"; at {target.name} {', '.join(meant) or f'no port is called {_some(sorted(names))}'}"
        )
    return _some([_range_text(wanted) for wanted in rule.ports]), has


def _peer_gap(rule: Rule, question: Question) -> tuple[str, str]:
    peer = question.peer
    selected = sorted(peer.content.selectors)
    by = f"selected by {_some(selected, 'and')}" if selected else ""
    has = by or "which no policy's selector selects"
    return _some(sorted(rule.peers or ())), f"{peer.name}, {has}"


def _some(texts: Sequence[str], word: str = "or") -> str:
    more = f" {word} {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return f" {word} ".join(texts[:SHOWN]) + more


def _range_text(wanted: PortRange) -> str:
    protocol = PROTOCOLS.get(wanted.protocol, str(wanted.protocol))
    if wanted.name:
        return f"{protocol} port {wanted.name}"
    if (wanted.first, wanted.last) == (0, 65535):
        return f"any {protocol} port"
    last = f"-{wanted.last}" if wanted.last != wanted.first else ""
    return f"{protocol} port {wanted.first}{last}"


def port_text(protocol: int, port: int) -> str:
    name = PROTOCOLS.get(protocol, str(protocol))
    return f"{name} port {port}" if protocol in (6, 17, 132) else name


# ---- in words


def because(decision: Decision, question: Question) -> str:
    """Why, in a sentence's end."""
    who, direction = question.subject.name, question.direction
    if decision.by is not None and decision.rule is not None:
        verb = {Action.ACCEPT: "accepts", Action.DENY: "denies"}[decision.rule.action]
        return f"{direction} rule {decision.rule.index} of {decision.by.title} {verb} it"
    match decision.ground:
        case Ground.ITSELF:
            return "a pod always reaches itself"
        case Ground.OWN_NODE:
            return "between a pod and its own node NetworkPolicies forbid nothing"
        case Ground.UNKNOWN_PEER:
            by = _and([policy.title for policy in decision.policies])
            return f"the node does not know yet which pod has {question.peer.name}, as {by} asks"
        case Ground.UNKNOWN_SUBJECT:
            return f"the node does not know yet which policies select {who}"
        case Ground.NO_RULE:
            names = [p.title for p in decision.policies if p.tier is Tier.NETWORK_POLICY]
            verb, none = (
                ("isolates", "it has no rule")
                if len(names) == 1
                else ("isolate", "none of them has a rule")
            )
            return f"{_and(names)} {verb} {who}, and {none} that matches"
        case _:
            named = " that decides" if decision.policies else ""
            return f"no policy{named} selects {who} for {direction}"


def change(decision: Decision, question: Question) -> str:
    """What would have to be otherwise; empty if it is allowed."""
    if decision.allowed:
        return ""
    peer, port = question.peer.name, port_text(question.protocol, question.port)
    match decision.ground:
        case Ground.UNKNOWN_PEER | Ground.UNKNOWN_SUBJECT:
            return "nothing, if the pod has just started; else see `weir status` for its operator"
        case Ground.NO_RULE:
            names = [p.title for p in decision.policies if p.tier is Tier.NETWORK_POLICY]
            where = names[0] if len(names) == 1 else f"one of {_and(names)}"
            return f"{where} needs an {question.direction} rule with {peer} and {port}"
        case _:
            return (
                f"that rule must not match {peer} and {port}, or a rule before it must accept them"
            )


def _and(names: Sequence[str]) -> str:
    if len(names) > SHOWN:
        return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN} more"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
