# SPDX-License-Identifier: Apache-2.0
"""Traffic through NodePorts while Weir's parts die and while backends are replaced."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.frontends import PROPAGATION_S, frontend, node_addresses, node_ports
from e2e.suite.kubectl import delete
from e2e.suite.outsider import Outsider
from e2e.suite.probes import Flow
from e2e.suite.test_resilience import (
    STALL_MS,
    kill_agents,
    kill_operators,
    wait_until_recovered,
)
from e2e.suite.world import World, cluster_ips, pod, when_ready

DOWNLOAD = 300_000_000
INTERVAL_S = 0.02


def problems(flows: list[Flow]) -> list[str]:
    with ThreadPoolExecutor(len(flows)) as pool:
        results = list(pool.map(lambda flow: flow.stop(), flows))
    return [
        f"{flow.probe} {flow.name}: {stats}"
        for flow, stats in zip(flows, results, strict=True)
        if stats["errors"]
        or stats.get("lost")
        or stats.get("max_ms", 0) > STALL_MS
        or not stats["received"]
    ]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("fault", [kill_agents, kill_operators], ids=["agents", "operators"])
@pytest.mark.parametrize("backend", ["1", "2"], ids=["on-that-node", "on-another-node"])
def test_killed_parts_cost_a_download_nothing(
    cluster: World, outside_client: Outsider, objects: Objects,
    fault: Callable[[World], None], backend: str,
) -> None:  # fmt: skip
    objects.apply(frontend(cluster.a, "load", {"number": backend}, type="NodePort"))
    ports = node_ports(cluster.a, "load")
    node = node_addresses()[cluster.nodes[0]]
    flows = []
    for family in cluster.families:
        for protocol in ("tcp", "udp"):
            target = [protocol, node[family], ports.of(protocol)]
            # The fault of the test before may just be over, and agents still look for operators.
            found = outside_client.call(
                "until", target=target, want="answer", deadline=3 * PROPAGATION_S
            )
            assert found.get("name") == f"web-{backend}", (target, found)
        flows += [
            outside_client.flow("tcp", node[family], ports.tcp, INTERVAL_S),
            outside_client.flow("udp", node[family], ports.udp, INTERVAL_S),
            outside_client.flow("connect", node[family], ports.tcp, INTERVAL_S),
        ]
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(
            outside_client.call, "transfer", timeout=150, host=node[cluster.families[0]],
            port=ports.tcp, size=DOWNLOAD,
        )  # fmt: skip
        time.sleep(1)
        fault(cluster)
        wait_until_recovered(cluster)
        done = download.result()
    assert done["sent"], done
    assert done["fetched"], done
    found = problems(flows)
    assert not found, "\n".join(found)


@pytest.mark.timeout(240)
def test_a_rolling_restart_of_backends_loses_no_connection(
    cluster: World, outside_client: Outsider, objects: Objects
) -> None:
    """Each pod goes when its successor is ready, and drains for some seconds meanwhile."""

    def backend(number: int) -> dict[str, object]:
        place = cluster.nodes[number % len(cluster.nodes)]
        made = pod(cluster.a, f"roll-{number}", place, cluster.image, app="roll")
        made["spec"]["terminationGracePeriodSeconds"] = 5  # as PID 1 it ignores SIGTERM
        objects.apply(made)
        when_ready(made).close()
        return made

    objects.apply(frontend(cluster.a, "roll", {"app": "roll"}, type="NodePort"))
    old = [backend(number) for number in (0, 1)]
    ports = node_ports(cluster.a, "roll")
    node = node_addresses()[cluster.nodes[0]]
    flows = []
    for family in cluster.families:
        address = cluster_ips(cluster.a, "roll")[family]
        ways = [
            (outside_client, node[family], ports.tcp),
            (cluster["client-1"], address, 80),
            (cluster["host-2"], address, 80),
        ]
        for probe, host, port in ways:
            target = ["tcp", host, port]
            found = probe.call("until", target=target, want="answer", deadline=PROPAGATION_S)
            assert "name" in found, (probe, target, found)
            flows.append(probe.flow("connect", host, port, INTERVAL_S))
    for number, gone in enumerate(old, 2):
        backend(number)
        delete(gone, wait=True)
    found = problems(flows)
    assert not found, "\n".join(found)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("protocol", "count"), [("tcp", 6000), ("udp", 4000)])
def test_many_short_flows_through_another_node_s_port(
    cluster: World, outside_client: Outsider, objects: Objects, protocol: str, count: int
) -> None:
    """More TCP connections in a row than the node has ports for one backend."""
    objects.apply(frontend(cluster.a, "many", {"number": "2"}, type="NodePort"))
    port = node_ports(cluster.a, "many").of(protocol)
    host = node_addresses()[cluster.nodes[0]][cluster.families[0]]
    target = [protocol, host, port]
    found = outside_client.call("until", target=target, want="answer", deadline=PROPAGATION_S)
    assert found.get("name") == "web-2", found
    counted = outside_client.call(
        "spread", timeout=200, protocol=protocol, host=host, port=port, count=count
    )
    assert counted == {"web-2": count}, counted
