# SPDX-License-Identifier: Apache-2.0
"""Nodes, pods and large transfers, without any policy."""

from __future__ import annotations

import itertools
import json

import pytest

from e2e.suite.kubectl import eventually, get, kubectl
from e2e.suite.world import TCP, UDP, World, is_ready

SIZE = 50_000_000


def test_nodes_are_ready_because_of_weir(cluster: World) -> None:
    for item in get("nodes")["items"]:
        assert is_ready(item), item["metadata"]["name"]
        taints = {t["key"] for t in item["spec"].get("taints", [])}
        assert "node.weir.dev/agent-not-ready" not in taints
    for kind, name in ("daemonset", "weir-agent"), ("deployment", "weir-operator"):
        kubectl("rollout", "status", kind, name, f"--namespace={cluster.weir}", "--timeout=60s")


def test_every_pod_reaches_every_pod(cluster: World) -> None:
    """All four clients to both servers, TCP and UDP, each family; the source address is kept."""
    for client, server in itertools.product(cluster.clients, ("web-1", "web-2")):
        targets = [
            [protocol, cluster[server].address(family), port]
            for family in cluster.families
            for protocol, port in (("tcp", TCP), ("udp", UDP))
        ]
        for target, answer in zip(targets, client.call("reach", targets=targets), strict=True):
            assert answer.get("name") == server, (client, target, answer)
            assert answer["peer"] in client.addresses, (client, target, answer)


@pytest.mark.parametrize("host", ["host-1", "host-2"])
def test_nodes_reach_pods_and_pods_reach_nodes(cluster: World, host: str) -> None:
    node = cluster[host]
    targets = [
        ["tcp", cluster[name].address(family), TCP]
        for name in ("web-1", "web-2")
        for family in cluster.families
    ]
    answers = node.call("reach", targets=targets, timeout_s=1.0)
    assert all("name" in answer for answer in answers), list(zip(targets, answers, strict=True))
    for name in ("client-1", "client-2"):
        for address in node.addresses:
            assert cluster[name].call("ping", host=address).get("answer"), (name, address)


@pytest.mark.parametrize("server", ["web-1", "web-2"])
def test_a_pod_answers_ping_up_to_its_mtu_and_beyond(cluster: World, server: str) -> None:
    """Beyond it the echo is fragmented, which a datapath must not lose."""
    for family in cluster.families:
        for size in (56, 1300, 4000):
            answer = cluster["client-1"].call(
                "ping", host=cluster[server].address(family), size=size
            )
            assert answer.get("bytes") == size + 8, (family, size, answer)


@pytest.mark.parametrize("server", ["web-1", "web-2"])
def test_large_transfers_arrive_whole(cluster: World, server: str) -> None:
    """50 MB in each direction; a path MTU problem shows as a stall."""
    for family in cluster.families:
        host = cluster[server].address(family)
        done = cluster["client-1"].call("transfer", host=host, port=TCP, size=SIZE, timeout=60)
        assert done["sent"], done
        assert done["fetched"], done
        assert done["seconds"] < 30, done


def test_names_resolve(cluster: World) -> None:
    name = f"web.{cluster.a}.svc.cluster.local"
    for client in cluster.clients:
        found = client.call("resolve", name=name)
        assert set(found) == set(cluster.services["web"].values()), (client, found)


def test_the_command_line_tool_agrees(cluster: World) -> None:
    """`weir endpoints` of a node lists the pods there."""
    node = cluster["web-1"].node
    selector = "--selector=app.kubernetes.io/name=weir-agent"
    field = f"--field-selector=spec.nodeName={node}"
    agents = get("pods", selector, field, f"--namespace={cluster.weir}")["items"]
    name = agents[0]["metadata"]["name"]
    listing = eventually(
        lambda: kubectl(
            "exec", f"--namespace={cluster.weir}", name, "--", "weir", "endpoints", "-o", "json"
        ),
        lambda text: cluster["web-1"].addresses[0] in text,
        5,
        f"web-1 among the endpoints of {node}",
    )
    json.loads(listing)
