# SPDX-License-Identifier: Apache-2.0
"""What `weir policy` tells is what happens to packets: a drop, the rule, and the way out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from e2e.suite.cli import weir
from e2e.suite.conftest import Objects
from e2e.suite.kubectl import Manifest, eventually
from e2e.suite.policies import PROPAGATION_S, block, matrix, pods, policy, port, spaces, targets
from e2e.suite.probes import Probe
from e2e.suite.world import MORE_TCP, TCP, World

WEB = {"app": "web"}
FIRST, SECOND, *_ = MORE_TCP


def until(client: Probe, host: str, number: int, want: str) -> None:
    target = ["tcp", host, number]
    found = client.call("until", target=target, want=want, deadline=PROPAGATION_S)
    assert found.get("error", "answer") == want, found


def why(cluster: World, source: str, host: str, what: str) -> dict[str, Any]:
    """Of a moment without changes: policies and maps must agree."""
    code, told = weir(cluster, "why", source, host, what)
    assert (code, told["missing"]) == (0, []), told
    assert all(one["agree"] for one in told["directions"])
    return dict(told)


@pytest.mark.parametrize("server", ["web-1", "web-2"])
def test_a_drop_its_rule_and_the_way_out(cluster: World, objects: Objects, server: str) -> None:
    """On the client's node and on another, in both families."""
    rules = [{"from": [pods(app="client")], "ports": [port(FIRST)]}]
    only = policy(cluster.a, "only-first", WEB, ingress=rules)
    objects.apply(only)
    client, source = cluster["client-1"], f"{cluster.a}/client-1"
    for family in cluster.families:
        host = cluster[server].address(family)
        until(client, host, TCP, "timeout")
        told = why(cluster, source, host, f"{TCP}/tcp")
        assert told["allowed"] is False
        assert told["destination"]["pod"] == f"{cluster.a}/{server}"
        [denied] = [one for one in told["directions"] if not one["model"]["allowed"]]
        assert (denied["direction"], denied["node"]) == ("ingress", cluster[server].node)
        assert denied["maps"]["reason"] == "policy-ingress"
        [near] = denied["model"]["near_misses"]
        assert near["policy"] == f"{cluster.a}/only-first"
        assert near["wants"] == f"TCP port {FIRST}"
        assert near["has"] == f"TCP port {TCP}"
        # What it wants is what passes.
        assert why(cluster, source, host, f"{FIRST}/tcp")["allowed"] is True
        until(client, host, FIRST, "answer")
        _, answers = weir(cluster, "denials")
        # Of the other direction there may be one that an earlier test's policies denied.
        rows = [row for answer in answers for row in answer["data"]
                if row["source"]["pod"] == source and row["destination"]["address"] == host
                and (row["destination"]["port"], row["direction"]) == (TCP, "ingress")]  # fmt: skip
        assert rows, "the drop is not among the denials"
        assert {policy for row in rows for policy in row["policies"]} == {f"{cluster.a}/only-first"}
    objects.delete(only)
    for family in cluster.families:
        host = cluster[server].address(family)
        until(client, host, TCP, "answer")
        assert why(cluster, source, host, f"{TCP}/tcp")["allowed"] is True


def test_all_pairs_fare_as_told(cluster: World, objects: Objects) -> None:
    """Peers of every kind, and a name of a port."""
    first = cluster["guest-1"]
    blocks = [block(f"{first.address(f)}/{128 if f == 6 else 32}") for f in cluster.families]
    objects.apply(
        policy(cluster.a, "some", WEB, ingress=[
            {"from": [pods(app="client")], "ports": [port("http")]},
            {"from": blocks, "ports": [port(FIRST, end=SECOND)]},
        ]),
        policy(cluster.a, "out", {"number": "2"}, egress=[{"to": [spaces(team="b")]}]),
    )  # fmt: skip
    wanted = [t for name in ("web-1", "web-2") for t in targets(cluster[name], cluster, TCP, FIRST)]
    clients = [cluster["client-1"], cluster["guest-1"]]
    # The policies are everywhere once one pair that they forbid is denied on both nodes.
    for name in ("web-1", "web-2"):
        until(cluster["guest-1"], cluster[name].address(cluster.families[0]), TCP, "timeout")
    found = matrix(clients, wanted)
    spaces_of = {"client-1": cluster.a, "guest-1": cluster.b}
    for (client, (_, host, number)), got in found.items():
        told = why(cluster, f"{spaces_of[client]}/{client}", host, f"{number}/tcp")
        assert told["allowed"] is (got == "answer"), (client, host, number, got, told)


