# SPDX-License-Identifier: Apache-2.0
"""Ordered rule sets and audit mode as packets see them. Each case runs for IPv4 and for IPv6."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

import pytest
from scapy.layers.inet import TCP, UDP
from support.packet_node import CLASS_A, CLASS_B, CLASS_NODE, CLASS_R, Book, Node
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT

from weir.api.address import parse
from weir.datapath.records import (
    CtFlag,
    Denial,
    DenialFlag,
    DenialKey,
    Direction,
    DropReason,
    EventKind,
    Isolation,
    IsolationFlag,
    PolicyKey,
    PolicyLevel,
    PolicyOrder,
    PolicyVerdict,
    Verdict,
)

SET = 300
ANY = PolicyLevel.ANY_PROTOCOL
BASELINE = PolicyOrder.BASELINE
ALLOW, DENY, PASS = Verdict.ALLOW, Verdict.DENY, Verdict.PASS


@dataclass(frozen=True)
class Row:
    """A rule's row, for all traffic unless told. Its number is its order and one."""

    order: int
    verdict: Verdict
    peer: int = CLASS_B
    proto: int = 0
    port: int = 0
    bits: int = ANY

    @property
    def rule(self) -> int:
        return self.order + 1


def admin(order: int, verdict: Verdict, **match: int) -> Row:
    return replace(Row(order, verdict), **match)


def network(verdict: Verdict = ALLOW, **match: int) -> Row:
    return replace(Row(PolicyOrder.NETWORK_POLICY, verdict), **match)


def baseline(order: int, verdict: Verdict, **match: int) -> Row:
    return replace(Row(BASELINE + order, verdict), **match)


def ordered(node: Node, *rows: Row, isolated: bool = False, flags: int = 0) -> Isolation:
    """Their set; `isolated` by NetworkPolicies too."""
    levels = IsolationFlag.ORDERED | flags
    if not isolated:
        levels |= IsolationFlag.DEFAULT_ALLOW
    for row in rows:
        bits = row.bits | (PolicyLevel.ADMIN if row.order < PolicyOrder.NETWORK_POLICY else 0)
        key = PolicyKey(SET, row.peer, row.port, row.proto, bits)
        node.tables.policy.update({key: PolicyVerdict(row.rule, row.order, row.verdict)})
        levels |= 1 << row.bits
    return Isolation(SET, levels)


def syn(sport: int = 4000, dport: int = 80) -> TCP:
    return TCP(sport=sport, dport=dport, flags="S", seq=100)


ACTIONS = [None, ALLOW, DENY, PASS]
# What NetworkPolicies say: none isolates, one that allows, one that does not.
NETWORK = {"none": None, "allows": True, "denies": False}


@pytest.mark.parametrize("side", ["egress", "ingress"])
def test_every_combination_of_tiers(node: Node, net: Book, side: str) -> None:
    """Admin, then NetworkPolicies if any isolates, else Baseline; nobody decides: allowed."""
    peer = CLASS_B if side == "egress" else CLASS_A
    port = itertools.count(1000)
    for first, np, last in itertools.product(ACTIONS, NETWORK, ACTIONS):
        rows = [admin(3, first, peer=peer)] if first is not None else []
        isolated = NETWORK[np] is not None
        if NETWORK[np]:
            rows.append(network(peer=peer))
        if last is not None and not isolated:
            rows.append(baseline(3, last, peer=peer))
        node.forbid()
        isolation = ordered(node, *rows, isolated=isolated)
        node.isolate(**{f"{'a' if side == 'egress' else 'b'}_{side}": isolation})
        if first in {ALLOW, DENY}:
            expected = first == ALLOW
        elif isolated:
            expected = bool(NETWORK[np])
        else:
            expected = last != DENY
        out = node.from_pod("a", net.ip(net.a, net.b) / syn(next(port)))
        reason = DropReason.POLICY_EGRESS if side == "egress" else DropReason.POLICY_INGRESS
        case = (first, np, last)
        assert out.drops == ({} if expected else {reason: 1}), case
        assert out.code == (TC_ACT_REDIRECT if expected else TC_ACT_SHOT), case


