# SPDX-License-Identifier: Apache-2.0
"""What weir.agent.judge reads from the maps is what the loaded programs do, for random rows.

Rows need not make sense: whatever is in the maps, both must say the same of it.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.packet import Packet
from support.packet_node import CLASS_A, CLASS_B, CLASS_NODE, CLASS_R, Book, Node

from weir.agent.judge import Flow, Judged, judge
from weir.agent.why import KernelMaps
from weir.api.address import Addr, cidr, parse
from weir.datapath.records import (
    Address,
    AddressFlag,
    ClassNumber,
    Denial,
    DenialKey,
    Direction,
    DropReason,
    Isolation,
    IsolationFlag,
    PolicyKey,
    PolicyLevel,
    PolicyOrder,
    PolicyVerdict,
    Prefix,
    PrefixKey,
    Verdict,
)

ROUNDS = 60
RULE_SETS = (101, 102, 103)
CLASS_BLOCK = 20
PEERS = [ClassNumber.ANY, ClassNumber.WORLD, CLASS_A, CLASS_B, CLASS_R, CLASS_NODE, CLASS_BLOCK]
LEVELS = [0, 9, 16, PolicyLevel.ANY_PROTOCOL]
PORTS = [80, 81, 443, 53]
BY_POLICY = {DropReason.POLICY_EGRESS, DropReason.POLICY_INGRESS, DropReason.UNKNOWN_PEER}
ADMIN_ORDERS = range(3)
OTHER_ORDERS = [PolicyOrder.NETWORK_POLICY, PolicyOrder.BASELINE, PolicyOrder.BASELINE + 1]


def some_row(rng: Random) -> tuple[PolicyKey, PolicyVerdict]:
    level = rng.choice(LEVELS)
    protocol, port = 0, 0
    if level != PolicyLevel.ANY_PROTOCOL:
        shift = 16 - level
        protocol, port = rng.choice([6, 17]), rng.choice(PORTS) >> shift << shift
    admin = rng.random() < 0.4
    key = PolicyKey(
        rng.choice(RULE_SETS), rng.choice(PEERS), port, protocol,
        level | (PolicyLevel.ADMIN if admin else 0),
    )  # fmt: skip
    order = rng.choice(ADMIN_ORDERS if admin else OTHER_ORDERS)
    verdict = rng.choice([Verdict.ALLOW, Verdict.ALLOW, Verdict.DENY, Verdict.PASS])
    return key, PolicyVerdict(rng.randint(1, 99), order, verdict)


def some_isolation(rng: Random) -> Isolation:
    if rng.random() < 0.2:
        return Isolation()
    levels = sum(1 << level for level in LEVELS if rng.random() < 0.85)
    if rng.random() < 0.7:
        levels |= IsolationFlag.ORDERED
        for flag, chance in ((IsolationFlag.DEFAULT_ALLOW, 0.5), (IsolationFlag.SHUT, 0.1)):
            levels |= flag if rng.random() < chance else 0
    levels |= IsolationFlag.AUDIT if rng.random() < 0.15 else 0
    return Isolation(rng.choice(RULE_SETS), levels)


def fill(node: Node, net: Book, rng: Random) -> None:
    tables = node.tables
    tables.policy.delete([key for key, _ in tables.policy.items()])
    tables.policy.update(dict(some_row(rng) for _ in range(rng.randint(0, 40))))
    node.isolate(*(some_isolation(rng) for _ in range(4)))
    own = rng.choice([CLASS_NODE, ClassNumber.HOST, ClassNumber.UNKNOWN])
    tables.addresses.update({parse(net.node): Address(own, AddressFlag.LOCAL_HOST)})
    block = cidr(parse(net.world2), 112 if net.family == 4 else 48)
    tables.prefixes.update({PrefixKey(block.bits, block.address): Prefix(CLASS_BLOCK)})


def some_packet(rng: Random, net: Book, number: int) -> tuple[Packet, int, int]:
    """Layers above IP of a flow's first packet, protocol and port."""
    if rng.random() < 0.15:
        return net.echo(number), net.icmp_proto, number
    port = rng.choice(PORTS)
    if rng.random() < 0.5:
        return TCP(sport=2000 + number, dport=port, flags="S"), 6, port
    return UDP(sport=2000 + number, dport=port) / b"?", 17, port


def test_the_walk_does_what_the_programs_do(node: Node, net: Book) -> None:
    """Between pods here, to and from pods elsewhere, nodes, the outside, and nobody."""
    rng = Random(20 + net.family)
    seen: Counter[tuple[str, DropReason, bool]] = Counter()
    number = 0
    for _ in range(ROUNDS):
        fill(node, net, rng)
        maps = KernelMaps(node.tables)
        for source, destination in (
            *((net.a, end) for end in (net.b, net.r, net.unknown, net.node, net.node2, net.world)),
            *((end, net.b) for end in (net.a, net.world, net.world2)),
            (net.a, net.world2),
        ):
            number += 1
            layers, protocol, port = some_packet(rng, net, number)
            flow = Flow(parse(source), parse(destination), protocol, port)
            told = judge(maps, flow)
            before = dict(node.tables.denials.items())
            packet = net.ip(source, destination) / layers
            done = node.from_pod("a", packet) if source == net.a else node.arrives(packet)
            dropped = set(done.drops) - {DropReason.AUDIT}
            expected = set() if told.passes else {told.reason}
            assert dropped == expected, (flow, told, done)
            assert (DropReason.AUDIT in done.drops) >= told.audited, (flow, told, done)
            if told.reason:
                check_denial(node, flow, told, before)
            seen[f"{net.family}", told.reason, told.audited] += 1
    found = {reason for _, reason, _ in seen}
    assert found >= BY_POLICY | {DropReason.NONE}, seen
    assert {audited for _, _, audited in seen} == {False, True}


def check_denial(node: Node, flow: Flow, told: Judged, before: dict[DenialKey, Denial]) -> None:
    """The programs noted the same rule, of the same set."""
    port = 0 if flow.protocol in (1, 58) else flow.port
    key = DenialKey(flow.source, flow.destination, port, flow.protocol, told.direction)
    noted = node.tables.denials.get(key)
    assert noted is not None
    assert noted != before.get(key)
    assert (noted.rule, noted.rule_set, noted.reason) == (told.rule, told.rule_set, told.reason)


@pytest.mark.parametrize("only", list(Direction))
def test_one_end_alone(node: Node, net: Book, only: Direction) -> None:
    """Each direction as if the other end were elsewhere."""
    shut = {Direction.EGRESS: "a_egress", Direction.INGRESS: "b_ingress"}
    node.isolate(**{shut[only]: Isolation(201, 0)})
    flow = Flow(Addr(parse(net.a)), parse(net.b), 6, 80)
    other = Direction.INGRESS if only is Direction.EGRESS else Direction.EGRESS
    maps = KernelMaps(node.tables)
    assert judge(maps, flow, only).reason in BY_POLICY
    assert judge(maps, flow, other).reason is DropReason.NONE