def cluster_policy(name: str, space: str, **spec: Any) -> Manifest:
    """Of the Admin tier, about the web servers of a namespace."""
    names = {"matchLabels": {"kubernetes.io/metadata.name": space}}
    subject = {"pods": {"namespaceSelector": names, "podSelector": {"matchLabels": WEB}}}
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name},
        "spec": {"tier": "Admin", "priority": 7, "subject": subject, **spec},
    }


def test_a_rule_of_the_cluster_that_denies(cluster: World, objects: Objects) -> None:
    """Its NetworkPolicy would let it through; the rule before it passes other ports."""
    ports = [{"tcp": {"destinationPort": {"number": FIRST}}}]
    everybody: list[Manifest] = [{"namespaces": {}}]
    name = f"explained-{cluster.a}"
    objects.apply(
        policy(cluster.a, "open", WEB, ingress=[{}]),
        cluster_policy(name, cluster.a, ingress=[
            {"action": "Pass", "from": everybody, "protocols": ports},
            {"action": "Deny", "from": everybody},
        ]),
    )  # fmt: skip
    client, source = cluster["client-1"], f"{cluster.a}/client-1"
    for family in cluster.families:
        host = cluster["web-2"].address(family)
        until(client, host, TCP, "timeout")
        told = why(cluster, source, host, f"{TCP}/tcp")
        [denied] = [one for one in told["directions"] if not one["model"]["allowed"]]
        assert denied["model"]["because"] == (
            f"ingress rule 1 of ClusterNetworkPolicy {name} denies it"
        )
        assert denied["maps"]["rule"] == f"ingress rule 1 of ClusterNetworkPolicy {name}"
        assert [item["policy"] for item in denied["model"]["policies"]] == [
            *(f"ClusterNetworkPolicy {name}", f"{cluster.a}/open")
        ]
        until(client, host, FIRST, "answer")
        told = why(cluster, source, host, f"{FIRST}/tcp")
        assert told["allowed"] is True
        [ingress] = [one for one in told["directions"] if one["direction"] == "ingress"]
        assert ingress["model"]["policy"] == f"{cluster.a}/open"


def test_try_tells_what_a_policy_would_do_and_does_nothing(
    cluster: World, objects: Objects, tmp_path: Path
) -> None:
    client = cluster["client-1"]
    hosts = [cluster["web-2"].address(family) for family in cluster.families]
    for host in hosts:
        until(client, host, TCP, "answer")
    shut = policy(cluster.a, "shut", WEB, ingress=[])
    path = tmp_path / "shut.json"
    path.write_text(json.dumps(shut))
    code, told = weir(cluster, "try", "-f", str(path))
    assert code == 2, told
    denied = {
        (one["source"]["name"], one["destination"]["address"])
        for one in told["newly_denied"]
        if one["destination"]["port"] == TCP
    }
    assert {(f"{cluster.a}/client-1", host) for host in hosts} <= denied
    assert {one["because"] for one in told["newly_denied"]
            if one["destination"]["address"] in hosts} == {
        f"{cluster.a}/shut isolates {cluster.a}/web-2, and it has no rule that matches"
    }  # fmt: skip
    for host in hosts:
        until(client, host, TCP, "answer")
    # What it denies once it is there would be allowed again without it.
    objects.apply(shut)
    for host in hosts:
        until(client, host, TCP, "timeout")

    def allowed() -> set[str]:
        code, told = weir(cluster, "try", "--delete", f"networkpolicy/{cluster.a}/shut")
        assert code == 2, told
        return {one["destination"]["address"] for one in told["newly_allowed"]}

    eventually(allowed, lambda found: set(hosts) <= found, 5, "what is denied would be allowed")
