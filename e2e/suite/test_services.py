# SPDX-License-Identifier: Apache-2.0
"""ClusterIPs: from pods and from nodes, TCP and UDP, with and without backends."""

from __future__ import annotations

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.kubectl import Manifest
from e2e.suite.world import World, cluster_ips, service

BACKENDS = {"web-1", "web-2"}
COUNT = 60


@pytest.mark.parametrize("client", ["client-1", "guest-2", "host-1", "host-2"])
@pytest.mark.parametrize(("protocol", "port"), [("tcp", 80), ("udp", 81)])
def test_connections_spread_over_the_backends(
    cluster: World, client: str, protocol: str, port: int
) -> None:
    """With fair choice the chance that one of two gets less than 10 of 60 is below 1e-7."""
    for host in cluster.services["web"].values():
        counted = cluster[client].call(
            "spread", protocol=protocol, host=host, port=port, count=COUNT
        )
        assert set(counted) == BACKENDS, counted
        assert min(counted.values()) >= 10, counted


@pytest.mark.parametrize("client", ["client-1", "client-2", "host-1"])
def test_a_service_without_endpoints_refuses_at_once(cluster: World, client: str) -> None:
    for host in cluster.services["empty"].values():
        for protocol, port in (("tcp", 80), ("udp", 81)):
            answer = cluster[client].ask(protocol, host, port, timeout=3)
            assert answer.get("error") == "refused", (protocol, answer)
            assert answer["ms"] < 1000, answer


def test_a_pod_reaches_itself_through_its_service(cluster: World) -> None:
    for host in cluster.services["web"].values():
        counted = cluster["web-1"].call("spread", protocol="tcp", host=host, port=80, count=20)
        assert set(counted) == BACKENDS, counted


def test_connections_to_a_service_keep_the_client_s_address(cluster: World) -> None:
    for host in cluster.services["web"].values():
        answer = cluster["client-1"].ask("tcp", host, 80)
        assert answer["peer"] in cluster["client-1"].addresses, answer


def test_a_large_transfer_through_a_service(cluster: World) -> None:
    for host in cluster.services["web"].values():
        done = cluster["client-2"].call("transfer", host=host, port=80, size=20_000_000, timeout=60)
        assert done["sent"], done
        assert done["fetched"], done


def test_a_new_service_works_and_a_deleted_one_ends(cluster: World, objects: Objects) -> None:
    fresh: Manifest = service(cluster.a, "fresh", {"app": "web", "number": "1"})
    objects.apply(fresh)
    for host in cluster_ips(cluster.a, "fresh").values():
        target = ["tcp", host, 80]
        found = cluster["client-2"].call("until", target=target, want="answer", deadline=5)
        assert found.get("name") == "web-1", found
    addresses = cluster_ips(cluster.a, "fresh")
    objects.delete(fresh)
    for host in addresses.values():
        target = ["tcp", host, 80]
        answer = cluster["client-2"].call("until", target=target, want="failure", deadline=5)
        assert "error" in answer, answer


def test_the_api_server_answers_at_its_cluster_ip(cluster: World) -> None:
    """From pods, by its name; it is what every controller in the cluster does."""
    name = "kubernetes.default.svc.cluster.local"
    (first, *_) = cluster["client-1"].call("resolve", name=name)
    for client in ("client-1", "client-2", "host-1", "host-2"):
        answer = cluster[client].ask("connect", first, 443, timeout=2)
        assert answer.get("name") == "connected", (client, answer)