@pytest.mark.parametrize(
    ("rows", "allowed"),
    [
        pytest.param([admin(0, DENY), admin(1, ALLOW, peer=0)], False, id="peer before all peers"),
        pytest.param([admin(1, DENY), admin(0, ALLOW, peer=0)], True, id="all peers before peer"),
        pytest.param(
            [admin(1, DENY, proto=6, port=80, bits=16), admin(0, ALLOW)], True, id="all before port"
        ),
        pytest.param(
            [admin(0, DENY, proto=6, port=80, bits=16), admin(1, ALLOW)], False, id="port first"
        ),
        pytest.param(
            [admin(0, DENY, proto=6, port=81, bits=16), admin(1, ALLOW)], True, id="other port"
        ),
        pytest.param(
            [admin(1, DENY, proto=6, port=64, bits=10), admin(0, ALLOW, proto=6, bits=0)],
            True,
            id="protocol before range",
        ),
        pytest.param(
            [admin(0, PASS), admin(1, DENY, peer=0), baseline(0, DENY)], False, id="pass to deny"
        ),
        pytest.param([admin(0, PASS), admin(1, DENY, peer=0)], True, id="pass jumps its tier"),
        pytest.param(
            [admin(0, PASS), baseline(0, PASS), baseline(1, DENY, peer=0)], True, id="pass twice"
        ),
        pytest.param([baseline(1, DENY), baseline(0, ALLOW, peer=0)], True, id="baseline order"),
        pytest.param([admin(0, DENY, peer=CLASS_R)], True, id="another's"),
        pytest.param([admin(0x7FFE, DENY), baseline(0, ALLOW)], False, id="last admin rule"),
        pytest.param([admin(0, PASS), baseline(0x7FFE, DENY)], False, id="last baseline rule"),
    ],
)
def test_the_first_rule_decides(node: Node, net: Book, rows: list[Row], allowed: bool) -> None:
    node.isolate(a_egress=ordered(node, *rows))
    out = node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert out.drops == ({} if allowed else {DropReason.POLICY_EGRESS: 1})


def test_a_drop_names_the_rule_that_denies(node: Node, net: Book) -> None:
    node.isolate(b_ingress=ordered(node, admin(6, DENY, peer=CLASS_A)))
    node.from_pod("a", net.ip(net.a, net.b) / syn())
    [event] = node.reader.drain()
    assert (event.kind, event.reason) == (EventKind.DROP, DropReason.POLICY_INGRESS)
    assert (event.rule, event.rule_set, event.direction) == (7, SET, Direction.INGRESS)


def test_what_passes_keeps_the_direction_it_came_in(node: Node, net: Book) -> None:
    node.isolate(b_ingress=ordered(node, admin(6, ALLOW, peer=CLASS_A)))
    node.from_pod("a", net.ip(net.a, net.b) / syn())
    [event] = node.reader.drain()
    assert (event.kind, event.rule, event.direction) == (EventKind.ALLOW, 7, Direction.EGRESS)


def test_network_policies_deny_without_a_rule(node: Node, net: Book) -> None:
    """Not that of the Pass rule before them."""
    node.isolate(a_egress=ordered(node, admin(6, PASS), isolated=True))
    node.from_pod("a", net.ip(net.a, net.b) / syn())
    [event] = node.reader.drain()
    assert (event.reason, event.rule) == (DropReason.POLICY_EGRESS, 0)


def test_unknown_peer(node: Node, net: Book) -> None:
    """Whatever the rules say: nobody knows which of them are about it."""
    node.isolate(a_egress=ordered(node, admin(0, ALLOW, peer=0)))
    out = node.from_pod("a", net.ip(net.a, net.unknown) / syn())
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.UNKNOWN_PEER: 1})


def test_icmp_matches_rules_without_ports_alone(node: Node, net: Book) -> None:
    node.isolate(a_egress=ordered(node, admin(0, DENY, proto=6, bits=0), admin(1, PASS)))
    assert node.from_pod("a", net.ip(net.a, net.b) / net.echo(5)).drops == {}
    node.isolate(a_egress=ordered(node, admin(0, DENY)))
    out = node.from_pod("a", net.ip(net.a, net.b) / net.echo(6))
    assert out.drops == {DropReason.POLICY_EGRESS: 1}


def test_shut_lets_nothing_through(node: Node, net: Book) -> None:
    """Its rows did not fit, so what they say counts for nothing; not to the pod's node either."""
    isolation = ordered(node, admin(0, ALLOW, peer=0), flags=IsolationFlag.SHUT)
    node.isolate(a_egress=isolation)
    for number, target in enumerate((net.b, net.world, net.node)):
        out = node.from_pod("a", net.ip(net.a, target) / syn(4000 + number))
        assert out.drops == {DropReason.POLICY_EGRESS: 1}, target


