# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicies: every selector and port form, from four clients to servers on both nodes.

client-1, client-2: app=client in namespace a (team=a). guest-1: app=client, guest-2: app=guest in
namespace b (team=b).
"""

from __future__ import annotations

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.policies import block, expect, pods, policy, port, spaces, targets
from e2e.suite.world import MORE_TCP, TCP, UDP, World

WEB = {"app": "web"}
NOBODY: set[str] = set()
ALL = {"client-1", "client-2", "guest-1", "guest-2"}
OWN = {"client-1", "client-2"}


@pytest.mark.parametrize(
    ("peers", "allowed"),
    [
        pytest.param(None, NOBODY, id="default-deny"),
        pytest.param([], ALL, id="no-peers-is-everybody"),
        pytest.param([pods(app="client")], OWN, id="pods"),
        pytest.param([pods(app="nobody")], NOBODY, id="pods-none"),
        pytest.param([{"podSelector": {}}], OWN, id="all-pods-of-the-namespace"),
        pytest.param([spaces(team="b")], {"guest-1", "guest-2"}, id="namespace"),
        pytest.param([{"namespaceSelector": {}}], ALL, id="all-namespaces"),
        pytest.param([spaces(team="b") | pods(app="client")], {"guest-1"}, id="both"),
        pytest.param(
            [spaces(team="b") | pods(app="guest"), pods(app="client")], OWN | {"guest-2"}, id="or"
        ),
        pytest.param(
            [{"podSelector": {"matchExpressions": [
                {"key": "app", "operator": "NotIn", "values": ["web", "host"]}]},
              "namespaceSelector": {"matchExpressions": [
                  {"key": "team", "operator": "Exists"}]}}],
            ALL,
            id="expressions",
        ),
        pytest.param([block("0.0.0.0/0"), block("::/0")], ALL, id="any-address"),
    ],
)  # fmt: skip
def test_ingress_peers(
    cluster: World, objects: Objects, peers: list[object] | None, allowed: set[str]
) -> None:
    rules: list[object] = [] if peers is None else [{"from": peers} if peers else {}]
    objects.apply(policy(cluster.a, "ingress", WEB, ingress=rules))
    wanted = [t for name in ("web-1", "web-2") for t in targets(cluster[name], cluster, TCP, UDP)]
    expect(cluster.clients, dict.fromkeys(wanted, allowed))


def test_ip_blocks_with_exceptions(cluster: World, objects: Objects) -> None:
    """Everybody but client-2, by its addresses."""
    peers = [
        block(f"{'::' if family == 6 else '0.0.0.0'}/0",
              f"{cluster['client-2'].address(family)}/{128 if family == 6 else 32}")
        for family in cluster.families
    ]  # fmt: skip
    objects.apply(policy(cluster.a, "blocks", WEB, ingress=[{"from": peers}]))
    wanted = [t for name in ("web-1", "web-2") for t in targets(cluster[name], cluster, TCP)]
    expect(cluster.clients, dict.fromkeys(wanted, ALL - {"client-2"}))


def test_ports(cluster: World, objects: Objects) -> None:
    """A number, a name, a range, and UDP beside TCP; rules add up."""
    first, second, third, fourth = MORE_TCP
    rules = [
        {"from": [pods(app="client")], "ports": [port("http"), port("udp", "UDP")]},
        {"from": [spaces(team="b")], "ports": [port(first, end=second)]},
        {"ports": [port(fourth)]},
    ]
    objects.apply(policy(cluster.a, "ports", WEB, ingress=rules))
    guests = {"guest-1", "guest-2"}
    by_port = {
        TCP: OWN, UDP: OWN, first: guests, second: guests, third: NOBODY, fourth: ALL,
    }  # fmt: skip
    for server in ("web-1", "web-2"):
        wanted = targets(cluster[server], cluster, *by_port)
        expect(cluster.clients, {target: by_port[target[2]] for target in wanted})


def test_policies_of_one_pod_add_up(cluster: World, objects: Objects) -> None:
    objects.apply(
        policy(cluster.a, "one", WEB, ingress=[{"from": [pods(app="client")]}]),
        policy(cluster.a, "two", {"number": "2"}, ingress=[{"from": [spaces(team="b")]}]),
    )
    allowed = {
        **dict.fromkeys(targets(cluster["web-1"], cluster, TCP), OWN),
        **dict.fromkeys(targets(cluster["web-2"], cluster, TCP), ALL),
    }
    expect(cluster.clients, allowed)


def test_egress_with_dns(cluster: World, objects: Objects) -> None:
    """client-* may ask the DNS and talk to web-1; by Service name the choice of web-2 fails."""
    dns = {"to": [{"namespaceSelector": {}}], "ports": [port(53, "UDP"), port(53)]}
    rules = [dns, {"to": [pods(number="1")]}]
    objects.apply(policy(cluster.a, "egress", {"app": "client"}, egress=rules))
    allowed = {
        **dict.fromkeys(targets(cluster["web-1"], cluster, TCP, UDP), ALL),
        **dict.fromkeys(targets(cluster["web-2"], cluster, TCP, UDP), ALL - OWN),
    }
    expect(cluster.clients, allowed)
    for name in ("client-1", "client-2"):
        assert cluster[name].call("resolve", name=f"web.{cluster.a}.svc.cluster.local")
    host = next(iter(cluster.services["web"].values()))
    counted = cluster["client-1"].call("spread", protocol="tcp", host=host, port=80, count=12)
    assert set(counted) <= {"web-1", "timeout"}, counted
    assert counted["web-1"], counted


def test_both_ends_must_allow(cluster: World, objects: Objects) -> None:
    objects.apply(
        policy(cluster.a, "in", WEB, ingress=[{"from": [pods(app="client")]}]),
        policy(cluster.b, "out", {"app": "guest"}, egress=[{"to": [spaces(team="b")]}]),
    )
    wanted = targets(cluster["web-1"], cluster, TCP)
    wanted += targets(cluster["web-2"], cluster, TCP)
    expect(cluster.clients, dict.fromkeys(wanted, OWN))


def test_replies_pass_whatever_the_policy(cluster: World, objects: Objects) -> None:
    """Isolated both ways but for one way out: its answers come back in."""
    rules = [{"to": [pods(app="web")]}]
    objects.apply(policy(cluster.a, "client", {"app": "client"}, ingress=[], egress=rules))
    wanted = targets(cluster["web-1"], cluster, TCP, UDP)
    wanted += targets(cluster["web-2"], cluster, TCP, UDP)
    expect([cluster["client-1"], cluster["client-2"]], dict.fromkeys(wanted, OWN))
    backwards = targets(cluster["client-1"], cluster, TCP)
    expect([cluster["web-1"], cluster["web-2"]], dict.fromkeys(backwards, NOBODY))


def test_a_node_always_reaches_its_own_pods(cluster: World, objects: Objects) -> None:
    """And only those: to a pod of another node it is a client like others."""
    objects.apply(policy(cluster.a, "deny", WEB, ingress=[]))
    wanted = targets(cluster["web-1"], cluster, TCP)
    allowed = {"host-1"} if cluster["host-1"].node != cluster["host-2"].node else set()
    expect([cluster["client-1"]], dict.fromkeys(wanted, NOBODY))
    if allowed:
        expect([cluster["host-1"], cluster["host-2"]], dict.fromkeys(wanted, allowed))
