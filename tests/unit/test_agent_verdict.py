# SPDX-License-Identifier: Apache-2.0
"""The evaluator: tables of the specifications' cases, and near misses in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weir.agent import verdict
from weir.agent.classes import ClassContent
from weir.agent.resources import Action, NamedPort, PortRange, Tier
from weir.agent.verdict import (
    Decision,
    Ground,
    Party,
    Policy,
    Question,
    Rule,
    Standing,
)

TCP, UDP, ICMP = 6, 17, 1
HTTP = PortRange(TCP, 80, 80, "")
HIGH = PortRange(TCP, 8000, 8999, "")
WEB = PortRange(TCP, 0, 0, "web")
ANY_UDP = PortRange(UDP, 0, 65535, "")
ACCEPT, DENY, PASS = Action


def party(name: str, *selectors: str, web: int = 0, **fields: Standing) -> Party:
    ports = frozenset({NamedPort("web", TCP, web)} if web else set())
    return Party(name, ClassContent(frozenset(selectors), ports), **fields)


SUBJECT = party("ns/db", "db", web=8080)
PEER = party("ns/cart", "cart", web=81)
UNKNOWN = Party("10.1.2.3", standing=Standing.UNKNOWN)


def rule(
    *peers: str, ports: tuple[PortRange, ...] = (), action: Action = ACCEPT, index: int = 0
) -> Rule:
    return Rule(index, frozenset(peers) if peers else None, ports, action)


def np(name: str, *rules: Rule) -> Policy:
    return Policy("ns", name, "db", None, rules)


def cnp(name: str, *rules: Rule, tier: Tier = Tier.ADMIN, priority: int = 10) -> Policy:
    return Policy("", name, "db", None, rules, tier, priority)


def base(name: str, *rules: Rule, priority: int = 10) -> Policy:
    return cnp(name, *rules, tier=Tier.BASELINE, priority=priority)


def ask(
    *policies: Policy, peer: Party = PEER, protocol: int = TCP, port: int = 80
) -> tuple[Decision, Question]:
    question = Question(False, SUBJECT, peer, protocol, port)
    return verdict.decide(policies, question), question


SHUT = np("shut")
OPEN = np("open", rule("cart"))


@pytest.mark.parametrize(
    ("policies", "allowed", "ground", "by"),
    [
        pytest.param([], True, "not-isolated", "", id="no policy"),
        pytest.param([SHUT], False, "no-rule", "", id="isolated"),
        pytest.param([SHUT, OPEN], True, "rule", "ns/open", id="policies add up"),
        pytest.param([np("p", rule("other"))], False, "no-rule", "", id="another peer"),
        pytest.param([np("p", rule(ports=(HTTP,)))], True, "rule", "ns/p", id="a port"),
        pytest.param([np("p", rule(ports=(HIGH,)))], False, "no-rule", "", id="another port"),
        pytest.param([np("p", rule(ports=(WEB,)))], False, "no-rule", "", id="a port's name"),
        pytest.param(
            [SHUT, cnp("a", rule("cart"))],
            *(True, "rule", "ClusterNetworkPolicy a"),
            id="admin accepts first",
        ),
        pytest.param(
            [OPEN, cnp("a", rule("cart", action=DENY))],
            *(False, "rule", "ClusterNetworkPolicy a"),
            id="admin denies first",
        ),
        pytest.param(
            [SHUT, cnp("a", rule("cart", action=PASS), rule("cart"))],
            *(False, "no-rule", ""),
            id="pass skips the tier",
        ),
        pytest.param(
            [cnp("b", rule(action=DENY), priority=5), cnp("a", rule(), priority=6)],
            *(False, "rule", "ClusterNetworkPolicy b"),
            id="lower priority first",
        ),
        pytest.param(
            [cnp("b", rule(action=DENY)), cnp("a", rule())],
            *(True, "rule", "ClusterNetworkPolicy a"),
            id="then by name",
        ),
        pytest.param(
            [OPEN, base("z", rule(action=DENY))],
            *(True, "rule", "ns/open"),
            id="NetworkPolicies before baseline",
        ),
        pytest.param(
            [SHUT, base("z", rule())], False, "no-rule", "", id="isolation is final"
        ),
        pytest.param(
            [base("z", rule(action=DENY))],
            *(False, "rule", "ClusterNetworkPolicy z"),
            id="baseline denies",
        ),
        pytest.param(
            [base("z", rule(action=PASS), rule(action=DENY))],
            *(True, "not-isolated", ""),
            id="baseline passes",
        ),
        pytest.param(
            [cnp("a", rule(action=PASS)), base("z", rule(action=DENY))],
            *(False, "rule", "ClusterNetworkPolicy z"),
            id="admin passes to baseline",
        ),
    ],
)  # fmt: skip
def test_tiers(policies: list[Policy], allowed: bool, ground: str, by: str) -> None:
    for order in (policies, policies[::-1]):
        decision, _ = ask(*order)
        assert (decision.allowed, decision.ground) == (allowed, ground)
        assert (decision.by.title if decision.by else "") == by


@pytest.mark.parametrize(
    ("ports", "protocol", "port", "allowed"),
    [
        ((), ICMP, 0, True),
        ((HTTP,), ICMP, 0, False),
        ((ANY_UDP,), UDP, 1, True),
        ((ANY_UDP,), TCP, 1, False),
        ((HIGH,), TCP, 8000, True),
        ((HIGH,), TCP, 8999, True),
        ((HIGH,), TCP, 9000, False),
        ((WEB,), TCP, 8080, True),  # the subject is the target, and has it as 8080
        ((WEB,), TCP, 81, False),  # the peer's
        ((WEB,), UDP, 8080, False),
    ],
)
def test_ports(ports: tuple[PortRange, ...], protocol: int, port: int, allowed: bool) -> None:
    assert ask(np("p", rule(ports=ports)), protocol=protocol, port=port)[0].allowed is allowed


def test_a_ports_name_is_resolved_at_the_target_of_egress() -> None:
    policy = Policy("ns", "out", "db", (rule(ports=(WEB,)),), None)
    for port, allowed in ((81, True), (8080, False)):
        question = Question(True, SUBJECT, PEER, TCP, port)
        assert verdict.decide([policy], question).allowed is allowed


@pytest.mark.parametrize(
    ("policies", "peer", "allowed", "ground"),
    [
        ([SHUT], party("ns/db", "db", standing=Standing.ITSELF), True, Ground.ITSELF),
        ([SHUT], Party("node", own_node=True), True, Ground.OWN_NODE),
        ([], UNKNOWN, True, Ground.NOT_ISOLATED),
        ([OPEN], UNKNOWN, False, Ground.UNKNOWN_PEER),
        ([np("p", rule())], UNKNOWN, True, Ground.RULE),
        ([cnp("a", rule())], UNKNOWN, False, Ground.UNKNOWN_PEER),
        ([base("z", rule()), np("p", rule())], UNKNOWN, False, Ground.UNKNOWN_PEER),
    ],
)
def test_standings(policies: list[Policy], peer: Party, allowed: bool, ground: Ground) -> None:
    decision, question = ask(*policies, peer=peer)
    assert (decision.allowed, decision.ground) == (allowed, ground)
    assert verdict.missed(decision, question) == ()


def test_a_pod_that_is_not_known_gets_nothing() -> None:
    question = Question(True, Party("ns/new", standing=Standing.UNKNOWN), PEER, TCP, 80)
    decision = verdict.decide([], question)
    assert (decision.allowed, decision.ground) == (False, Ground.UNKNOWN_SUBJECT)
    # Its own node neither, which a rule may deny; that reaches it.
    to_node = replace(question, peer=replace(PEER, own_node=True))
    assert not verdict.decide([], to_node).allowed
    assert verdict.decide([], replace(to_node, egress=False)).allowed


@pytest.mark.parametrize(
    ("policy", "text", "wants", "has"),
    [
        pytest.param(
            np("p", rule("cart", ports=(HIGH, WEB))),
            "ingress rule 0 of ns/p matches all but the port",
            "TCP port 8000-8999 or TCP port web",
            "TCP port 80; at ns/db web is TCP port 8080",
            id="port",
        ),
        pytest.param(
            np("p", rule("api", ports=(HTTP,), index=3)),
            "ingress rule 3 of ns/p matches all but the peer",
            "api",
            "ns/cart, selected by cart",
            id="peer",
        ),
        pytest.param(
            cnp("a", rule("api"), rule("cart", action=DENY, index=1)),
            "ingress rule 0 of ClusterNetworkPolicy a matches all but the peer",
            "api",
            "ns/cart, selected by cart",
            id="before the rule that denies",
        ),
    ],
)
def test_near_misses(policy: Policy, text: str, wants: str, has: str) -> None:
    decision, question = ask(policy)
    [near] = verdict.missed(decision, question)
    assert (near.text(), near.wants, near.has) == (text, wants, has)
    assert verdict.change(decision, question)


def test_a_peer_that_many_selectors_select() -> None:
    [near] = verdict.missed(*ask(np("p", rule("api", "web")), peer=party("ns/x", *"abcde")))
    assert near.wants == "api or web"
    assert near.has == "ns/x, selected by a and b and c and 2 more"


def test_a_peer_that_no_selector_selects() -> None:
    [near] = verdict.missed(*ask(np("p", rule("api")), peer=party("198.51.100.1")))
    assert near.has == "198.51.100.1, which no policy's selector selects"


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(np("p", rule("api", ports=(HIGH,))), id="both are missed"),
        pytest.param(
            cnp("a", rule("cart", action=DENY), rule("api", index=1)), id="after the decision"
        ),
        pytest.param(
            cnp("a", rule("api", action=DENY), rule("cart", action=DENY, index=1)),
            id="another denial",
        ),
        pytest.param(np("p", rule("cart")), id="allowed"),
    ],
)
def test_no_near_miss(policy: Policy) -> None:
    assert verdict.missed(*ask(policy)) == ()


@pytest.mark.parametrize(
    ("policies", "words", "change"),
    [
        ([], "no policy selects ns/db for ingress", ""),
        ([OPEN], "ingress rule 0 of ns/open accepts it", ""),
        (
            [SHUT],
            "ns/shut isolates ns/db, and it has no rule that matches",
            "ns/shut needs an ingress rule with ns/cart and TCP port 80",
        ),
        (
            [SHUT, np("too")],
            "ns/shut and ns/too isolate ns/db, and none of them has a rule that matches",
            "one of ns/shut and ns/too needs an ingress rule with ns/cart and TCP port 80",
        ),
        (
            [cnp("a", rule(action=DENY))],
            "ingress rule 0 of ClusterNetworkPolicy a denies it",
            "that rule must not match ns/cart and TCP port 80, or a rule before it must accept "
            "them",
        ),
        ([cnp("a", rule("api"))], "no policy that decides selects ns/db for ingress", ""),
    ],
)
def test_words(policies: list[Policy], words: str, change: str) -> None:
    decision, question = ask(*policies)
    assert verdict.because(decision, question) == words
    assert verdict.change(decision, question) == change


rules = st.builds(
    Rule,
    st.integers(0, 3),
    st.none() | st.frozensets(st.sampled_from(["cart", "api"]), min_size=1),
    st.lists(st.sampled_from([HTTP, HIGH, WEB, ANY_UDP]), max_size=2).map(tuple),
    st.sampled_from(Action),
)
listed = st.none() | st.lists(rules, max_size=3).map(tuple)
some = st.lists(
    st.builds(
        Policy,
        st.just(""),
        st.sampled_from("abc"),
        st.just("db"),
        listed,
        listed,
        st.sampled_from([Tier.ADMIN, Tier.BASELINE]),
        st.integers(0, 2),
    ),
    max_size=4,
    unique_by=lambda policy: policy.name,
)


@given(some, st.booleans(), st.sampled_from([80, 81, 8080]))
def test_a_denial_has_a_rule_and_its_near_misses_do_not_match(
    policies: list[Policy], egress: bool, port: int
) -> None:
    question = Question(egress, SUBJECT, PEER, TCP, port)
    decision = verdict.decide(policies, question)
    if decision.allowed:
        assert verdict.missed(decision, question) == ()
        return
    assert decision.rule is not None
    assert decision.rule.action is DENY
    assert verdict.matches_peer(decision.rule, question)
    assert verdict.matches_port(decision.rule, question)