@pytest.mark.parametrize(
    ("rows", "isolated", "allowed"),
    [
        pytest.param([admin(0, DENY, peer=CLASS_NODE)], False, False, id="denied"),
        pytest.param([admin(0, DENY, peer=CLASS_NODE)], True, False, id="denied first"),
        pytest.param([admin(0, DENY, peer=0)], False, False, id="all denied"),
        pytest.param([admin(0, DENY, peer=CLASS_R)], True, True, id="others denied"),
        pytest.param([admin(0, PASS, peer=0)], True, True, id="network policies never"),
        pytest.param([baseline(0, DENY, peer=CLASS_NODE)], False, False, id="baseline"),
        pytest.param([admin(0, ALLOW, peer=0), baseline(0, DENY, peer=0)], False, True, id="ok"),
    ],
)
def test_own_node(node: Node, net: Book, rows: list[Row], isolated: bool, allowed: bool) -> None:
    node.isolate(a_egress=ordered(node, *rows, isolated=isolated))
    out = node.from_pod("a", net.ip(net.a, net.node) / syn())
    assert out.code == (TC_ACT_OK if allowed else TC_ACT_SHOT)
    assert out.drops == ({} if allowed else {DropReason.POLICY_EGRESS: 1})


def test_a_flow_to_the_own_node_is_judged_again(node: Node, net: Book) -> None:
    assert node.from_pod("a", net.ip(net.a, net.node) / syn()).code == TC_ACT_OK
    [entry] = node.flows().values()
    assert not entry.flags & CtFlag.UNJUDGED
    node.isolate(a_egress=ordered(node, admin(0, DENY, peer=CLASS_NODE)))
    node.datapath.bump()
    packet = net.ip(net.a, net.node) / TCP(sport=4000, dport=80, flags="A")
    assert node.from_pod("a", packet).drops == {DropReason.POLICY_EGRESS: 1}
    node.isolate()
    node.datapath.bump()
    assert node.from_pod("a", packet).drops == {}


def test_flows_of_an_earlier_version_to_the_own_node_are_judged(node: Node, net: Book) -> None:
    """It had one flag for what a pod opens to its node and what the node opens to the pod."""
    assert node.from_pod("a", net.ip(net.a, net.node) / syn()).code == TC_ACT_OK
    [(key, entry)] = node.flows().items()
    node.tables.ct.update({key: replace(entry, flags=entry.flags | 128)})
    node.isolate(a_egress=ordered(node, admin(0, DENY, peer=CLASS_NODE)))
    node.datapath.bump()
    packet = net.ip(net.a, net.node) / TCP(sport=4000, dport=80, flags="A")
    assert node.from_pod("a", packet).drops == {DropReason.POLICY_EGRESS: 1}


def test_what_the_node_opens_is_never_judged(node: Node, net: Book) -> None:
    shut = ordered(node, admin(0, DENY, peer=0))
    node.isolate(a_egress=shut, a_ingress=shut)
    out = node.leaves(net.ip(net.node, net.a) / syn(5, 6), "to_pod", "pa")
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    [entry] = node.flows().values()
    assert entry.flags & CtFlag.UNJUDGED
    node.datapath.bump()
    answer = net.ip(net.a, net.node) / TCP(sport=6, dport=5, flags="SA")
    assert node.from_pod("a", answer).drops == {}


def test_a_changed_verdict_cuts_the_flow_from_either_side(node: Node, net: Book) -> None:
    node.isolate(b_ingress=ordered(node, admin(0, ALLOW, peer=CLASS_A)))
    assert node.from_pod("a", net.ip(net.a, net.b) / syn()).code == TC_ACT_REDIRECT
    node.isolate(b_ingress=ordered(node, admin(0, DENY, peer=CLASS_A)))
    node.datapath.bump()
    for pod, source, target, ports in (
        ("b", net.b, net.a, (80, 4000)),
        ("a", net.a, net.b, (4000, 80)),
    ):
        packet = net.ip(source, target) / TCP(sport=ports[0], dport=ports[1], flags="A")
        assert node.from_pod(pod, packet).drops == {DropReason.POLICY_INGRESS: 1}


# ---- audit


def audited(isolation: Isolation) -> Isolation:
    return Isolation(isolation.rule_set, isolation.levels | IsolationFlag.AUDIT)


