# SPDX-License-Identifier: Apache-2.0
"""The projection against the specification, and the plan's order op by op."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.worlds import (
    TCP,
    UDP,
    Judge,
    Pod,
    Policy,
    Rule,
    World,
    address,
    difference,
    endpoint,
    questions,
)

from weir.agent.judge import Flow
from weir.agent.judge import judge as judged
from weir.agent.model import DesiredMaps
from weir.agent.plan import Plan, plan
from weir.agent.ports import PortPrefix, prefixes
from weir.agent.resources import Action, NamedPort, PortRange, Tier
from weir.agent.routes import RouteFacts
from weir.agent.rule_sets import DENY_ALL
from weir.agent.tables import Projection

PODS = range(1, 6)
LOCAL = range(1, 4)
KEYS = ["a", "b", "c", "d"]

selectors = st.frozensets(st.sampled_from(KEYS))
ports = st.lists(
    st.sampled_from(
        [
            PortRange(TCP, 80, 80, ""),
            PortRange(TCP, 80, 443, ""),
            PortRange(UDP, 0, 65535, ""),
            PortRange(TCP, 0, 0, "web"),
        ]
    ),
    max_size=2,
).map(tuple)
rules = st.builds(Rule, st.booleans(), st.none() | selectors.filter(bool), ports)
network_policies = st.builds(
    Policy,
    st.sampled_from(KEYS),
    st.booleans(),
    st.booleans(),
    st.lists(rules, max_size=3).map(tuple),
)
ranked_rules = st.builds(
    Rule, st.booleans(), st.none() | selectors.filter(bool), ports, st.sampled_from(Action)
)
tiers = st.sampled_from([Tier.ADMIN, Tier.BASELINE])
cluster_policies = st.builds(
    Policy,
    st.sampled_from(KEYS),
    st.booleans(),
    st.booleans(),
    st.lists(ranked_rules, max_size=4).map(tuple),
    tiers,
    st.integers(0, 2),
)
policies = network_policies | cluster_policies
named = st.sampled_from([(), (NamedPort("web", TCP, 81),), (NamedPort("web", TCP, 5000),)])
pods = st.fixed_dictionaries({n: st.builds(Pod, selectors, named) for n in PODS})
policy_sets = st.dictionaries(st.sampled_from(["p", "q", "r", "s"]), policies)
worlds = st.builds(World, pods, policy_sets)

Rows = dict[str, dict[Any, Any]]


def fresh(world: World, offset: int = 0) -> Projection:
    projection = Projection()
    projection.apply(world.resources(offset))
    for number in LOCAL:
        projection.set_endpoint(endpoint(number))
    projection.project()
    return projection


def judge(projection: Projection) -> Judge:
    return Judge(
        projection.table("endpoints").rows,
        projection.table("addresses").rows,
        projection.table("policy").rows,
    )


def involves_local(question: tuple[int, int, int, int]) -> bool:
    return question[0] in LOCAL or question[1] in LOCAL


def expected(world: World, question: tuple[int, int, int, int]) -> bool:
    """What this node decides: egress of its pods, ingress of its pods."""
    source, destination, protocol, port = question
    result = True
    if source in LOCAL:
        result &= world._allows(True, source, destination, destination, protocol, port)
    if destination in LOCAL:
        result &= world._allows(False, destination, source, destination, protocol, port)
    return result


@given(worlds)
@settings(max_examples=60, deadline=None)
def test_rows_say_what_the_policies_say(world: World) -> None:
    rows = judge(fresh(world))
    for question in filter(involves_local, questions(PODS)):
        assert rows.verdict(*question) == expected(world, question), question


@given(st.lists(st.tuples(worlds, st.integers(0, 40)), min_size=2, max_size=4))
@settings(max_examples=50, deadline=None)
def test_step_by_step_equals_from_scratch(steps: list[tuple[World, int]]) -> None:
    """Also across operators, whose wire numbers differ by the offset."""
    projection = Projection()
    for number in LOCAL:
        projection.set_endpoint(endpoint(number))
    before: dict[str, Any] = {}
    for world, offset in steps:
        after = world.resources(offset)
        projection.apply(difference(before, after))
        projection.take()
        before = after
    scratch = fresh(*steps[-1])
    for name in ("policy", "addresses", "endpoints", "prefixes"):
        assert len(projection.table(name)) == len(scratch.table(name)), name
    rows = judge(projection)
    for question in filter(involves_local, questions(PODS)):
        assert rows.verdict(*question) == expected(steps[-1][0], question), question
    contents = projection.class_numbers
    used = {row.class_ for row in projection.table("addresses").rows.values()}
    assert len({contents.key(number) for number in used}) == len(used)


def made_plan(projection: Projection) -> Plan:
    delta = projection.take()
    prefixes = projection.table("prefixes").rows
    return plan(delta, projection.class_numbers, projection.policy, prefixes)


def single_ops(made: Any) -> Any:
    for op in made.policy:
        for key, row in op.upserts.items():
            yield op.table, key, row
        for key in op.deletes:
            yield op.table, key, None


def run_and_watch(
    projection: Projection, kernel: Rows, old: World, new: World, between: tuple[World, ...] = ()
) -> None:
    made = made_plan(projection)
    watched = [
        (question, expected(old, question))
        for question in filter(involves_local, questions(PODS))
        if len({expected(world, question) for world in (old, new, *between)}) == 1
    ]
    seen = Judge(kernel["endpoints"], kernel["addresses"], kernel["policy"])
    for table, key, row in single_ops(made):
        if row is None:
            kernel[table].pop(key, None)
        else:
            kernel[table][key] = row
        for question, verdict in watched:
            assert seen.verdict(*question) == verdict, (table, key, row, question)
    for name in ("endpoints", "addresses", "policy", "prefixes"):
        assert kernel[name] == dict(projection.table(name).rows), name


def watch(old: World, new: World, offset: int, between: tuple[World, ...] = ()) -> None:
    """`between`: what may be seen meanwhile."""
    projection = Projection()
    for number in LOCAL:
        projection.set_endpoint(endpoint(number))
    kernel: Rows = {"endpoints": {}, "addresses": {}, "policy": {}, "prefixes": {}}
    projection.apply(old.resources())
    first = made_plan(projection)
    for table, key, row in single_ops(first):
        kernel[table][key] = row
    projection.apply(difference(old.resources(), new.resources(offset)))
    run_and_watch(projection, kernel, old, new, between)


@given(pods, policy_sets, policies, st.booleans(), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_a_policy_that_comes_or_goes_never_shows_a_mixture(
    pods: dict[int, Pod], others: dict[str, Policy], policy: Policy, comes: bool, offset: int
) -> None:
    """No packet gets a verdict that neither the old nor the new policies give it. A
    ClusterNetworkPolicy may have rules in one direction for that."""
    if policy.tier != Tier.NETWORK_POLICY and policy.egress:
        policy = replace(policy, ingress=False)
    before, after = World(pods, others), World(pods, {**others, "z": policy})
    watch(before, after, offset) if comes else watch(after, before, offset)


@given(
    pods,
    policy_sets,
    st.sampled_from(KEYS),
    st.booleans(),
    st.lists(rules, max_size=3),
    st.lists(rules, max_size=3),
    st.sampled_from(KEYS),
)
@settings(max_examples=150, deadline=None)
def test_a_changed_policy_never_shows_a_mixture(
    pods: dict[int, Pod],
    others: dict[str, Policy],
    subject: str,
    egress: bool,
    old: list[Rule],
    new: list[Rule],
    other_subject: str,
) -> None:
    """Other rules in one direction, or another subject, or both."""
    versions = [
        Policy(subject, not egress, egress, tuple(r for r in rules if r.egress == egress))
        for rules in (old, new)
    ]
    watch(World(pods, {**others, "z": versions[0]}), World(pods, {**others, "z": versions[1]}), 0)
    for version in versions:
        moved = Policy(other_subject, not egress, egress, version.rules)
        watch(World(pods, {**others, "z": versions[0]}), World(pods, {**others, "z": moved}), 0)


@given(
    pods,
    policy_sets,
    st.booleans(),
    st.lists(cluster_policies, min_size=2, max_size=2),
)
@settings(max_examples=100, deadline=None)
def test_a_changed_cluster_policy_never_shows_a_mixture(
    pods: dict[int, Pod], others: dict[str, Policy], egress: bool, versions: list[Policy]
) -> None:
    """Other rules, another subject, priority or tier."""
    old, new = (replace(version, ingress=not egress, egress=egress) for version in versions)
    watch(World(pods, {**others, "z": old}), World(pods, {**others, "z": new}), 0)


def test_other_subjects_never_see_the_rules_that_went() -> None:
    """Pod 1 comes to the policy when its rule is no longer the one that lets pod 4 in."""
    pods = {1: Pod(frozenset("a")), 2: Pod(frozenset("ab")), 3: Pod(frozenset())}
    pods |= {4: Pod(frozenset("c")), 5: Pod(frozenset("d"))}
    closed = Policy("a", True, False)
    old = Policy("b", True, False, (Rule(False, frozenset("c")),))
    new = Policy("a", True, False, (Rule(False, frozenset("d")),))
    watch(World(pods, {"q": closed, "z": old}), World(pods, {"q": closed, "z": new}), 0)


@given(pods, policy_sets, st.sampled_from([n for n in PODS if n not in LOCAL]), selectors)
@settings(max_examples=100, deadline=None)
def test_a_relabelled_pod_never_shows_a_mixture(
    pods: dict[int, Pod], policies: dict[str, Policy], moved: int, labels: frozenset[str]
) -> None:
    changed = {**pods, moved: Pod(labels, pods[moved].ports)}
    watch(World(pods, policies), World(changed, policies), 0)


def test_rules_that_come_before_others_move_them_at_once() -> None:
    """One after the other, the rule that allows would come after the one that denies all."""
    allow, deny = Rule(True, frozenset("b")), Rule(True, None, action=Action.DENY)
    passes = Rule(True, frozenset("c"), action=Action.PASS)
    pods = {1: Pod(frozenset("s")), 4: Pod(frozenset("b")), 5: Pod(frozenset("c"))}
    pods |= {2: Pod(frozenset()), 3: Pod(frozenset())}
    old = Policy("s", False, True, (allow, deny), Tier.ADMIN)
    new = replace(old, rules=(passes, passes, allow, deny))
    watch(World(pods, {"x": old}), World(pods, {"x": new}), 0)


def test_a_rule_that_passes_and_one_of_the_next_tier_share_no_row() -> None:
    admin = Policy(
        "s", False, True, (
            Rule(True, frozenset("b"), action=Action.PASS), Rule(True, None, action=Action.DENY),
        ), Tier.ADMIN,
    )  # fmt: skip
    network = Policy("s", False, True, (Rule(True, frozenset("b")),))
    pods = {1: Pod(frozenset("s")), 4: Pod(frozenset("b")), 5: Pod(frozenset("c"))}
    rows = judge(fresh(World(pods, {"x": admin, "np": network})))
    assert rows.verdict(1, 4, TCP, 80)
    assert not rows.verdict(1, 5, TCP, 80)


def test_a_relabelled_pod_is_never_both() -> None:
    """It would get past the Deny rule about what it was by the Pass rule about what it will be, to
    what a NetworkPolicy allows to what it was."""
    admin = Policy(
        "s", False, True, (
            Rule(True, frozenset("b"), action=Action.PASS),
            Rule(True, frozenset("a"), action=Action.DENY),
        ), Tier.ADMIN,
    )  # fmt: skip
    network = Policy("s", False, True, (Rule(True, frozenset("a")),))
    pods = {1: Pod(frozenset("s")), 4: Pod(frozenset("a"))}
    pods |= {number: Pod(frozenset()) for number in (2, 3, 5)}
    changed = {**pods, 4: Pod(frozenset("b"))}
    rules = {"x": admin, "np": network}
    watch(World(pods, rules), World(changed, rules), 0)
    # Nor while another pod of this node gets a policy.
    pods[2] = changed[2] = Pod(frozenset("t"))
    more = {**rules, "other": Policy("t", True, False)}
    watch(World(pods, rules), World(changed, more), 0)


def test_a_pod_that_loses_labels_is_never_something_else() -> None:
    """Of its old class, which nobody is in any more, single rows must not be those of the new."""
    guard = Policy(
        "s", False, True, (
            Rule(True, frozenset("a")),
            Rule(True, frozenset("b"), (PortRange(TCP, 80, 80, ""),), Action.DENY),
            Rule(True, frozenset("c")),
        ), Tier.ADMIN,
    )  # fmt: skip
    closes = Policy("s", False, True, (Rule(True, None, action=Action.DENY),), Tier.BASELINE)
    pods = {1: Pod(frozenset("s")), 2: Pod(frozenset("t")), 4: Pod(frozenset("abc"))}
    pods |= {number: Pod(frozenset()) for number in (3, 5)}
    changed = {**pods, 4: Pod(frozenset("c"))}
    rules = {"x": guard, "y": closes}
    more = {**rules, "other": Policy("t", True, False)}
    watch(World(pods, rules), World(changed, more), 0)


@given(
    pods,
    policy_sets,
    network_policies,
    st.sampled_from([n for n in PODS if n not in LOCAL]),
    selectors,
)
@settings(max_examples=150, deadline=None)
def test_a_relabelled_pod_and_a_new_policy_look_like_one_after_the_other(
    pods: dict[int, Pod],
    policies: dict[str, Policy],
    policy: Policy,
    moved: int,
    labels: frozenset[str],
) -> None:
    changed = {**pods, moved: Pod(labels, pods[moved].ports)}
    more = {**policies, "z": policy}
    between = World(changed, policies), World(pods, more)
    watch(World(pods, policies), World(changed, more), 0, between)


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_port_prefixes_cover_exactly(first: int, last: int) -> None:
    found = list(prefixes(TCP, first, last))
    covered = [
        port
        for prefix in found
        for port in range(prefix.port, prefix.port + (1 << 16 - prefix.bits))
    ]
    assert covered == list(range(first, last + 1))
    assert len(found) <= 30


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        pytest.param(80, 80, [(80, 16)], id="one"),
        pytest.param(0, 65535, [(0, 0)], id="all"),
        pytest.param(
            1024,
            65535,
            [(1024, 6), (2048, 5), (4096, 4), (8192, 3), (16384, 2), (32768, 1)],
            id="high",
        ),
        pytest.param(81, 80, [], id="none"),
    ],
)
def test_port_prefixes(first: int, last: int, expected: list[tuple[int, int]]) -> None:
    assert list(prefixes(UDP, first, last)) == [PortPrefix(UDP, *item) for item in expected]


def test_a_local_pod_of_unknown_class_gets_nothing_through() -> None:
    projection = Projection()
    projection.set_endpoint(endpoint(1))
    projection.project()
    row = projection.table("endpoints").rows[address(1)]
    assert row.egress.rule_set == row.ingress.rule_set == DENY_ALL
    assert not judge(projection).verdict(1, 2, TCP, 80)
    # As a rule may deny it, not even its own node. That reaches the pod at any time.
    flow = Flow(address(1), address(101), TCP, 6443)
    projection.set_facts(RouteFacts("n1", (address(101),), (address(101),)))
    projection.project()
    assert not judged(DesiredMaps(projection), flow).passes
    back = Flow(address(101), address(1), TCP, 80)
    assert judged(DesiredMaps(projection), back).passes


def test_a_pod_that_left_the_api_keeps_its_policy_until_it_is_unwired() -> None:
    world = World({1: Pod(frozenset("a")), 2: Pod(frozenset())}, {"p": Policy("a", True, False)})
    projection = fresh(world)
    gone = World({2: Pod(frozenset())}, world.policies)
    projection.apply(difference(world.resources(), gone.resources()))
    projection.project()
    assert not judge(projection).verdict(2, 1, TCP, 80)


def test_an_event_names_the_rule_and_the_policy() -> None:
    world = World(
        {1: Pod(frozenset("a")), 4: Pod(frozenset("b"))},
        {"p": Policy("a", True, False, (Rule(False, frozenset("b")),))},
    )
    projection = fresh(world)
    (verdict,) = projection.table("policy").rows.values()
    name = projection.rule_numbers.key(verdict.rule)
    assert name is not None
    assert (name.namespace, name.policy, name.egress, name.index) == ("ns", "p", False, 0)


@pytest.mark.parametrize("isolated", [True, False])
def test_flows_to_a_new_isolated_pod_are_judged_again(isolated: bool) -> None:
    """They may have begun before the pod: then nothing judged its ingress."""
    policies = {"p": Policy("a", True, False)} if isolated else {}
    projection = Projection()
    projection.apply(World({1: Pod(frozenset("a"))}, policies).resources())
    made_plan(projection)
    projection.set_endpoint(endpoint(1))
    made = made_plan(projection)
    assert made.judge_again is isolated
