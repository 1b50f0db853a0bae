# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicy parsing: the letter of the spec, and failing closed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from weir.operator import kinds
from weir.operator.objects import Parsed
from weir.operator.policy import NetworkPolicy

Json = dict[str, Any]


def parsed(spec: Json) -> Parsed[NetworkPolicy]:
    content = {"metadata": {"name": "p", "namespace": "ns"}, "spec": spec}
    return kinds.POLICY.read(msgspec.Raw(msgspec.json.encode(content)))


def policy(spec: Json) -> NetworkPolicy:
    result = parsed(spec)
    assert result.value is not None
    assert result.problems == ()
    return result.value


@pytest.mark.parametrize(
    ("spec", "ingress", "egress"),
    [
        pytest.param({}, True, False, id="nothing"),
        pytest.param({"ingress": []}, True, False, id="empty ingress"),
        pytest.param({"egress": [{}]}, True, True, id="egress rules"),
        pytest.param({"egress": []}, True, False, id="empty egress"),
        pytest.param({"policyTypes": ["Egress"]}, False, True, id="egress named"),
        pytest.param({"policyTypes": []}, True, False, id="no types named"),
    ],
)
def test_policy_types(spec: Json, ingress: bool, egress: bool) -> None:
    made = policy(spec)
    assert (made.ingress, made.egress) == (ingress, egress)


@pytest.mark.parametrize(
    ("rule", "any_peer", "keys"),
    [
        pytest.param({}, True, [], id="missing"),
        pytest.param({"from": []}, True, [], id="empty"),
        pytest.param({"from": [{"podSelector": {}}]}, False, ["pods ns=ns *"], id="pods of ns"),
        pytest.param({"from": [{"namespaceSelector": {}}]}, False, ["nspods * / *"], id="all pods"),
        pytest.param(
            {
                "from": [
                    {
                        "namespaceSelector": {"matchLabels": {"team": "x"}},
                        "podSelector": {"matchLabels": {"b": "2", "a": "1"}},
                    }
                ]
            },
            False,
            ["nspods team in (x) / a in (1) b in (2)"],
            id="both",
        ),
        pytest.param(
            {"from": [{"ipBlock": {"cidr": "10.1.2.3/8", "except": ["10.1.0.0/16"]}}]},
            False,
            ["ipblock 10.0.0.0/8 except 10.1.0.0/16"],
            id="ipBlock with host bits",
        ),
    ],
)
def test_peers(rule: Json, any_peer: bool, keys: list[str]) -> None:
    (made,) = policy({"ingress": [rule]}).rules
    assert (made.peers is None) is any_peer
    assert [peer.key for peer in made.peers or ()] == keys


@pytest.mark.parametrize(
    ("port", "wanted"),
    [
        pytest.param({}, (6, 0, 65535, ""), id="nothing is all of TCP"),
        pytest.param({"protocol": "SCTP"}, (132, 0, 65535, ""), id="protocol alone"),
        pytest.param({"port": 80}, (6, 80, 80, ""), id="number"),
        pytest.param({"port": 80, "endPort": 90}, (6, 80, 90, ""), id="range"),
        pytest.param({"port": "web", "protocol": "UDP"}, (17, 0, 0, "web"), id="name"),
    ],
)
def test_ports(port: Json, wanted: tuple[int, int, int, str]) -> None:
    (rule,) = policy({"ingress": [{"ports": [port]}]}).rules
    (made,) = rule.ports
    assert (made.protocol, made.first, made.last, made.name) == wanted


def test_keys_do_not_depend_on_how_it_was_written() -> None:
    labels = policy({"podSelector": {"matchLabels": {"a": "1", "b": "2"}}})
    same = [
        {"key": "b", "operator": "In", "values": ["2", "2"]},
        {"key": "a", "operator": "In", "values": ["1"]},
    ]
    assert labels.subject == policy({"podSelector": {"matchExpressions": same}}).subject


BAD_PORTS = [
    pytest.param({"port": 0}, id="port 0"),
    pytest.param({"port": 70000}, id="port too high"),
    pytest.param({"port": 90, "endPort": 80}, id="endPort below port"),
    pytest.param({"port": "web", "endPort": 80}, id="endPort with a name"),
    pytest.param({"endPort": 80}, id="endPort without port"),
    pytest.param({"protocol": "ICMP"}, id="unknown protocol"),
    pytest.param({"port": ""}, id="empty name"),
]
BAD_PEERS = [
    pytest.param({}, id="empty peer"),
    pytest.param({"ipBlock": {"cidr": "10.0.0.0/33"}}, id="bad CIDR"),
    pytest.param({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["x"]}}, id="bad except"),
    pytest.param({"ipBlock": {"cidr": "10.0.0.0/8", "except": ["0.0.0.0/0"]}}, id="all excepted"),
    pytest.param({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}, id="block and pods"),
    pytest.param(
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}},
        id="unknown operator",
    ),
    pytest.param(
        {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}, id="In of nothing"
    ),
    pytest.param({"podSelector": {"matchLabels": {"a": "1) b in (2"}}}, id="forged key"),
]


@pytest.mark.parametrize("port", BAD_PORTS)
def test_a_bad_port_allows_nothing_and_the_others_stay(port: Json) -> None:
    result = parsed({"ingress": [{"ports": [port]}, {"ports": [port, {"port": 80}]}]})
    assert len(result.problems) == 2
    assert result.value is not None
    assert result.value.ingress
    assert [(r.index, [p.first for p in r.ports]) for r in result.value.rules] == [(1, [80])]


@pytest.mark.parametrize("peer", BAD_PEERS)
def test_a_bad_peer_allows_nothing_and_the_others_stay(peer: Json) -> None:
    good: Json = {"podSelector": {}}
    result = parsed({"ingress": [{"from": [peer]}, {"from": [peer, good]}]})
    assert len(result.problems) == 2
    assert result.value is not None
    (rule,) = result.value.rules
    assert rule.index == 1
    assert [p.key for p in rule.peers or ()] == ["pods ns=ns *"]


def test_an_except_elsewhere_is_reported_and_changes_nothing() -> None:
    block = {"cidr": "10.0.0.0/8", "except": ["192.168.0.0/16"]}
    result = parsed({"ingress": [{"from": [{"ipBlock": block}]}]})
    assert result.problems[0].field == "spec.ingress[0].from[0].ipBlock.except[0]"
    assert result.value is not None
    (rule,) = result.value.rules
    assert [p.key for p in rule.peers or ()] == ["ipblock 10.0.0.0/8"]


def test_a_subject_that_is_not_understood_isolates_more_and_allows_nothing() -> None:
    expressions = [{"key": "a", "operator": "Gt", "values": ["1"]}]
    selector = {"matchLabels": {"app": "web"}, "matchExpressions": expressions}
    result = parsed({"podSelector": selector, "ingress": [{}]})
    made = result.value
    assert made is not None
    assert made.subject.key == "pods ns=ns app in (web)"
    assert (made.ingress, made.egress, made.rules) == (True, True, ())
    assert "unknown operator 'Gt'" in result.problems[0].message


def test_an_unknown_type_isolates_both_ways() -> None:
    result = parsed({"policyTypes": ["ingress"], "ingress": []})
    assert result.value is not None
    assert (result.value.ingress, result.value.egress) == (True, True)


def test_rules_without_effect_are_reported() -> None:
    result = parsed({"policyTypes": ["Egress"], "ingress": [{}]})
    assert [problem.field for problem in result.problems] == ["spec.ingress"]
    assert result.value is not None
    assert not result.value.rules
