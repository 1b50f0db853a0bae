# SPDX-License-Identifier: Apache-2.0
"""Policy and time: changes take effect within a second, and never too late for a new pod."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.kubectl import apply, delete, eventually, get, kubectl
from e2e.suite.policies import PROPAGATION_S, pods, policy
from e2e.suite.world import TCP, UDP, World, pod, when_ready

WEB = {"app": "web"}
PROMPT_S = 1.0


@pytest.mark.parametrize("server", ["web-1", "web-2"])
def test_a_deleted_policy_lets_through_within_a_second(
    cluster: World, objects: Objects, server: str
) -> None:
    deny = policy(cluster.a, "deny", WEB, ingress=[])
    target = ["tcp", cluster[server].address(cluster.families[0]), TCP]
    client = cluster["client-1"]
    objects.apply(deny)
    found = client.call("until", target=target, want="timeout", deadline=PROPAGATION_S)
    assert found.get("error") == "timeout", found
    opened: list[float] = []

    def wait() -> None:
        if "name" in client.call("until", target=target, want="answer", deadline=10):
            opened.append(time.monotonic())

    waiter = threading.Thread(target=wait)
    waiter.start()
    objects.delete(deny, wait=False)
    deleted = time.monotonic()
    waiter.join()
    assert opened, "denied for 10 s after its policy was deleted"
    assert opened[0] - deleted < PROMPT_S


@pytest.mark.parametrize("server", ["web-1", "web-2"])
def test_a_new_policy_cuts_live_flows_within_a_second(
    cluster: World, objects: Objects, server: str
) -> None:
    """An open TCP connection and a UDP exchange, which a policy had allowed, stall."""
    host = cluster[server].address(cluster.families[-1])
    client = cluster["client-2"]
    flows = [client.flow("tcp", host, TCP, 0.02), client.flow("udp", host, UDP, 0.02)]
    eventually(lambda: min(f.read()["received"] for f in flows), bool, 5, "answers on both flows")
    objects.apply(policy(cluster.a, "cut", WEB, ingress=[]))
    time.sleep(PROMPT_S)  # the promise itself, not a wait for something
    before = [flow.read()["received"] for flow in flows]
    time.sleep(0.5)
    after = [flow.read()["received"] for flow in flows]
    assert before == after, "answers go on after the policy"
    objects.delete(objects.made[0])
    eventually(
        lambda: [flow.read()["received"] for flow in flows],
        lambda now: all(new > old for new, old in zip(now, after, strict=True)),
        10,
        "both flows go on after the policy is gone",
    )
    tcp, _ = [flow.stop() for flow in flows]
    assert tcp["errors"] == []


@pytest.mark.parametrize("node", [0, 1])
def test_a_new_pod_is_never_reachable_without_its_policy(
    cluster: World, objects: Objects, node: int
) -> None:
    """Denied clients on both nodes hammer the node's whole pod range from before its creation."""
    target_node = cluster[f"web-{node + 1}"].node
    objects.apply(policy(cluster.a, "late", {"app": "late"}, ingress=[{"from": [pods(app="web")]}]))
    cidrs = get("node", target_node)["spec"]["podCIDRs"]
    flows = [
        cluster[name].flow("hammer", cidr if ":" not in cidr else first_addresses(cidr), TCP, 0.05)
        for name in ("client-1", "client-2")
        for cidr in cidrs
    ]
    try:
        for number in range(3):
            fresh = pod(cluster.a, f"late-{number}", target_node, cluster.image, app="late")
            objects.apply(fresh)
            late = when_ready(fresh)
            try:
                friend = cluster["web-1"].ask("tcp", late.address(cluster.families[0]), TCP, 2)
                assert "name" in friend, f"its policy allows web-1: {friend}"
                seen = late.call("hits")
            finally:
                late.close()
            intruders = {a for n in ("client-1", "client-2") for a in cluster[n].addresses}
            assert not intruders & {*seen["tcp"], *seen["udp"]}, seen
    finally:
        sent = [flow.stop()["sent"] for flow in flows]
    assert min(sent) > 100, sent


def first_addresses(cidr: str) -> str:
    """The part of an IPv6 range that a node gives out first."""
    return cidr.partition("/")[0] + "/120"


def test_monitor_names_the_policy_of_a_drop(
    cluster: World, objects: Objects, monitor: list[dict[str, Any]]
) -> None:
    objects.apply(policy(cluster.a, "only-friends", WEB, ingress=[{"from": [pods(app="x")]}]))
    host = cluster["web-2"].address(cluster.families[0])
    target = ["tcp", host, TCP]
    client = cluster["client-1"]
    client.call("until", target=target, want="timeout", deadline=PROPAGATION_S)

    def drops() -> list[str]:
        client.ask("tcp", host, TCP, timeout=0.2)
        return [json.dumps(event) for event in monitor if host in json.dumps(event)]

    found = eventually(
        drops,
        lambda events: any("only-friends" in event for event in events),
        5,
        f"a drop to {host} that names the policy",
    )
    drop = next(event for event in found if "only-friends" in event)
    assert client.address(cluster.families[0]) in drop
    assert "web-2" in drop


def test_a_label_change_moves_a_pod_between_policies(cluster: World, objects: Objects) -> None:
    objects.apply(policy(cluster.a, "label", WEB, ingress=[{"from": [pods(role="friend")]}]))
    target = ["tcp", cluster["web-2"].address(cluster.families[0]), TCP]
    client = cluster["client-1"]
    for change, want in (("role=friend", "answer"), ("role-", "timeout")):
        kubectl("label", "pod", "client-1", change, f"--namespace={cluster.a}")
        found = client.call("until", target=target, want=want, deadline=PROPAGATION_S)
        assert found.get("error", "answer") == want, (change, found)


def test_many_policies_do_not_delay_one(cluster: World, objects: Objects) -> None:
    """300 policies about labels that nobody has, and then one that matters."""
    junk = [
        policy(cluster.b, f"junk-{n}", {f"key-{n}": "x"},
               ingress=[{"from": [pods(**{f"peer-{n}": "y"})]}])
        for n in range(300)
    ]  # fmt: skip
    apply(*junk)
    try:
        objects.apply(policy(cluster.a, "deny", WEB, ingress=[]))
        target = ["tcp", cluster["web-1"].address(cluster.families[0]), TCP]
        found = cluster["client-2"].call(
            "until", target=target, want="timeout", deadline=PROPAGATION_S
        )
        assert found.get("error") == "timeout", found
    finally:
        delete(*junk)
