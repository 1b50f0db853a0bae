# SPDX-License-Identifier: Apache-2.0
"""What the programs will do with a flow, read from a node's maps.

`judge` takes the steps of judge() in `lib/policy.h`, lookup by lookup; tests hold it against the
loaded programs. It shares nothing with weir.agent.verdict, which says what should be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from weir.api.address import Addr
from weir.datapath import records
from weir.datapath.records import (
    AddressFlag,
    ClassNumber,
    Direction,
    DropReason,
    PolicyLevel,
    RouteFlag,
    Verdict,
)

PORT_BITS = 16


class Maps(Protocol):
    """Lookups as the programs make them: routes and prefixes by the longest that contains."""

    def endpoint(self, addr: Addr) -> records.Endpoint | None: ...
    def address(self, addr: Addr) -> records.Address | None: ...
    def route(self, addr: Addr) -> records.Route | None: ...
    def prefix(self, addr: Addr) -> records.Prefix | None: ...
    def policy(self, key: records.PolicyKey) -> records.PolicyVerdict | None: ...


@dataclass(frozen=True, slots=True)
class Flow:
    """Seen from its opener. port: of the destination."""

    source: Addr
    destination: Addr
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Judged:
    """reason: NONE lets it through. direction: of the end that decided. rule: by which it did, 0
    for none."""

    reason: DropReason
    direction: Direction
    rule: int
    rule_set: int
    source_class: int
    destination_class: int


def class_of(maps: Maps, addr: Addr) -> int:
    known = maps.address(addr)
    if known is not None:
        return ClassNumber.HOST if known.flags & AddressFlag.LOCAL_HOST else known.class_
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
    judged = Judged(DropReason.NONE, Direction.EGRESS, 0, 0, opener_class, target_class)
    if ClassNumber.HOST in (opener_class, target_class):
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
        rule = _allowing(maps, isolation, peer, flow)
        reason = DropReason.NONE
        if rule is None:
            reason = _drop(direction, peer)
        judged = Judged(
            reason, direction, rule or 0, isolation.rule_set, opener_class, target_class
        )
        if reason is not DropReason.NONE:
            break
    return judged


def _drop(direction: Direction, peer: int) -> DropReason:
    if peer == ClassNumber.UNKNOWN:
        return DropReason.UNKNOWN_PEER
    egress = direction is Direction.EGRESS
    return DropReason.POLICY_EGRESS if egress else DropReason.POLICY_INGRESS


def _allowing(maps: Maps, isolation: records.Isolation, peer: int, flow: Flow) -> int | None:
    """The number of the first rule that is found to match; None: nothing does."""
    for level in range(PolicyLevel.ANY_PROTOCOL + 1):
        if not isolation.levels >> level & 1:
            continue
        protocol, port = 0, 0
        if level != PolicyLevel.ANY_PROTOCOL:
            shift = PORT_BITS - level
            protocol, port = flow.protocol, flow.port >> shift << shift
        for known in (peer, ClassNumber.ANY):
            if known == ClassNumber.UNKNOWN:
                continue
            key = records.PolicyKey(isolation.rule_set, known, port, protocol, level)
            hit = maps.policy(key)
            if hit is not None and hit.verdict == Verdict.ALLOW:
                return hit.rule
    return None
