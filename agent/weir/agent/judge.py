# SPDX-License-Identifier: Apache-2.0
"""What the programs will do with a flow, read from a node's maps.

`judge` takes the steps of judge() in `lib/policy.h`, lookup by lookup; tests hold it against the
loaded programs. It shares nothing with weir.agent.verdict, which says what should be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from weir.api.address import Addr
from weir.datapath import records
from weir.datapath.records import (
    AddressFlag,
    ClassNumber,
    Direction,
    DropReason,
    IsolationFlag,
    PolicyLevel,
    RouteFlag,
    Verdict,
)

PORT_BITS = 16
# As in `lib/where.h` and `lib/policy.h`: beside a class, and above every order.
CLASS_OF_OWN_NODE = 1 << 31
ORDER_NONE = 1 << 16


class Maps(Protocol):
    """Lookups as the programs make them: routes and prefixes by the longest that contains."""

    def endpoint(self, addr: Addr) -> records.Endpoint | None: ...
    def address(self, addr: Addr) -> records.Address | None: ...
    def route(self, addr: Addr) -> records.Route | None: ...
    def prefix(self, addr: Addr) -> records.Prefix | None: ...
    def policy(self, key: records.PolicyKey) -> records.PolicyVerdict | None: ...


@dataclass(frozen=True, slots=True)
class Flow:
    """Seen from its opener. port: of the destination, 0 with ICMP."""

    source: Addr
    destination: Addr
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Judged:
    """reason: NONE lets it through, as does any in audit mode (audited). direction: of the end that
    decided. rule: by which it did, 0 for none."""

    reason: DropReason
    audited: bool
    direction: Direction
    rule: int
    rule_set: int
    source_class: int
    destination_class: int

    @property
    def passes(self) -> bool:
        return self.reason is DropReason.NONE or self.audited


def class_of(maps: Maps, addr: Addr) -> int:
    known = maps.address(addr)
    if known is not None:
        own_node = CLASS_OF_OWN_NODE if known.flags & AddressFlag.LOCAL_HOST else 0
        return known.class_ | own_node
    route = maps.route(addr)
    if route is not None and route.flags & RouteFlag.POD_CIDR:
        return ClassNumber.UNKNOWN
    prefix = maps.prefix(addr)
    return prefix.class_ if prefix is not None else ClassNumber.WORLD


def judge(maps: Maps, flow: Flow, only: Direction | None = None) -> Judged:
    """`only`: of the two ends, if both are here."""
    opener, target = maps.endpoint(flow.source), maps.endpoint(flow.destination)
    opener_class = opener.class_ if opener is not None else class_of(maps, flow.source)
    target_class = target.class_ if target is not None else class_of(maps, flow.destination)
    classes = opener_class & ~CLASS_OF_OWN_NODE, target_class & ~CLASS_OF_OWN_NODE
    judged = Judged(DropReason.NONE, False, Direction.EGRESS, 0, 0, *classes)
    if opener_class & CLASS_OF_OWN_NODE:
        return judged
    if opener is not None and target is not None and opener.ifindex == target.ifindex:
        return judged
    for direction, end, peer in (
        (Direction.EGRESS, opener, target_class),
        (Direction.INGRESS, target, opener_class),
    ):
        if end is None or only not in (None, direction):
            continue
        isolation = end.egress if direction is Direction.EGRESS else end.ingress
        if not isolation.rule_set:
            continue
        permitted, rule = _permits(maps, isolation, peer, flow)
        audited = not permitted and bool(isolation.levels & IsolationFlag.AUDIT)
        reason = DropReason.NONE if permitted else _drop(direction, peer)
        if permitted and judged.audited:
            continue  # the other end would not have let it through
        judged = Judged(reason, audited, direction, rule, isolation.rule_set, *classes)
        if not judged.passes:
            break
    return judged


def _drop(direction: Direction, peer: int) -> DropReason:
    if peer & ~CLASS_OF_OWN_NODE == ClassNumber.UNKNOWN:
        return DropReason.UNKNOWN_PEER
    egress = direction is Direction.EGRESS
    return DropReason.POLICY_EGRESS if egress else DropReason.POLICY_INGRESS


def _permits(maps: Maps, isolation: records.Isolation, peer: int, flow: Flow) -> tuple[bool, int]:
    """Whether one direction lets it through, and the number of the rule by which."""
    own_node, peer = bool(peer & CLASS_OF_OWN_NODE), peer & ~CLASS_OF_OWN_NODE
    levels, rule = isolation.levels, 0
    if levels & IsolationFlag.ORDERED:
        if levels & IsolationFlag.SHUT or peer == ClassNumber.UNKNOWN:
            return False, 0
        verdict, rule = _first(maps, isolation, peer, flow, PolicyLevel.ADMIN)
        if verdict != Verdict.PASS:
            return verdict == Verdict.ALLOW, rule
        if levels & IsolationFlag.DEFAULT_ALLOW:
            verdict, rule = _first(maps, isolation, peer, flow, 0)
            return verdict != Verdict.DENY, rule
    if own_node:
        return True, rule
    for key in _keys(isolation, peer, flow):
        hit = maps.policy(key) if key.peer != ClassNumber.UNKNOWN else None
        if hit is not None and hit.verdict == Verdict.ALLOW:
            return True, hit.rule
    return False, 0


def _first(
    maps: Maps, isolation: records.Isolation, peer: int, flow: Flow, tier: int
) -> tuple[int, int]:
    """Verdict and number of the first rule that matches in a tier; PASS if none does."""
    order, verdict, rule = ORDER_NONE, int(Verdict.PASS), 0
    for key in _keys(isolation, peer, flow, tier):
        hit = maps.policy(key)
        if hit is not None and hit.order < order:
            order, verdict, rule = hit.order, hit.verdict, hit.rule
    return verdict, rule


def _keys(
    isolation: records.Isolation, peer: int, flow: Flow, tier: int = 0
) -> Iterator[records.PolicyKey]:
    """In the order of lookups."""
    for level in range(PolicyLevel.ANY_PROTOCOL + 1):
        if not isolation.levels >> level & 1:
            continue
        protocol, port = 0, 0
        if level != PolicyLevel.ANY_PROTOCOL:
            shift = PORT_BITS - level
            protocol, port = flow.protocol, flow.port >> shift << shift
        for known in (peer, ClassNumber.ANY):
            yield records.PolicyKey(isolation.rule_set, known, port, protocol, level | tier)
