# SPDX-License-Identifier: Apache-2.0
"""Traffic policies, affinity and terminating endpoints, by what clients see."""

from __future__ import annotations

import time

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.frontends import (
    PROPAGATION_S,
    frontend,
    node_addresses,
    node_ports,
    wait_for_endpoints,
)
from e2e.suite.kubectl import delete
from e2e.suite.outsider import Outsider
from e2e.suite.probes import Probe
from e2e.suite.world import World, cluster_ips, pod, when_ready

ALL = {"tcp": 80, "udp": 81}


def settles(probe: Probe, target: list[object], want: str) -> dict[str, object]:
    found: dict[str, object] = probe.call(
        "until", timeout=PROPAGATION_S + 5, target=target, want=want, deadline=PROPAGATION_S
    )
    return found


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_external_policy_local(
    cluster: World, outside_client: Outsider, objects: Objects, protocol: str
) -> None:
    """The endpoint's node keeps the client's address, others are silent to who comes from
    elsewhere; to what starts on it, each node is a way in."""
    objects.apply(
        frontend(cluster.a, "el", {"number": "1"}, type="NodePort", externalTrafficPolicy="Local")
    )
    port = node_ports(cluster.a, "el").of(protocol)
    nodes = node_addresses()
    with_it, without = cluster.nodes[0], cluster.nodes[1]
    for family in cluster.families:
        here, there = nodes[with_it][family], nodes[without][family]
        answer = settles(outside_client, [protocol, here, port], "answer")
        assert answer.get("peer") in outside_client.addresses, answer
        assert settles(outside_client, [protocol, there, port], "timeout")["error"] == "timeout"
        for name in ("client-1", "host-1"):
            far = settles(cluster[name], [protocol, there, port], "timeout")
            assert far.get("error") == "timeout", (name, far)
        for name in ("client-2", "host-2"):
            found = settles(cluster[name], [protocol, there, port], "answer")
            assert found.get("name") == "web-1", (name, found)
            found = settles(cluster[name], [protocol, here, port], "answer")
            assert found.get("peer") in cluster[name].addresses, (name, found)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_internal_policy_local(cluster: World, objects: Objects, protocol: str) -> None:
    objects.apply(
        frontend(cluster.a, "il", {"app": "web"}, internalTrafficPolicy="Local"),
        frontend(cluster.a, "il-1", {"number": "1"}, internalTrafficPolicy="Local"),
    )
    for address in cluster_ips(cluster.a, "il").values():
        for name, server in (("client-1", "web-1"), ("client-2", "web-2"), ("host-2", "web-2")):
            settles(cluster[name], [protocol, address, ALL[protocol]], "answer")
            counted = cluster[name].call(
                "spread", protocol=protocol, host=address, port=ALL[protocol], count=20
            )
            assert counted == {server: 20}, (name, counted)
    for address in cluster_ips(cluster.a, "il-1").values():
        target = [protocol, address, ALL[protocol]]
        assert settles(cluster["client-1"], target, "answer").get("name") == "web-1"
        for name in ("client-2", "host-2"):
            found = settles(cluster[name], target, "timeout")
            assert found.get("error") == "timeout", (name, found)


@pytest.mark.parametrize("client", ["client-1", "host-2", "outside"])
def test_affinity_keeps_a_client_on_its_backend(
    cluster: World, outside_client: Outsider, objects: Objects, client: str
) -> None:
    """On all addresses of a port alike, and for the time that the Service says."""
    probe = outside_client if client == "outside" else cluster[client]
    config = {"clientIP": {"timeoutSeconds": 3}}
    made = frontend(
        cluster.a, "sticky", {"app": "web"}, type="NodePort", sessionAffinity="ClientIP",
        sessionAffinityConfig=config,
    )  # fmt: skip
    objects.apply(made)
    port = node_ports(cluster.a, "sticky").tcp
    node = node_addresses()[cluster.nodes[0]]
    family = cluster.families[0]
    settles(probe, ["tcp", node[family], port], "answer")
    chosen = set()
    for _ in range(12):  # the chance that all fall on one backend is below 0.001
        counted = probe.call("spread", protocol="tcp", host=node[family], port=port, count=10)
        assert len(counted) == 1, counted
        if client == "client-1":  # its node serves both addresses
            address = cluster_ips(cluster.a, "sticky")[family]
            again = probe.call("spread", protocol="tcp", host=address, port=80, count=5)
            assert set(again) == set(counted), (counted, again)
        chosen |= set(counted)
        if len(chosen) > 1:
            break
        time.sleep(4)
    assert chosen == {"web-1", "web-2"}


def test_terminating_endpoints_serve_when_there_is_no_other(
    cluster: World, outside_client: Outsider, objects: Objects
) -> None:
    """A pod that is being deleted goes on for as long as it is the only one."""
    objects.apply(
        frontend(cluster.a, "ends", {"app": "ends"}, type="NodePort"),
        frontend(
            cluster.a, "ends-local", {"app": "ends"}, type="NodePort",
            internalTrafficPolicy="Local", externalTrafficPolicy="Local",
        ),
    )  # fmt: skip
    made = pod(cluster.a, "ends", cluster.nodes[0], cluster.image, app="ends")
    made["spec"]["terminationGracePeriodSeconds"] = 12  # as PID 1 the probe ignores SIGTERM
    objects.apply(made)
    when_ready(made).close()
    wait_for_endpoints(cluster.a, "ends", 1)
    wait_for_endpoints(cluster.a, "ends-local", 1)
    family = cluster.families[0]
    node = node_addresses()[cluster.nodes[0]][family]
    flows = []
    for name in ("ends", "ends-local"):
        address, port = cluster_ips(cluster.a, name)[family], node_ports(cluster.a, name).tcp
        ways = [(cluster["client-1"], address, 80), (outside_client, node, port)]
        for probe, host, number in ways:
            settles(probe, ["tcp", host, number], "answer")
            flows.append(probe.flow("connect", host, number, 0.05))
    delete(made)
    wait_for_endpoints(cluster.a, "ends", 0)
    time.sleep(5)
    results = [flow.stop() for flow in flows]
    assert all(stats["received"] > 50 for stats in results), results
    assert not any(stats["errors"] for stats in results), results
