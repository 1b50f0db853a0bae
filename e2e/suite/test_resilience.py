# SPDX-License-Identifier: Apache-2.0
"""Weir's parts die or are replaced; traffic does not notice.

Under each fault go on: TCP connections and UDP exchanges between pods and through a Service, on a
node and across nodes, and new connections to the Service. No datagram may be lost, no connection
broken, and no new one refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.kubectl import REPOSITORY, eventually, get, is_local, kubectl
from e2e.suite.policies import PROPAGATION_S, pods, policy
from e2e.suite.probes import Flow
from e2e.suite.release import Release
from e2e.suite.world import TCP, UDP, World, is_ready, pod, when_ready

INTERVAL_S = 0.02
STALL_MS = 900  # a lost SYN is sent again after a second; TCP's answers take this only after losses
RECOVERY_S = 60


def start_traffic(cluster: World) -> list[Flow]:
    service = cluster.services["web"]
    flows = []
    for name in ("client-1", "client-2"):
        client = cluster[name]
        for family in cluster.families:
            pod_address = cluster["web-1"].address(family)
            flows += [
                client.flow("tcp", pod_address, TCP, INTERVAL_S),
                client.flow("udp", pod_address, UDP, INTERVAL_S),
                client.flow("tcp", service[family], 80, INTERVAL_S),
                client.flow("udp", service[family], 81, INTERVAL_S),
                client.flow("connect", service[family], 80, INTERVAL_S),
            ]
    eventually(lambda: min(f.read()["received"] for f in flows), bool, 10, "traffic on every flow")
    return flows


@contextlib.contextmanager
def under_traffic(cluster: World) -> Iterator[None]:
    """Runs the block under traffic, and says what was lost or broken in it."""
    flows = start_traffic(cluster)
    yield
    progress = [flow.read()["received"] for flow in flows]
    eventually(
        lambda: [flow.read()["received"] for flow in flows],
        lambda now: all(new > old for new, old in zip(now, progress, strict=True)),
        10,
        "every flow still gets answers",
    )
    with ThreadPoolExecutor(len(flows)) as pool:
        results = list(pool.map(lambda flow: flow.stop(), flows))
    problems = [
        f"{flow.probe} {flow.name}: {stats}"
        for flow, stats in zip(flows, results, strict=True)
        if stats["errors"] or stats.get("lost") or stats.get("max_ms", 0) > STALL_MS
    ]
    assert not problems, "\n".join(problems)


def kill(cluster: World, module: str) -> None:
    """SIGKILL for that program on the nodes that have it, from the host's PID namespace."""
    script = (
        "import os, signal\n"
        "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
        "    try:\n"
        "        words = open(f'/proc/{pid}/cmdline').read().split(chr(0))\n"
        f"        if {module!r} in words and 'relay' not in words:\n"
        "            os.kill(int(pid), signal.SIGKILL); print(pid)\n"
        "    except OSError:\n"
        "        pass\n"
    )
    killed = [
        kubectl("exec", f"--namespace={cluster.a}", host, "--", "python3", "-c", script)
        for host in ("host-1", "host-2")
    ]
    assert any(killed), f"no process of {module}"


def kill_agents(cluster: World) -> None:
    kill(cluster, "weir.agent")


def kill_operators(cluster: World) -> None:
    kill(cluster, "weir.operator")


def kill_api_server(cluster: World) -> None:
    del cluster
    if not is_local():
        pytest.skip("only the local cluster's API server may be killed")
    state = str(REPOSITORY / "build" / "cluster").encode()
    victims = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"/kube-apiserver") and any(state in word for word in words):
                victims.append(int(folder.name))
    assert victims, "no kube-apiserver process"
    for victim in victims:
        os.kill(victim, signal.SIGKILL)


def everything(cluster: World) -> None:
    kill_operators(cluster)
    kill_agents(cluster)
    kill_api_server(cluster)


def ready_since() -> dict[str, str]:
    """When each node last changed between Ready and not: with a node, all its pods do."""
    return {
        item["metadata"]["name"]: condition["lastTransitionTime"]
        for item in get("nodes")["items"]
        for condition in item["status"]["conditions"]
        if condition["type"] == "Ready" and condition["status"] == "True"
    }


