# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy, parsed by the letter of its spec; what cannot be understood fails closed.

- A peer or port that cannot be understood allows nothing; the rule's other ones still do. A rule
  with no peer or no port left is dropped: left empty it would allow everything.
- A subject with a requirement that cannot be understood isolates the pods that the others
  select (at worst the namespace), which is a superset of what was meant, in both directions, and
  the policy allows nothing: its rules could open other pods than they were written for.
- An unknown policy type isolates in both directions.
- A policy whose JSON cannot be read isolates its whole namespace (`unreadable_policy`).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass

from weir.api.address import Cidr, parse_cidr
from weir.operator import wire
from weir.operator.objects import (
    Key,
    Parsed,
    Problem,
    key_of,
    port_number,
    protocol_number,
)
from weir.operator.selectors import (
    EVERYTHING,
    InNamespace,
    InNamespaces,
    IpBlock,
    LabelSelector,
    Operator,
    Pods,
    Requirement,
    Scope,
    Selector,
    label_selector,
)

_LABEL_TEXT = re.compile(r"(?:[A-Za-z0-9][-A-Za-z0-9_./]*)?")


class Tier(enum.Enum):
    """Named as in the protocol."""

    NETWORK_POLICY = enum.auto()
    ADMIN = enum.auto()
    BASELINE = enum.auto()