def test_audit_reports_and_lets_through(node: Node, net: Book) -> None:
    node.datapath.set_event_mask(1 << EventKind.AUDIT | 1 << EventKind.ALLOW | 1 << EventKind.DROP)
    node.isolate(b_ingress=audited(ordered(node, admin(6, DENY, peer=CLASS_A))))
    out = node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.AUDIT: 1})
    [event] = node.reader.drain()  # and no EVENT_ALLOW
    assert (event.kind, event.reason) == (EventKind.AUDIT, DropReason.POLICY_INGRESS)
    assert (event.rule, event.rule_set, event.direction) == (7, SET, Direction.INGRESS)
    assert (event.source_class, event.destination_class) == (CLASS_A, CLASS_B)
    # The flow's other packets are one flow's: told once.
    answer = net.ip(net.b, net.a) / TCP(sport=80, dport=4000, flags="SA")
    assert (node.from_pod("b", answer).drops, node.reader.drain()) == ({}, [])
    # When audit mode ends, it is cut.
    node.isolate(b_ingress=ordered(node, admin(6, DENY, peer=CLASS_A)))
    node.datapath.bump()
    assert node.from_pod("b", answer).drops == {DropReason.POLICY_INGRESS: 1}


def test_audit_of_network_policies_and_unknown_peers(node: Node, net: Book) -> None:
    node.datapath.set_event_mask(1 << EventKind.AUDIT)
    node.isolate(a_egress=audited(Isolation(201, 0)))
    for number, target in enumerate((net.b, net.unknown)):
        out = node.from_pod("a", net.ip(net.a, target) / syn(4000 + number))
        assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.AUDIT: 1})
    reasons = [event.reason for event in node.reader.drain()]
    assert reasons == [DropReason.POLICY_EGRESS, DropReason.UNKNOWN_PEER]


def test_audit_of_one_end_leaves_the_other_to_its_policies(node: Node, net: Book) -> None:
    node.isolate(a_egress=audited(Isolation(201, 0)), b_ingress=Isolation(202, 0))
    out = node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert out.drops == {DropReason.AUDIT: 1, DropReason.POLICY_INGRESS: 1}
    node.isolate(a_egress=audited(Isolation(201, 0)), b_ingress=audited(Isolation(202, 0)))
    out = node.from_pod("a", net.ip(net.a, net.b) / syn(4001))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.AUDIT: 2})


def test_nobody_listens_to_audit(node: Node, net: Book) -> None:
    node.datapath.set_event_mask(1 << EventKind.DROP)
    node.isolate(a_egress=audited(Isolation(201, 0)))
    assert node.from_pod("a", net.ip(net.a, net.b) / syn()).drops == {DropReason.AUDIT: 1}
    assert node.reader.drain() == []


# ---- what is remembered


def test_denials_are_remembered_as_the_flow_was_opened(node: Node, net: Book) -> None:
    node.datapath.set_event_mask(0)
    node.isolate(b_ingress=ordered(node, admin(0, ALLOW, peer=CLASS_A)))
    node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert dict(node.tables.denials.items()) == {}
    node.isolate(b_ingress=ordered(node, admin(0, DENY, peer=CLASS_A)))
    node.datapath.bump()
    answer = net.ip(net.b, net.a) / TCP(sport=80, dport=4000, flags="A")
    node.from_pod("b", answer)
    node.from_pod("a", net.ip(net.a, net.b) / syn(4001))
    [(key, found)] = node.tables.denials.items()
    assert key == DenialKey(parse(net.a), parse(net.b), 80, 6, Direction.INGRESS)
    assert abs(found.last_seen - time.monotonic()) < 5
    assert replace(found, last_seen=0) == Denial(0, 2, 1, SET, DropReason.POLICY_INGRESS, 0)
    node.isolate(b_ingress=audited(Isolation(202, 0)))
    node.from_pod("a", net.ip(net.a, net.b) / syn(4002))
    [found] = dict(node.tables.denials.items()).values()
    assert replace(found, last_seen=0) == Denial(
        0, 3, 0, 202, DropReason.POLICY_INGRESS, DenialFlag.AUDITED
    )


def test_pings_are_one_row(node: Node, net: Book) -> None:
    node.isolate(a_egress=Isolation(201, 0))
    for identifier in (5, 6, 7):
        node.from_pod("a", net.ip(net.a, net.b) / net.echo(identifier))
    node.from_pod("a", net.ip(net.a, net.b) / UDP(sport=1, dport=53))
    rows = dict(node.tables.denials.items())
    ends = parse(net.a), parse(net.b)
    assert {key: found.packets for key, found in rows.items()} == {
        DenialKey(*ends, 0, net.icmp_proto, Direction.EGRESS): 3,
        DenialKey(*ends, 53, 17, Direction.EGRESS): 1,
    }