def wait_until_recovered(cluster: World) -> None:
    """All of Weir is ready, and a change gets through the whole chain."""

    def unready() -> list[str]:
        selector = "--selector=app.kubernetes.io/part-of=weir"
        found = get("pods", selector, f"--namespace={cluster.weir}")["items"]
        assert found
        return [item["metadata"]["name"] for item in found if not is_ready(item)]

    eventually(unready, lambda names: not names, RECOVERY_S, "all of Weir ready again")


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(kill_agents, id="agents"),
        pytest.param(kill_operators, id="operators"),
        pytest.param(kill_api_server, id="api-server"),
        pytest.param(everything, id="all-at-once"),
    ],
)
def test_killed_parts_cost_no_packet(
    cluster: World, objects: Objects, fault: Callable[[World], None]
) -> None:
    """And what was denied stays denied, and the state is right afterwards."""
    objects.apply(
        policy(cluster.a, "web", {"app": "web"}, ingress=[{"from": [pods(app="client")]}])
    )
    host = cluster["web-1"].address(cluster.families[0])
    target = ["tcp", host, TCP]
    guest = cluster["guest-1"]
    found = guest.call("until", target=target, want="timeout", deadline=PROPAGATION_S)
    assert found.get("error") == "timeout", found
    since = ready_since()
    with under_traffic(cluster):
        intruder = guest.flow("connect", host, TCP, 0.05)
        fault(cluster)
        time.sleep(2)  # the time without the part is what is tested
        wait_until_recovered(cluster)
    assert ready_since() == since
    assert eventually(intruder.stop, bool, 10, "the intruder's count")["received"] == 0
    objects.apply(policy(cluster.a, "guests", {"app": "web"}, ingress=[{}]))
    found = guest.call("until", target=target, want="answer", deadline=10)
    assert found.get("name") == "web-1", found


@pytest.mark.timeout(240)
def test_an_upgrade_costs_no_packet(cluster: World) -> None:
    """`helm upgrade` with a changed setting restarts every agent and operator."""
    release = Release(cluster.weir)
    before, since = ages(cluster), ready_since()
    values = release.values()
    changed = 200 if values["agent"]["resyncSeconds"] != 200 else 300
    level = "debug" if values["logLevel"] != "debug" else "info"
    with under_traffic(cluster):
        release.upgrade(agent__resyncSeconds=changed, logLevel=level)
        wait_until_recovered(cluster)
    assert ready_since() == since
    assert not set(before) & set(ages(cluster)), "some of Weir's pods were not replaced"


def ages(cluster: World) -> list[str]:
    selector = "--selector=app.kubernetes.io/part-of=weir"
    found = get("pods", selector, f"--namespace={cluster.weir}")["items"]
    return [item["metadata"]["uid"] for item in found]


@pytest.mark.timeout(180)
def test_a_pod_made_without_operators_waits_for_its_policy(
    cluster: World, objects: Objects
) -> None:
    """It is never reachable for those whom its policy denies, and comes up once they are back."""
    objects.apply(policy(cluster.a, "away", {"app": "away"}, ingress=[{"from": [pods(app="web")]}]))
    node = cluster["web-1"].node
    deployment = ["scale", "deployment/weir-operator", f"--namespace={cluster.weir}"]
    replicas = get("deployment", "weir-operator", f"--namespace={cluster.weir}")["spec"]["replicas"]
    cidr = min(get("node", node)["spec"]["podCIDRs"], key=lambda cidr: ":" in cidr)
    hammer = cluster["client-2"].flow("hammer", hosts_of(cidr), TCP, 0.05)
    fresh = pod(cluster.a, "away", node, cluster.image, app="away")
    try:
        kubectl(*deployment, "--replicas=0")
        eventually(
            lambda: get("pods", "--selector=app.kubernetes.io/name=weir-operator",
                        f"--namespace={cluster.weir}")["items"],
            lambda items: not items, 30, "no operator left",
        )  # fmt: skip
        objects.apply(fresh)
        time.sleep(4)  # long enough for a pod that nothing holds back
        assert not is_ready(get("pod", "away", f"--namespace={cluster.a}"))
    finally:
        kubectl(*deployment, f"--replicas={replicas}")
    late = when_ready(fresh, RECOVERY_S)
    try:
        friend = cluster["web-2"].ask("tcp", late.address(cluster.families[0]), TCP, 2)
        assert "name" in friend, friend
        seen = late.call("hits")
    finally:
        late.close()
        sent = hammer.stop()["sent"]
    assert sent > 100
    assert not set(cluster["client-2"].addresses) & {*seen["tcp"], *seen["udp"]}, seen
    wait_until_recovered(cluster)


def hosts_of(cidr: str) -> str:
    """A range that can be walked: all of an IPv4 pod range, the first part of an IPv6 one."""
    return cidr if ":" not in cidr else cidr.partition("/")[0] + "/120"
