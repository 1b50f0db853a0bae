# SPDX-License-Identifier: Apache-2.0
"""NodePorts, LoadBalancer addresses, externalIPs and hostPorts, from everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.frontends import (
    BALANCER,
    CLASS,
    EXTERNAL,
    PROPAGATION_S,
    frontend,
    give_addresses,
    node_addresses,
    node_ports,
)
from e2e.suite.kubectl import apply, delete, kubectl
from e2e.suite.outsider import Outsider
from e2e.suite.probes import Probe
from e2e.suite.world import TCP, UDP, World, cluster_ips, pod, when_ready

BACKENDS = {"web-1", "web-2"}
CLIENTS = ["client-1", "client-2", "guest-2", "host-1", "host-2", "outside"]
HOST_PORT = 8443


@pytest.fixture(scope="module")
def door(cluster: World, outside_client: Outsider) -> Iterator[str]:
    """A Service with every kind of address, over web-1 and web-2."""
    made = frontend(
        cluster.a, "door", {"app": "web"}, type="LoadBalancer", loadBalancerClass=CLASS,
        externalIPs=[EXTERNAL[family] for family in cluster.families],
    )  # fmt: skip
    apply(made)
    give_addresses(cluster.a, "door", [BALANCER[family] for family in cluster.families])
    front = node_addresses()[cluster.nodes[0]]
    routes = {
        address: front[family]
        for family in cluster.families
        for address in (BALANCER[family], EXTERNAL[family])
    }
    with outside_client.routes(routes):
        for probe in (cluster["client-1"], cluster["client-2"], outside_client):
            for address in routes:
                target = ["tcp", address, 80]
                found = probe.call("until", target=target, want="answer", deadline=PROPAGATION_S)
                assert found.get("name") in BACKENDS, (probe, address, found)
        yield "door"
    delete(made, wait=True)


def by_name(cluster: World, outside_client: Outsider, name: str) -> Probe:
    return outside_client if name == "outside" else cluster[name]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_node_ports_answer_on_every_node(
    cluster: World, outside_client: Outsider, door: str, client: str, protocol: str
) -> None:
    ports = node_ports(cluster.a, door)
    for addresses in node_addresses().values():
        for address in addresses.values():
            counted = by_name(cluster, outside_client, client).call(
                "spread", protocol=protocol, host=address, port=ports.of(protocol), count=30
            )
            assert set(counted) == BACKENDS, (address, counted)


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("addresses", [BALANCER, EXTERNAL], ids=["balancer", "external"])
def test_other_addresses_answer(
    cluster: World, outside_client: Outsider, door: str, client: str, addresses: dict[int, str]
) -> None:
    del door
    for family in cluster.families:
        for protocol, port in (("tcp", 80), ("udp", 81)):
            counted = by_name(cluster, outside_client, client).call(
                "spread", protocol=protocol, host=addresses[family], port=port, count=30
            )
            assert set(counted) == BACKENDS, (addresses[family], protocol, counted)


def test_the_node_s_loopback_has_node_ports_for_the_node_only(cluster: World, door: str) -> None:
    ports = node_ports(cluster.a, door)
    for protocol in ("tcp", "udp"):
        answer = cluster["host-1"].ask(protocol, "127.0.0.1", ports.of(protocol), timeout=2)
        assert answer.get("name") in BACKENDS, answer
        refused = cluster["client-1"].ask(protocol, "127.0.0.1", ports.of(protocol), timeout=2)
        assert refused.get("error") == "refused", refused


@pytest.mark.parametrize("client", ["client-1", "host-2", "outside"])
def test_a_node_port_without_endpoints_refuses_at_once(
    cluster: World, outside_client: Outsider, objects: Objects, client: str
) -> None:
    objects.apply(frontend(cluster.a, "nobody", {"app": "nobody"}, type="NodePort"))
    ports = node_ports(cluster.a, "nobody")
    probe = by_name(cluster, outside_client, client)
    for addresses in node_addresses().values():
        for address in addresses.values():
            for protocol in ("tcp", "udp"):
                target = [protocol, address, ports.of(protocol)]
                answer = probe.call("until", target=target, want="refused", deadline=PROPAGATION_S)
                assert answer.get("error") == "refused", (target, answer)
                assert answer["ms"] < 1000, answer


def test_a_large_transfer_through_another_node_s_port(
    cluster: World, outside_client: Outsider, door: str
) -> None:
    """Path MTUs differ: what comes in at one node leaves by the overlay to the other."""
    port = node_ports(cluster.a, door).tcp
    for addresses in node_addresses().values():
        for address in addresses.values():
            for probe in (outside_client, cluster["client-1"]):
                done = probe.call("transfer", host=address, port=port, size=5_000_000, timeout=60)
                assert done["sent"], (address, done)
                assert done["fetched"], (address, done)


@pytest.mark.parametrize("client", CLIENTS)
def test_a_host_port_is_its_node_s(
    cluster: World, outside_client: Outsider, objects: Objects, client: str
) -> None:
    name = f"hosted-{client}"
    made = pod(cluster.a, name, cluster.nodes[0], cluster.image, app="hosted")
    ports = [
        {"name": "http", "containerPort": TCP, "hostPort": HOST_PORT},
        {"name": "udp", "containerPort": UDP, "hostPort": HOST_PORT, "protocol": "UDP"},
    ]
    made["spec"]["containers"][0]["ports"] = ports
    objects.apply(made)
    hosted = when_ready(made)
    probe = by_name(cluster, outside_client, client)
    nodes = node_addresses()
    other = next(name for name in nodes if name != cluster.nodes[0])
    try:
        for family in cluster.families:
            for protocol in ("tcp", "udp"):
                target = [protocol, nodes[cluster.nodes[0]][family], HOST_PORT]
                answer = probe.call("until", target=target, want="answer", deadline=PROPAGATION_S)
                assert answer.get("name") == name, (target, answer)
                if client == "outside":
                    assert answer["peer"] in outside_client.addresses, answer
                refused = probe.ask(protocol, nodes[other][family], HOST_PORT, timeout=2)
                assert refused.get("error") == "refused", refused
    finally:
        hosted.close()


def test_a_second_protocol_and_family_come_to_a_live_service(
    cluster: World, objects: Objects
) -> None:
    """And what is open stays open."""
    made = frontend(cluster.a, "grows", {"app": "web"}, ipFamilyPolicy="SingleStack")
    made["spec"]["ports"] = [{"name": "http", "port": 80, "targetPort": "http"}]
    objects.apply(made)
    (first,) = cluster_ips(cluster.a, "grows").values()
    client = cluster["client-1"]
    target = ["tcp", first, 80]
    assert "name" in client.call("until", target=target, want="answer", deadline=PROPAGATION_S)
    flow = client.flow("tcp", first, 80)
    made["spec"]["ports"].append(
        {"name": "udp", "port": 80, "targetPort": "udp", "protocol": "UDP"}
    )
    made["spec"]["ipFamilyPolicy"] = "PreferDualStack"
    objects.apply(made)
    for address in cluster_ips(cluster.a, "grows").values():
        for protocol in ("tcp", "udp"):
            target = [protocol, address, 80]
            answer = client.call("until", target=target, want="answer", deadline=PROPAGATION_S)
            assert answer.get("name") in BACKENDS, (target, answer)
    stats = flow.stop()
    assert stats["received"], stats
    assert not stats["errors"], stats


def test_a_service_made_anew_with_its_addresses(cluster: World, objects: Objects) -> None:
    """Now in front of another pod; nothing of the old one is left."""
    made = frontend(cluster.a, "anew", {"number": "1"}, type="NodePort")
    objects.apply(made)
    addresses = cluster_ips(cluster.a, "anew")
    ports = node_ports(cluster.a, "anew")
    client = cluster["client-2"]
    targets = [(p, a, n) for a in addresses.values() for p, n in (("tcp", 80), ("udp", 81))]
    node = node_addresses()[cluster.nodes[1]][cluster.families[0]]
    targets += [("tcp", node, ports.tcp), ("udp", node, ports.udp)]
    for target in targets:
        answer = client.call("until", target=target, want="answer", deadline=PROPAGATION_S)
        assert answer.get("name") == "web-1", (target, answer)
    kubectl("delete", "service", "anew", f"--namespace={cluster.a}")
    made["spec"]["selector"] = {"number": "2"}
    made["spec"]["clusterIPs"] = [addresses[f] for f in sorted(addresses)]
    made["spec"]["clusterIP"] = made["spec"]["clusterIPs"][0]
    for port in made["spec"]["ports"]:
        port["nodePort"] = ports.tcp if port["name"] == "http" else ports.udp
    objects.apply(made)
    for protocol, address, port in targets:
        for _ in range(50):
            answer = client.ask(protocol, address, port, timeout=1)
            if answer.get("name") == "web-2":
                break
        counted = client.call("spread", protocol=protocol, host=address, port=port, count=20)
        assert counted == {"web-2": 20}, (protocol, address, counted)
