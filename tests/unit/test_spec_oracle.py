# SPDX-License-Identifier: Apache-2.0
"""The oracle itself, by truth tables written out by hand from the two API references."""

from __future__ import annotations

from typing import Any

import pytest
from support.spec_oracle import (
    ADMIN,
    AUDIT,
    BASELINE,
    EGRESS,
    INGRESS,
    NETWORK_POLICY,
    UNKNOWN_PEER,
    Cluster,
    Decider,
    Decision,
)

Json = dict[str, Any]

CLIENT, SERVER, OTHER, OTHER_NODE = "10.0.1.1", "10.0.1.2", "10.0.2.1", "192.0.2.2"
OWN_NODE, OUTSIDE, UNKNOWN = "192.0.2.1", "198.51.100.9", "10.0.2.99"


def a_node(number: int, **labels: str) -> Json:
    return {
        "kind": "Node",
        "metadata": {"name": f"n{number}", "labels": labels},
        "spec": {"podCIDRs": [f"10.0.{number}.0/24"]},
        "status": {
            "addresses": [
                {"type": "Hostname", "address": f"n{number}"},
                {"type": "InternalIP", "address": f"192.0.2.{number}"},
            ]
        },
    }


def a_pod(namespace: str, name: str, ip: str, **labels: str) -> Json:
    ports = [{"name": "web", "containerPort": 80}, {"name": "dns", "containerPort": 53}]
    ports.append({"name": "dns", "containerPort": 53, "protocol": "UDP"})
    return {
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": labels},
        "spec": {"nodeName": f"n{ip[5]}", "containers": [{"ports": ports}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    }


@pytest.fixture
def cluster() -> Cluster:
    made = Cluster()
    for name in ("blue", "red"):
        made.put({"kind": "Namespace", "metadata": {"name": name, "labels": {"color": name}}})
    made.put(a_node(1, zone="a"))
    made.put(a_node(2, zone="b"))
    made.put(a_pod("blue", "client", CLIENT, app="client"))
    made.put(a_pod("blue", "server", SERVER, app="server"))
    made.put(a_pod("red", "other", OTHER, app="client"))
    return made


def network_policy(name: str, **spec: Any) -> Json:
    return {
        "kind": "NetworkPolicy",
        "metadata": {"namespace": "blue", "name": name},
        "spec": {"podSelector": {}, **spec},
    }


def cluster_policy(name: str, tier: str = ADMIN, priority: int = 10, **spec: Any) -> Json:
    return {
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "tier": tier,
            "priority": priority,
            "subject": {"namespaces": {"matchLabels": {"color": "blue"}}},
            **spec,
        },
    }


def rule(action: str, *peers: Json, side: str = "from", **more: Any) -> Json:
    return {"action": action, side: list(peers), **more}


EVERY_POD: Json = {"namespaces": {}}
RED: Json = {"namespaces": {"matchLabels": {"color": "red"}}}
BLOCK: Json = {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8"]}
CLIENTS: Json = {
    "pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "client"}}}
}


@pytest.mark.parametrize(
    ("policies", "allowed", "denied"),
    [
        pytest.param([], [CLIENT, OTHER, OUTSIDE], [], id="none"),
        pytest.param([{}], [OWN_NODE], [CLIENT, OTHER, OUTSIDE, OTHER_NODE], id="no rules"),
        pytest.param([{"ingress": [{}]}], [CLIENT, OTHER, OUTSIDE, UNKNOWN], [], id="empty rule"),
        pytest.param(
            [{"ingress": [{"from": [{"podSelector": {}}]}]}],
            [CLIENT],
            [OTHER, OUTSIDE, UNKNOWN],
            id="pods of the same namespace",
        ),
        pytest.param(
            [{"ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"color": "red"}}}]}]}],
            [OTHER],
            [CLIENT, OUTSIDE],
            id="pods of another namespace",
        ),
        pytest.param(
            [{"ingress": [{"from": [{"ipBlock": BLOCK}]}]}],
            [OUTSIDE, OTHER_NODE],
            [CLIENT, OTHER, UNKNOWN],
            id="a block with an exception",
        ),
        pytest.param(
            [{}, {"ingress": [{"from": [{"podSelector": {}}]}]}],
            [CLIENT],
            [OTHER],
            id="any of two policies",
        ),
        pytest.param([{"policyTypes": ["Egress"]}], [CLIENT, OTHER], [], id="egress only"),
    ],
)
def test_network_policies(
    cluster: Cluster, policies: list[Json], allowed: list[str], denied: list[str]
) -> None:
    for i, spec in enumerate(policies):
        cluster.put(network_policy(f"np{i}", **spec))
    for source in (*allowed, *denied):
        decision = cluster.decision(INGRESS, source, SERVER, "TCP", 80)
        assert decision.allowed == (source in allowed), (source, decision)


@pytest.mark.parametrize(
    ("policies", "isolated", "wanted"),
    [
        pytest.param([], False, Decision(True), id="nobody decides"),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Deny", EVERY_POD)])],
            False,
            Decision(False, ADMIN, (Decider("ClusterNetworkPolicy a", 0),)),
            id="admin denies",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Accept", RED), rule("Accept", CLIENTS)])],
            True,
            Decision(True, ADMIN, (Decider("ClusterNetworkPolicy a", 1),)),
            id="admin accepts before NetworkPolicies",
        ),
        pytest.param(
            [
                cluster_policy("a", priority=2, ingress=[rule("Deny", EVERY_POD)]),
                cluster_policy("b", priority=1, ingress=[rule("Accept", EVERY_POD)]),
            ],
            False,
            Decision(True, ADMIN, (Decider("ClusterNetworkPolicy b", 0),)),
            id="the lower priority value first",
        ),
        pytest.param(
            [
                cluster_policy("b", ingress=[rule("Accept", EVERY_POD)]),
                cluster_policy("a", ingress=[rule("Deny", EVERY_POD)]),
            ],
            False,
            Decision(False, ADMIN, (Decider("ClusterNetworkPolicy a", 0),)),
            id="equal priorities by name",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Pass", CLIENTS), rule("Deny", EVERY_POD)])],
            False,
            Decision(True),
            id="pass, and nobody else",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Pass", CLIENTS), rule("Accept", EVERY_POD)])],
            True,
            Decision(False, NETWORK_POLICY, (Decider("blue/isolate", None),)),
            id="pass to NetworkPolicies",
        ),
        pytest.param(
            [
                cluster_policy("a", ingress=[rule("Pass", CLIENTS)]),
                cluster_policy("b", BASELINE, ingress=[rule("Deny", EVERY_POD)]),
            ],
            False,
            Decision(False, BASELINE, (Decider("ClusterNetworkPolicy b", 0),)),
            id="pass to baseline",
        ),
        pytest.param(
            [cluster_policy("b", BASELINE, ingress=[rule("Accept", EVERY_POD)])],
            True,
            Decision(False, NETWORK_POLICY, (Decider("blue/isolate", None),)),
            id="NetworkPolicies before baseline",
        ),
        pytest.param(
            [cluster_policy("b", BASELINE, ingress=[rule("Pass", CLIENTS), rule("Deny", CLIENTS)])],
            False,
            Decision(True),
            id="pass in baseline allows",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Deny", RED)])],
            False,
            Decision(True),
            id="other peers are not denied",
        ),
        pytest.param(
            [cluster_policy("a", egress=[rule("Deny", EVERY_POD, side="to")])],
            False,
            Decision(True),
            id="egress rules say nothing of ingress",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Accept", {"later": {}})])],
            False,
            Decision(True),
            id="accept from who knows whom accepts nothing",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Deny", RED, {"later": {}})])],
            False,
            Decision(False, ADMIN, (Decider("ClusterNetworkPolicy a", 0),)),
            id="deny to who knows whom denies all",
        ),
        pytest.param(
            [cluster_policy("a", ingress=[rule("Pass", RED, protocols=[{"icmp": {}}])])],
            False,
            Decision(False, ADMIN, (Decider("ClusterNetworkPolicy a", 0),)),
            id="pass of who knows what denies all",
        ),
    ],
)
def test_tiers(cluster: Cluster, policies: list[Json], isolated: bool, wanted: Decision) -> None:
    for policy in policies:
        cluster.put(policy)
    if isolated:
        cluster.put(network_policy("isolate"))
    assert cluster.decision(INGRESS, CLIENT, SERVER, "TCP", 80) == wanted


@pytest.mark.parametrize(
    ("peer", "denied"),
    [
        ({"namespaces": {}}, {SERVER, OTHER}),
        (RED, {OTHER}),
        (CLIENTS, {OTHER}),
        ({"nodes": {}}, {OWN_NODE, OTHER_NODE}),
        ({"nodes": {"matchLabels": {"zone": "b"}}}, {OTHER_NODE}),
        ({"networks": ["0.0.0.0/0"]}, {SERVER, OTHER, OWN_NODE, OTHER_NODE, OUTSIDE}),
        ({"networks": ["10.0.2.0/24", "192.0.2.1/32"]}, {OTHER, OWN_NODE}),
    ],
)
def test_peers_of_egress(cluster: Cluster, peer: Json, denied: set[str]) -> None:
    cluster.put(cluster_policy("a", egress=[rule("Deny", peer, side="to")]))
    targets = {SERVER, OTHER, OWN_NODE, OTHER_NODE, OUTSIDE}
    found = {t for t in targets if not cluster.decision(EGRESS, CLIENT, t, "TCP", 80).allowed}
    assert found == denied
    unknown = cluster.decision(EGRESS, CLIENT, UNKNOWN, "TCP", 80)
    assert (unknown.allowed, unknown.tier) == (False, UNKNOWN_PEER)
    assert cluster.allows(CLIENT, CLIENT, "TCP", 80)  # a pod reaches itself
    assert cluster.allows(OTHER, CLIENT, "TCP", 80)  # not a subject


@pytest.mark.parametrize(
    ("protocols", "matched"),
    [
        (None, {("TCP", 80), ("TCP", 53), ("UDP", 53), ("UDP", 80), ("ICMP", 0)}),
        ([{"tcp": {"destinationPort": {"number": 80}}}], {("TCP", 80)}),
        ([{"udp": {"destinationPort": {"range": {"start": 1, "end": 53}}}}], {("UDP", 53)}),
        ([{"destinationNamedPort": "web"}], {("TCP", 80)}),
        ([{"destinationNamedPort": "dns"}], {("TCP", 53), ("UDP", 53)}),
        ([{"sctp": {"destinationPort": {"number": 80}}}], set()),
        (
            [{"tcp": {"destinationPort": {"number": 80}}}, {"destinationNamedPort": "dns"}],
            {("TCP", 80), ("TCP", 53), ("UDP", 53)},
        ),
    ],
)
def test_protocols(
    cluster: Cluster, protocols: list[Json] | None, matched: set[tuple[str, int]]
) -> None:
    more = {} if protocols is None else {"protocols": protocols}
    cluster.put(cluster_policy("a", ingress=[rule("Deny", EVERY_POD, **more)]))
    asked = [("TCP", 80), ("TCP", 53), ("UDP", 53), ("UDP", 80), ("ICMP", 0)]
    assert {q for q in asked if not cluster.allows(CLIENT, SERVER, *q)} == matched


def test_a_pod_and_its_own_node(cluster: Cluster) -> None:
    cluster.put(network_policy("isolate", policyTypes=["Ingress", "Egress"]))
    cluster.put(cluster_policy("a", BASELINE, egress=[rule("Deny", {"nodes": {}}, side="to")]))
    assert cluster.allows(OWN_NODE, SERVER, "TCP", 80)
    assert cluster.allows(SERVER, OWN_NODE, "TCP", 80)  # NetworkPolicies decide, and never forbid
    assert not cluster.allows(OTHER_NODE, SERVER, "TCP", 80)
    cluster.take(network_policy("isolate"))
    assert not cluster.allows(SERVER, OWN_NODE, "TCP", 80)
    cluster.put(cluster_policy("b", ingress=[rule("Deny", {"networks": []})]))
    assert cluster.allows(OWN_NODE, SERVER, "TCP", 80)


def test_audit_is_the_namespaces(cluster: Cluster) -> None:
    assert not cluster.audited(SERVER)
    meta = {"name": "blue", "annotations": {AUDIT: "true"}}
    cluster.put({"kind": "Namespace", "metadata": meta})
    assert cluster.audited(SERVER)
    assert not cluster.audited(OTHER)
    assert not cluster.audited(OUTSIDE)