class Action(enum.Enum):
    """Named as in the protocol. NetworkPolicies only accept."""

    ACCEPT = enum.auto()
    DENY = enum.auto()
    PASS = enum.auto()


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports of one protocol: `first` to `last` (0 to 65535: the whole protocol), or a name."""

    protocol: int
    first: int
    last: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Rule:
    egress: bool
    index: int  # in spec.ingress or spec.egress
    peers: tuple[Selector, ...] | None  # None: every peer
    ports: tuple[PortRange, ...]  # empty: every protocol and port
    action: Action = Action.ACCEPT


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """Of any tier: what is in force of a ClusterNetworkPolicy is one as well."""

    key: Key
    subject: Pods
    ingress: bool  # isolates in this direction; has rules in it, if it is the cluster's
    egress: bool
    rules: tuple[Rule, ...]
    tier: Tier = Tier.NETWORK_POLICY
    priority: int = 0  # the lower, the earlier among those of its tier


def unreadable_policy(key: Key) -> NetworkPolicy:
    """What stands in for a policy whose content is no NetworkPolicy at all."""
    return NetworkPolicy(key, Pods(InNamespace(key.namespace), EVERYTHING), True, True, ())


def parse_policy(raw: wire.NetworkPolicy) -> Parsed[NetworkPolicy]:
    key = key_of(raw.metadata)
    problems: list[Problem] = []
    subject, exact = parse_label_selector(raw.spec.pod_selector, "spec.podSelector", problems)
    types = raw.spec.policy_types
    if not types:
        types = ["Ingress", "Egress"] if raw.spec.egress else ["Ingress"]
    known = True
    for i, name in enumerate(types):
        if name not in ("Ingress", "Egress"):
            problems.append(Problem(f"spec.policyTypes[{i}]", f"unknown type {name!r}"))
            known = False
    ingress = "Ingress" in types or not known or not exact
    egress = "Egress" in types or not known or not exact
    for name, isolates, given in (
        ("Ingress", ingress, raw.spec.ingress),
        ("Egress", egress, raw.spec.egress),
    ):
        if given and not isolates:
            message = f"has no effect: spec.policyTypes does not name {name}"
            problems.append(Problem(f"spec.{name.lower()}", message))
    rules: list[Rule] = []
    if ingress:
        for i, rule_in in enumerate(raw.spec.ingress or []):
            made = _rule(key.namespace, (False, i), rule_in.from_, rule_in.ports, problems)
            rules += [made] if made else []
    if egress:
        for i, rule_out in enumerate(raw.spec.egress or []):
            made = _rule(key.namespace, (True, i), rule_out.to, rule_out.ports, problems)
            rules += [made] if made else []
    if not exact:
        rules = []
    pods = Pods(InNamespace(key.namespace), subject)
    return Parsed(
        NetworkPolicy(key, pods, ingress, egress, tuple(rules)),
        tuple(problems),
    )


def _rule(
    namespace: str,
    direction: tuple[bool, int],
    raw_peers: Sequence[wire.Peer] | None,
    raw_ports: Sequence[wire.PolicyPort] | None,
    problems: list[Problem],
) -> Rule | None:
    egress, index = direction
    field = f"spec.{'egress' if egress else 'ingress'}[{index}]"
    peers: tuple[Selector, ...] | None = None
    if raw_peers:
        where = f"{field}.{'to' if egress else 'from'}"
        found = [
            _peer(namespace, peer, f"{where}[{i}]", problems) for i, peer in enumerate(raw_peers)
        ]
        peers = tuple(dict.fromkeys(peer for peer in found if peer is not None))
        if not peers:
            return None
    ports: tuple[PortRange, ...] = ()
    if raw_ports:
        ranges = [_port(port, f"{field}.ports[{i}]", problems) for i, port in enumerate(raw_ports)]
        ports = tuple(dict.fromkeys(port for port in ranges if port is not None))
        if not ports:
            return None
    return Rule(egress, index, peers, ports)


def _peer(namespace: str, raw: wire.Peer, field: str, problems: list[Problem]) -> Selector | None:
    if raw.ip_block is not None:
        if raw.pod_selector is not None or raw.namespace_selector is not None:
            problems.append(Problem(field, "ipBlock cannot be combined with selectors"))
            return None
        return _ip_block(raw.ip_block, f"{field}.ipBlock", problems)
    if raw.pod_selector is None and raw.namespace_selector is None:
        problems.append(Problem(field, "a peer needs podSelector, namespaceSelector or ipBlock"))
        return None
    pods, pods_exact = parse_label_selector(raw.pod_selector, f"{field}.podSelector", problems)
    scope: Scope = InNamespace(namespace)
    scope_exact = True
    if raw.namespace_selector is not None:
        labels, scope_exact = parse_label_selector(
            raw.namespace_selector, f"{field}.namespaceSelector", problems
        )
        scope = InNamespaces(labels)
    return Pods(scope, pods) if pods_exact and scope_exact else None


def _ip_block(raw: wire.IpBlock, field: str, problems: list[Problem]) -> IpBlock | None:
    try:
        block = parse_cidr(raw.cidr)
    except ValueError as error:
        problems.append(Problem(f"{field}.cidr", str(error)))
        return None
    excepts: set[Cidr] = set()
    for i, text in enumerate(raw.except_ or []):
        try:
            hole = parse_cidr(text)
        except ValueError as error:
            # What was to be kept out is not known, so none of the block is let in.
            problems.append(Problem(f"{field}.except[{i}]", str(error)))
            return None
        outside = hole.is_ipv4 is not block.is_ipv4 or not block.contains(hole.address)
        if outside or hole.bits <= block.bits:
            problems.append(
                Problem(f"{field}.except[{i}]", f"{text} is not strictly within {raw.cidr}")
            )
            if not hole.overlaps(block) or hole.is_ipv4 is not block.is_ipv4:
                continue
            return None
        excepts.add(hole)
    return IpBlock(block, tuple(sorted(excepts)))


def _port(raw: wire.PolicyPort, field: str, problems: list[Problem]) -> PortRange | None:
    protocol = protocol_number(raw.protocol, f"{field}.protocol", problems)
    if protocol is None:
        return None
    if isinstance(raw.port, str):
        if raw.end_port is not None:
            problems.append(Problem(f"{field}.endPort", "a named port cannot have an endPort"))
            return None
        if not raw.port:
            problems.append(Problem(f"{field}.port", "the name of a port cannot be empty"))
            return None
        return PortRange(protocol, 0, 0, raw.port)
    if raw.port is None:
        if raw.end_port is not None:
            problems.append(Problem(f"{field}.endPort", "endPort needs a port"))
            return None
        return PortRange(protocol, 0, 65535)
    first = port_number(raw.port, f"{field}.port", problems)
    if first is None:
        return None
    if raw.end_port is None:
        return PortRange(protocol, first, first)
    last = port_number(raw.end_port, f"{field}.endPort", problems)
    if last is None:
        return None
    if last < first:
        problems.append(Problem(f"{field}.endPort", f"{last} is below the port {first}"))
        return None
    return PortRange(protocol, first, last)


def parse_label_selector(
    raw: wire.LabelSelector | None, field: str, problems: list[Problem]
) -> tuple[LabelSelector, bool]:
    """The requirements that could be understood, and whether those are all."""
    found: list[Requirement] = []
    exact = True
    if raw is None:
        return EVERYTHING, True
    for key, value in (raw.match_labels or {}).items():
        if _label_text(key, f"{field}.matchLabels", problems, [value]):
            found.append(Requirement(key, Operator.IN, (value,)))
        else:
            exact = False
    for i, expression in enumerate(raw.match_expressions or []):
        made = _requirement(expression, f"{field}.matchExpressions[{i}]", problems)
        if made is None:
            exact = False
        else:
            found.append(made)
    return label_selector(*found), exact


def _requirement(raw: wire.Requirement, field: str, problems: list[Problem]) -> Requirement | None:
    try:
        operator = Operator(raw.operator)
    except ValueError:
        problems.append(Problem(f"{field}.operator", f"unknown operator {raw.operator!r}"))
        return None
    values = tuple(sorted(set(raw.values or [])))
    if not _label_text(raw.key, field, problems, values):
        return None
    if operator in (Operator.IN, Operator.NOT_IN) and not values:
        problems.append(Problem(f"{field}.values", f"{operator} needs at least one value"))
        return None
    if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST) and values:
        problems.append(Problem(f"{field}.values", f"{operator} takes no values"))
        return None
    return Requirement(raw.key, operator, values)


def _label_text(key: str, field: str, problems: list[Problem], values: Sequence[str]) -> bool:
    for text in (key, *values):
        if not _LABEL_TEXT.fullmatch(text):
            problems.append(Problem(field, f"{text!r} is no label key or value"))
            return False
    if not key:
        problems.append(Problem(field, "the label key is empty"))
        return False
    return True
