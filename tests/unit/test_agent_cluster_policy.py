# SPDX-License-Identifier: Apache-2.0
"""ClusterNetworkPolicies as the agent reads and explains them, and audit mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.worlds import TCP, Judge, Pod, Policy, Rule, World, address, endpoint

from weir.agent import numbering
from weir.agent.errors import BadResource
from weir.agent.explain import Explainer
from weir.agent.resources import (
    Action,
    Class,
    Node,
    Selector,
    Tier,
    WireClass,
    WireSelector,
    parse,
)
from weir.agent.routes import RouteFacts
from weir.agent.rule_sets import DENY_ALL, RULES_MAX
from weir.agent.tables import Projection
from weir.api.v1 import weir_pb2 as pb
from weir.datapath.records import (
    Address,
    AddressFlag,
    ClassNumber,
    Direction,
    DropReason,
    Event,
    EventKind,
    Isolation,
    IsolationFlag,
)

GUARD = Policy(
    "a", True, False, (
        Rule(False, frozenset("b"), action=Action.DENY), Rule(False, frozenset("c")),
    ), Tier.ADMIN, 3,
)  # fmt: skip
PODS = {1: Pod(frozenset("a")), 4: Pod(frozenset("b")), 5: Pod(frozenset("c"))}


def encoded(name: str, **content: object) -> bytes:
    message = pb.Resource(name=name)
    for kind, value in content.items():
        getattr(message, kind).CopyFrom(value)
    return message.SerializeToString()


def policy(**fields: object) -> pb.Policy:
    made = pb.Policy(name="guard", tier=pb.TIER_ADMIN, priority=7, egress=True)
    made.MergeFrom(pb.Policy(**fields))
    return made


def test_a_cluster_policy_is_read() -> None:
    rule = pb.Rule(egress=True, index=2, peers=[5], action=pb.ACTION_PASS)
    _, item = parse(encoded("cluster-policy/guard", policy=policy(rules=[rule])))
    assert (item.tier, item.priority, item.namespace) == (Tier.ADMIN, 7, "")  # type: ignore[union-attr]
    assert item.rules[0].action == Action.PASS  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("policy//guard", policy(), "its name", id="named as a NetworkPolicy"),
        pytest.param("cluster-policy/guard", policy(namespace="ns"), "its name", id="namespaced"),
        pytest.param(
            "policy/ns/guard",
            pb.Policy(namespace="ns", name="guard", rules=[pb.Rule(action=pb.ACTION_DENY)]),
            "action DENY",
            id="a NetworkPolicy that denies",
        ),
    ],
)
def test_what_cannot_be_is_refused(name: str, content: pb.Policy, reason: str) -> None:
    with pytest.raises(BadResource, match=reason):
        parse(encoded(name, policy=content))


def test_an_action_of_a_later_version_denies_everything() -> None:
    rule = pb.Rule(egress=True, index=2, peers=[5], ports=[pb.PortRange(protocol=6, last=9)])
    rule.action = 9  # type: ignore[assignment]
    _, item = parse(encoded("cluster-policy/guard", policy=policy(rules=[rule])))
    (read,) = item.rules  # type: ignore[union-attr]
    assert (read.action, read.any_peer, read.ports) == (Action.DENY, True, ())


def test_a_deny_rule_whose_peer_is_not_known_denies_everybody() -> None:
    items = World(PODS, {"guard": GUARD}).resources()
    gone = next(n for n, i in items.items() if isinstance(i, Selector) and i.key == "b")
    del items[gone]
    projection = Projection()
    projection.apply(items)
    projection.set_endpoint(endpoint(1))
    projection.project()
    assert not judge(projection).verdict(5, 1, TCP, 80)


def judge(projection: Projection) -> Judge:
    names = ("endpoints", "addresses", "policy")
    return Judge(*(projection.table(name).rows for name in names))


def fresh(world: World, **options: bool) -> Projection:
    projection = Projection(**options)
    projection.apply(world.resources())
    for number in (1, 2):
        projection.set_endpoint(endpoint(number))
    projection.project()
    return projection


def test_more_rules_than_there_are_orders_let_nothing_through() -> None:
    rules = tuple(Rule(False, frozenset("c")) for _ in range(RULES_MAX + 1))
    projection = fresh(World(PODS, {"guard": replace(GUARD, rules=rules)}))
    assert projection.table("endpoints").rows[address(1)].ingress.levels & IsolationFlag.SHUT
    assert not projection.table("policy").rows


def test_a_restart_finds_the_same_numbers() -> None:
    world = World(PODS, {"guard": GUARD})
    before = fresh(world)
    after = Projection()
    numbering.restore(after, numbering.dump(before))
    after.apply(world.resources(offset=20))
    after.set_endpoint(endpoint(1))
    after.set_endpoint(endpoint(2))
    after.project()
    for name in ("policy", "endpoints", "addresses"):
        assert dict(after.table(name).rows) == dict(before.table(name).rows), name


# ---- audit


def test_audit_is_of_what_some_policy_isolates() -> None:
    projection = fresh(World({**PODS, 2: Pod(frozenset())}, {"guard": GUARD}), audit=True)
    rows = projection.table("endpoints").rows
    assert rows[address(1)].ingress.levels & IsolationFlag.AUDIT
    assert rows[address(1)].egress == rows[address(2)].ingress == Isolation()


def test_a_pod_of_unknown_class_waits_in_audit_mode_too() -> None:
    row = fresh(World(), audit=True).table("endpoints").rows[address(1)]
    assert row.ingress == Isolation(DENY_ALL, IsolationFlag.ORDERED | IsolationFlag.SHUT)


def test_audit_of_a_pod_outlives_its_object() -> None:
    items = World(PODS, {"guard": GUARD}).resources()
    items["pod/u1"] = replace(items["pod/u1"], audit=True)  # type: ignore[call-arg,type-var]
    projection = Projection()
    projection.apply(items)
    projection.set_endpoint(endpoint(1))
    for change in ({}, {"pod/u1": None}):
        projection.apply(change)
        projection.project()
        row = projection.table("endpoints").rows[address(1)]
        assert row.ingress.levels & IsolationFlag.AUDIT


# ---- nodes


def test_nodes_have_the_class_of_their_labels() -> None:
    here, there, other = address(101), address(102), address(103)
    projection = Projection()
    projection.set_facts(RouteFacts("n1", (here,), (here, other)))
    selector, number = WireSelector(1), WireClass(1)
    projection.apply(
        {
            "selector/1": Selector(selector, "nodes zone in (a)"),
            "class/1": Class(number, (selector,), ()),
            "node/n1": Node("n1", (here,), (), wire_class=number),
            "node/n2": Node("n2", (there,), (), wire_class=number),
        }
    )
    projection.project()
    rows = projection.table("addresses").rows
    assert rows[here].class_ == rows[there].class_ >= ClassNumber.FIRST
    assert rows[here].flags == AddressFlag.LOCAL_HOST
    # An address that the Node object does not have is in no selector of nodes.
    assert rows[other] == Address(ClassNumber.HOST, AddressFlag.LOCAL_HOST)
    projection.apply({"class/1": None})
    projection.project()
    assert rows[there].class_ == ClassNumber.UNKNOWN


# ---- explaining


def event(projection: Projection, kind: EventKind, rule: int, reason: DropReason) -> Event:
    rows = projection.table("endpoints").rows
    return Event(
        0, address(4), address(1), 4000, 80, TCP, kind, Direction.INGRESS, 2, reason,
        projection.table("addresses").rows[address(4)].class_, rows[address(1)].class_, rule,
        rows[address(1)].ingress.rule_set, 7, 60,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [EventKind.DROP, EventKind.AUDIT])
def test_the_rule_that_denies_is_named(kind: EventKind) -> None:
    projection = fresh(World(PODS, {"guard": GUARD}))
    (number,) = (row.rule for row in projection.table("policy").rows.values() if row.verdict == 0)
    seen = event(projection, kind, number, DropReason.POLICY_INGRESS)
    told = Explainer(projection, {}).explain(seen)
    assert told.verdict == kind.name.lower()
    assert told.reason == "policy-ingress"
    assert told.policies == ("ClusterNetworkPolicy guard",)
    assert (told.rule, told.near_miss) == ("ingress rule 0 of ClusterNetworkPolicy guard", "")


def test_without_a_rule_the_network_policies_denied() -> None:
    isolates = Policy("a", True, False, (Rule(False, frozenset("c")),))
    projection = fresh(World(PODS, {"guard": GUARD, "np": isolates}))
    seen = event(projection, EventKind.DROP, 0, DropReason.POLICY_INGRESS)
    told = Explainer(projection, {}).explain(seen)
    assert told.policies == ("ns/np",)
    seen = event(projection, EventKind.DROP, 0, DropReason.UNKNOWN_PEER)
    told = Explainer(projection, {}).explain(seen)
    assert told.policies == ("ClusterNetworkPolicy guard", "ns/np")


def test_no_rule_that_denies_is_a_near_miss() -> None:
    isolates = Policy("a", True, False)
    guard = replace(GUARD, rules=(Rule(False, frozenset("c"), action=Action.DENY),))
    projection = fresh(World(PODS, {"guard": guard, "np": isolates}))
    seen = event(projection, EventKind.DROP, 0, DropReason.POLICY_INGRESS)
    assert Explainer(projection, {}).explain(seen).near_miss == ""
