# SPDX-License-Identifier: Apache-2.0
"""ClusterNetworkPolicy parsing: the letter of the API, failing closed, and what is told of it."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from support.operator_state import State, key

from weir.operator import kinds
from weir.operator.cluster_policy import (
    PATH,
    PROBLEMS_SHOWN,
    ClusterPolicies,
    ClusterPolicy,
    condition,
)
from weir.operator.conditions import Condition, Conditions
from weir.operator.objects import Key, Problem
from weir.operator.policy import Action, NetworkPolicy, Tier
from weir.operator.writes import Reference

Json = dict[str, Any]
EVERY_POD: Json = {"namespaces": {}}
HTTP: Json = {"tcp": {"destinationPort": {"number": 80}}}
UNKNOWN: Json = {"later": {}}


def spec(**more: Any) -> Json:
    return {"tier": "Admin", "priority": 7, "subject": {"namespaces": {}}, **more}


def rule(action: str = "Accept", peers: list[Json] | None = None, **more: Any) -> Json:
    return {"action": action, "from": peers if peers is not None else [EVERY_POD], **more}


def parsed(content: object, **meta: Any) -> ClusterPolicy:
    raw = {"metadata": {"name": "p", "uid": "u", "generation": 3, **meta}, "spec": content}
    result = kinds.CLUSTER_POLICY.read(msgspec.Raw(msgspec.json.encode(raw)))
    assert result.value is not None
    assert result.problems == ()  # they are told with the condition
    return result.value


def in_force(content: Json) -> NetworkPolicy:
    made = parsed(content)
    assert made.problems == ()
    assert made.policy is not None
    return made.policy


def fields(made: ClusterPolicy) -> list[str]:
    return [problem.field for problem in made.problems]


def rules(made: ClusterPolicy) -> list[tuple[int, str, list[str]]]:
    """Index, action and peers, "*": everything."""
    assert made.policy is not None
    return [
        (r.index, r.action.name, ["*"] if r.peers is None else [p.key for p in r.peers])
        for r in made.policy.rules
    ]


def test_a_policy_as_written() -> None:
    made = in_force(
        spec(
            tier="Baseline",
            priority=1000,
            ingress=[rule("Pass"), rule("Deny")],
            egress=[{"action": "Accept", "to": [{"networks": ["10.1.2.3/8", "fd00::/8"]}]}],
        )
    )
    assert (made.tier, made.priority, made.ingress, made.egress) == (
        Tier.BASELINE,
        1000,
        True,
        True,
    )
    assert [(r.egress, r.index, r.action) for r in made.rules] == [
        (False, 0, Action.PASS),
        (False, 1, Action.DENY),
        (True, 0, Action.ACCEPT),
    ]
    assert [p.key for p in made.rules[2].peers or ()] == ["ipblock 10.0.0.0/8", "ipblock fd00::/8"]
    one_sided = in_force(spec(ingress=[rule()]))
    assert (one_sided.ingress, one_sided.egress) == (True, False)
    assert parsed(spec()).policy is None  # no rules, no effect
    assert parsed(spec(ingress=None, egress=[])).problems == ()


@pytest.mark.parametrize(
    ("subject", "wanted"),
    [
        ({"namespaces": {}}, "nspods * / *"),
        ({"namespaces": {"matchLabels": {"a": "b"}}}, "nspods a in (b) / *"),
        ({"pods": {"podSelector": {}}}, "nspods * / *"),
        (
            {
                "pods": {
                    "namespaceSelector": {"matchLabels": {"a": "b"}},
                    "podSelector": {"matchExpressions": [{"key": "c", "operator": "Exists"}]},
                }
            },
            "nspods a in (b) / c",
        ),
    ],
)
def test_subjects_and_peers_select_pods_alike(subject: Json, wanted: str) -> None:
    made = in_force(spec(subject=subject, ingress=[rule(peers=[subject])]))
    assert made.subject.key == wanted
    assert [p.key for p in made.rules[0].peers or ()] == [wanted]


@pytest.mark.parametrize(
    ("protocol", "wanted"),
    [
        (HTTP, [(6, 80, 80, "")]),
        ({"udp": {"destinationPort": {"range": {"start": 5, "end": 9}}}}, [(17, 5, 9, "")]),
        ({"sctp": {"destinationPort": {"number": 65535}}}, [(132, 65535, 65535, "")]),
        (
            {"destinationNamedPort": "web"},
            [(6, 0, 0, "web"), (17, 0, 0, "web"), (132, 0, 0, "web")],
        ),
    ],
)
def test_protocols(protocol: Json, wanted: list[tuple[int, int, int, str]]) -> None:
    (made,) = in_force(spec(ingress=[rule(protocols=[protocol])])).rules
    assert [(p.protocol, p.first, p.last, p.name) for p in made.ports] == wanted


BAD_PEERS: list[tuple[Json, str]] = [
    ({}, "spec.ingress[0].from[1]"),
    (UNKNOWN, "spec.ingress[0].from[1]"),
    ({"nodes": {}}, "spec.ingress[0].from[1]"),  # for egress only
    ({"namespaces": {}, "pods": {"podSelector": {}}}, "spec.ingress[0].from[1]"),
    ({"pods": {}}, "spec.ingress[0].from[1].pods.podSelector"),
    (
        {"namespaces": {"matchExpressions": [{"key": "a", "operator": "Like"}]}},
        "spec.ingress[0].from[1].namespaces.matchExpressions[0].operator",
    ),
]
BAD_PROTOCOLS: list[tuple[Json, str]] = [
    ({}, "spec.ingress[0].protocols[1]"),
    ({"icmp": {}}, "spec.ingress[0].protocols[1]"),
    ({"tcp": {}}, "spec.ingress[0].protocols[1].tcp.destinationPort"),
    ({"tcp": {"destinationPort": {}}}, "spec.ingress[0].protocols[1].tcp.destinationPort"),
    ({**HTTP, "destinationNamedPort": "web"}, "spec.ingress[0].protocols[1]"),
    (
        {"udp": {"destinationPort": {"number": 0}}},
        "spec.ingress[0].protocols[1].udp.destinationPort.number",
    ),
    (
        {"udp": {"destinationPort": {"range": {"start": 9, "end": 8}}}},
        "spec.ingress[0].protocols[1].udp.destinationPort.range",
    ),
    (
        {"udp": {"destinationPort": {"range": {"end": 8}}}},
        "spec.ingress[0].protocols[1].udp.destinationPort.range.start",
    ),
]


@pytest.mark.parametrize(("bad", "where"), BAD_PEERS)
def test_a_peer_that_is_not_understood(bad: Json, where: str) -> None:
    accept = parsed(spec(ingress=[rule("Accept", [EVERY_POD, bad])]))
    assert rules(accept) == [(0, "ACCEPT", ["nspods * / *"])]
    alone = parsed(spec(ingress=[rule("Accept", [bad]), rule("Deny")]))
    assert rules(alone) == [(1, "DENY", ["nspods * / *"])]
    for action in ("Deny", "Pass", "Later"):
        other = parsed(spec(ingress=[rule(action, [EVERY_POD, bad], protocols=[HTTP])]))
        assert rules(other) == [(0, "DENY", ["*"])]
        assert other.policy is not None
        assert other.policy.rules[0].ports == ()
        assert where in fields(other)
        assert "denies everything" in other.problems[-1].message
    assert fields(accept) == [where]


@pytest.mark.parametrize(("bad", "where"), BAD_PROTOCOLS)
def test_a_protocol_that_is_not_understood(bad: Json, where: str) -> None:
    accept = parsed(spec(ingress=[rule("Accept", protocols=[HTTP, bad])]))
    assert accept.policy is not None
    assert [p.first for p in accept.policy.rules[0].ports] == [80]
    assert fields(accept) == [where]
    alone = parsed(spec(ingress=[rule("Accept", protocols=[bad])]))
    assert alone.policy is None
    for action in ("Deny", "Pass"):
        other = parsed(spec(ingress=[rule(action, protocols=[HTTP, bad])]))
        assert rules(other) == [(0, "DENY", ["*"])]
        assert fields(other) == [where]


@pytest.mark.parametrize(
    ("peer", "where"),
    [
        ({"networks": []}, "spec.egress[0].to[0].networks"),
        ({"networks": ["10.0.0.0/8", "10/8"]}, "spec.egress[0].to[0].networks[1]"),
        ({"networks": ["10.0.0.0/8"], "nodes": {}}, "spec.egress[0].to[0]"),
        ({"domainNames": ["example.com"]}, "spec.egress[0].to[0]"),
    ],
)
def test_an_egress_peer_that_is_not_understood(peer: Json, where: str) -> None:
    other = {"nodes": {"matchLabels": {"zone": "a"}}}
    accept = parsed(spec(egress=[{"action": "Accept", "to": [peer, other]}]))
    assert rules(accept) == [(0, "ACCEPT", ["nodes zone in (a)"])]
    assert fields(accept) == [where]
    deny = parsed(spec(egress=[{"action": "Deny", "to": [peer, other]}]))
    assert rules(deny) == [(0, "DENY", ["*"])]


def test_a_rule_without_peers() -> None:
    for peers in ({}, {"from": []}, {"to": [EVERY_POD]}):
        deny = parsed(spec(ingress=[{"action": "Deny", **peers}]))
        assert (rules(deny), fields(deny)) == ([(0, "DENY", ["*"])], ["spec.ingress[0].from"])
        assert parsed(spec(ingress=[{"action": "Accept", **peers}])).policy is None


@pytest.mark.parametrize(
    ("changes", "where", "tier", "subject"),
    [
        ({"subject": {}}, "spec.subject", "ADMIN", "nspods * / *"),
        ({"subject": UNKNOWN, "tier": "Baseline"}, "spec.subject", "BASELINE", "nspods * / *"),
        (
            {"subject": {"namespaces": {}, "pods": {"podSelector": {}}}},
            "spec.subject",
            "ADMIN",
            "nspods * / *",
        ),
        (
            {
                "subject": {
                    "namespaces": {
                        "matchLabels": {"a": "b"},
                        "matchExpressions": [{"key": "c", "operator": "Like"}],
                    }
                }
            },
            "spec.subject.namespaces.matchExpressions[0].operator",
            "ADMIN",
            "nspods a in (b) / *",
        ),
        ({"tier": "Later"}, "spec.tier", "ADMIN", "nspods * / *"),
        ({"priority": None}, "spec.priority", "ADMIN", "nspods * / *"),
        ({"priority": 1001}, "spec.priority", "ADMIN", "nspods * / *"),
        ({"priority": -1}, "spec.priority", "ADMIN", "nspods * / *"),
    ],
)
def test_whose_rules_they_are_is_not_understood(
    changes: Json, where: str, tier: str, subject: str
) -> None:
    written = {
        "ingress": [rule("Accept"), rule("Pass"), rule("Deny")],
        "egress": [{"action": "Accept", "to": [EVERY_POD]}],
    }
    made = parsed(spec(**written) | changes)
    assert fields(made) == [where]
    assert "nothing is accepted" in made.problems[0].message
    assert made.policy is not None
    assert (made.policy.tier.name, made.policy.subject.key) == (tier, subject)
    assert rules(made) == [(1, "DENY", ["*"])]
    assert (made.policy.ingress, made.policy.egress) == (True, False)


@pytest.mark.parametrize(
    ("content", "tier", "subject", "sides"),
    [
        ("words", "ADMIN", "nspods * / *", (True, True)),
        ({"ingress": [{"action": 5}]}, "ADMIN", "nspods * / *", (True, False)),
        (
            spec(tier="Baseline", priority="x", egress=[rule("Accept")], ingress=[]),
            "BASELINE",
            "nspods * / *",
            (False, True),
        ),
        (
            spec(subject={"namespaces": {"matchLabels": {"a": "b"}}}, ingress=5),
            "ADMIN",
            "nspods a in (b) / *",
            (True, False),
        ),
        (spec(subject=5, ingress={}, egress=5), "ADMIN", "nspods * / *", (True, True)),
    ],
)
def test_json_that_is_no_policy(
    content: object, tier: str, subject: str, sides: tuple[bool, bool]
) -> None:
    made = parsed(content)
    assert made.policy is not None
    assert (made.uid, made.generation) == ("u", 3)
    assert (made.policy.tier.name, made.policy.subject.key) == (tier, subject)
    assert (made.policy.ingress, made.policy.egress) == sides
    assert all(r.peers is None and r.action is Action.DENY for r in made.policy.rules)
    (problem,) = made.problems
    assert problem.message.startswith("cannot be read: ")


def test_an_odd_status_says_nothing_of_the_policy() -> None:
    content = {
        "metadata": {"name": "p", "uid": "u"},
        "spec": spec(ingress=[rule()]),
        "status": {"conditions": [{"type": 5}]},
    }
    made = kinds.CLUSTER_POLICY.read(msgspec.Raw(msgspec.json.encode(content))).value
    assert made is not None
    assert (made.problems, made.condition) == ((), None)


class Told:
    """ClusterPolicies, and what was told."""

    def __init__(self) -> None:
        self.told: list[tuple[Reference, tuple[Problem, ...]]] = []
        self.conditions = Conditions(asyncio.Event())
        self.policies = ClusterPolicies(lambda r, p: self.told.append((r, p)), self.conditions)

    def wanted(self) -> Condition:
        return self.conditions._wanted[f"{PATH}/p/status"][0]


def test_the_condition_and_events_tell_what_is_not_as_written() -> None:
    world, at = Told(), Key("", "p")
    good = parsed(spec(ingress=[rule()]))
    assert world.policies.change(at, good) == good.policy
    assert (world.wanted().status, world.wanted().message) == ("True", "in force as written")
    assert (world.told, world.policies.with_problems) == ([], 0)
    bad = parsed(spec(ingress=[rule("Deny", [{}])]))
    assert world.policies.change(at, bad) == bad.policy
    assert (world.wanted().status, world.wanted().observed_generation) == ("False", 3)
    assert world.wanted().message.startswith("spec.ingress[0].from[0]: needs exactly one of ")
    world.policies.change(at, bad)  # its status is another now, say
    ((about, problems),) = world.told
    assert (about.kind, about.namespace, about.name, about.uid) == (
        "ClusterNetworkPolicy",
        "",
        "p",
        "u",
    )
    assert problems == bad.problems
    assert world.policies.with_problems == 1
    assert world.policies.change(at, None) is None
    assert (world.conditions.waiting, world.policies.with_problems) == (0, 0)
    many = parsed(spec(ingress=[rule("Deny", [{}] * 5)]))
    assert condition(many).message.endswith(f"and {5 - PROBLEMS_SHOWN} more problems")


def test_the_resource() -> None:
    state = State()
    state.set("Namespace", key("", "ns"), {"metadata": {"name": "ns"}})
    node = {
        "metadata": {"name": "n1", "labels": {"zone": "a"}},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    }
    state.set("Node", key("", "n1"), node)
    egress = [{"action": "Deny", "to": [{"nodes": {"matchLabels": {"zone": "a"}}}]}]
    content = {"metadata": {"name": "p"}, "spec": spec(ingress=[rule("Pass")], egress=egress)}
    state.set("ClusterNetworkPolicy", key("", "p"), content)
    state.flush()
    made = state.view.resources["cluster-policy/p"].policy
    assert (made.namespace, made.name, made.tier, made.priority) == ("", "p", 1, 7)
    assert [(r.egress, r.index, r.any_peer, r.action) for r in made.rules] == [
        (False, 0, False, 2),
        (True, 0, False, 1),
    ]
    assert [state.view.selector_key(n) for n in made.rules[1].peers] == ["nodes zone in (a)"]
    number = getattr(state.view.resources["node/n1"].node, "class")
    assert state.view.content(number) == (frozenset(made.rules[1].peers), {})
    state.set("ClusterNetworkPolicy", key("", "p"), None)
    changes = {c.name: c.resource for c in state.flush()}
    assert changes["cluster-policy/p"] is None
    assert getattr(state.view.resources["node/n1"].node, "class") == 0
    assert state.view.named("class") == []
    assert state.view.named("selector") == []
