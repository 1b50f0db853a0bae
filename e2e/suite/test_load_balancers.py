# SPDX-License-Identifier: Apache-2.0
"""LoadBalancer Services with addresses from a pool of the nodes' own segment.

The client is on that segment: its kernel finds the node by ARP and ND, without any route.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import Any

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.frontends import PROPAGATION_S, frontend, node_addresses
from e2e.suite.kubectl import Manifest, apply, delete, eventually, get, kubectl
from e2e.suite.outsider import Outsider
from e2e.suite.world import World

OUR_CLASS = "weir.dev/load-balancer"
EXCLUDE = "node.kubernetes.io/exclude-from-external-load-balancers"
IPS = "weir.dev/load-balancer-ips"
SHARING = "weir.dev/load-balancer-sharing-key"
POOL = "weir-e2e"
SIZE = 8


def pool(name: str, *blocks: dict[str, str], **spec: Any) -> Manifest:
    return {
        "apiVersion": "weir.dev/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": name},
        "spec": {"blocks": list(blocks)} | spec,
    }


def block(node_address: str) -> dict[str, str]:
    """The last addresses but some of the /24 or /120 that a node is in, which hold no host."""
    bits = 24 if "." in node_address else 120
    network = ipaddress.ip_network(f"{node_address}/{bits}", strict=False)
    return {"first": str(network[-10 - SIZE]), "last": str(network[-11])}


@pytest.fixture(scope="module")
def blocks(cluster: World) -> Iterator[list[dict[str, str]]]:
    """Of each family, in a pool for the suite's own Services."""
    node = node_addresses()[cluster.nodes[0]]
    made = [block(node[family]) for family in cluster.families]
    only_ours = {"matchLabels": {"kubernetes.io/metadata.name": cluster.a}}
    manifest = pool(POOL, *made, namespaceSelector=only_ours)
    apply(manifest)
    yield made
    delete(manifest, wait=True)


def balancer(cluster: World, name: str, /, selector: dict[str, str], **spec: Any) -> Manifest:
    annotations = spec.pop("annotations", {})
    made = frontend(
        cluster.a, name, selector, type="LoadBalancer", loadBalancerClass=OUR_CLASS, **spec
    )
    made["metadata"]["annotations"] = annotations
    return made


def ingress(cluster: World, name: str) -> list[str]:
    status = get("service", name, f"--namespace={cluster.a}")["status"]
    return [entry["ip"] for entry in status["loadBalancer"].get("ingress") or []]


def addresses(cluster: World, name: str, count: int) -> list[str]:
    return eventually(
        lambda: ingress(cluster, name), lambda found: len(found) == count, 20, f"{name}'s addresses"
    )


def announcer(client: Outsider, address: str) -> str:
    """The node whose MAC the client's kernel has for an address."""
    known = client.neighbours()
    for name, own in node_addresses().items():
        if known.get(address) in [known.get(at, "unknown") for at in own.values()]:
            return name
    return ""


def answers(client: Outsider, address: str) -> dict[str, Any]:
    target = ["tcp", address, 80]
    found: dict[str, Any] = client.call(
        "until", target=target, want="answer", deadline=PROPAGATION_S
    )
    return found


def know_the_nodes(client: Outsider) -> None:
    """So that the client's kernel has their MACs, whoever answers."""
    for own in node_addresses().values():
        for address in own.values():
            client.ask("tcp", address, 1, timeout=1)


def test_address_from_the_pool_answers_outside(
    cluster: World, outside_client: Outsider, blocks: list[dict[str, str]], objects: Objects
) -> None:
    objects.apply(balancer(cluster, "lb", {"app": "web"}))
    given = addresses(cluster, "lb", len(cluster.families))
    for address, allowed in zip(given, blocks, strict=True):
        first, last = (ipaddress.ip_address(allowed[end]) for end in ("first", "last"))
        at = ipaddress.ip_address(address)
        assert first.packed <= at.packed <= last.packed, (address, allowed)
        assert answers(outside_client, address).get("name") in {"web-1", "web-2"}
        for name in ("client-1", "client-2", "host-1"):
            found = cluster[name].ask("tcp", address, 80, timeout=2)
            assert found.get("name") in {"web-1", "web-2"}, (name, address, found)


def test_another_node_takes_over(
    cluster: World, outside_client: Outsider, blocks: list[dict[str, str]], objects: Objects
) -> None:
    if len(node_addresses()) < 2:
        pytest.skip("needs two nodes")
    objects.apply(balancer(cluster, "lb-moves", {"app": "web"}))
    given = addresses(cluster, "lb-moves", len(cluster.families))
    know_the_nodes(outside_client)
    for address in given:
        answers(outside_client, address)
        before = announcer(outside_client, address)
        assert before, outside_client.neighbours()
        kubectl("label", "node", before, f"{EXCLUDE}=true")
        try:
            # The client asks nobody: its kernel is told.
            moved = eventually(
                lambda address=address: announcer(outside_client, address),  # type: ignore[misc]
                lambda now, before=before: now not in ("", before),  # type: ignore[misc]
                10,
                f"another node for {address}",
            )
            assert moved != before
            assert answers(outside_client, address).get("name") in {"web-1", "web-2"}
        finally:
            kubectl("label", "node", before, f"{EXCLUDE}-")
        eventually(
            lambda address=address: announcer(outside_client, address),  # type: ignore[misc]
            lambda now, before=before: now == before,  # type: ignore[misc]
            10,
            f"{before} for {address} again",
        )


def test_local_is_announced_where_the_endpoint_is_and_keeps_the_client(
    cluster: World, outside_client: Outsider, blocks: list[dict[str, str]], objects: Objects
) -> None:
    know_the_nodes(outside_client)
    for web in ("web-1", "web-2"):
        number = {"app": "web", "number": web[-1]}
        name = f"lb-{web}"
        objects.apply(balancer(cluster, name, number, externalTrafficPolicy="Local"))
        for address in addresses(cluster, name, len(cluster.families)):
            found = answers(outside_client, address)
            assert found.get("name") == web
            assert found.get("peer") in outside_client.addresses, found
            assert announcer(outside_client, address) == cluster[web].node


def test_requested_and_shared_address(
    cluster: World, outside_client: Outsider, blocks: list[dict[str, str]], objects: Objects
) -> None:
    asked = blocks[0]["last"]
    wants = {IPS: asked, SHARING: "one"}
    one = balancer(cluster, "lb-asks", {"app": "web"}, annotations=wants)
    other = balancer(cluster, "lb-shares", {"app": "web"}, annotations=wants)
    same = balancer(cluster, "lb-clashes", {"app": "web"}, annotations=wants)
    for port in other["spec"]["ports"]:
        port["port"] += 1000
    for made in (one, other, same):
        made["spec"] |= {"ipFamilyPolicy": "SingleStack"}
        made["spec"]["ipFamilies"] = ["IPv6" if ":" in asked else "IPv4"]
    objects.apply(one, other)
    assert addresses(cluster, "lb-asks", 1) == [asked]
    assert addresses(cluster, "lb-shares", 1) == [asked]
    assert answers(outside_client, asked).get("name") in {"web-1", "web-2"}
    target = ["tcp", asked, 1080]
    outside_client.call("until", target=target, want="answer", deadline=PROPAGATION_S)
    objects.apply(same)
    told = eventually(lambda: events(cluster.a, "lb-clashes"), bool, 20, "an Event")
    assert f"{asked} is that of Service {cluster.a}/lb-" in told[0]
    assert "both have port" in told[0]
    assert ingress(cluster, "lb-clashes") == []


def events(space: str, name: str) -> list[str]:
    selector = f"--field-selector=involvedObject.name={name}"
    return [e["message"] for e in get("events", f"--namespace={space}", selector)["items"]]


def test_pool_over_the_pods_addresses_is_told_on_it_and_not_used(
    cluster: World, objects: Objects
) -> None:
    cidr = get("node", cluster.nodes[0])["spec"]["podCIDRs"][0]
    objects.apply(
        pool("weir-e2e-clash", {"cidr": cidr}, serviceSelector={"matchLabels": {"x": "y"}})
    )

    def accepted() -> dict[str, str]:
        status = get("loadbalancerpool", "weir-e2e-clash").get("status", {})
        return next((c for c in status.get("conditions", []) if c["type"] == "Accepted"), {})

    found = eventually(accepted, bool, 20, "a condition")
    assert (found["status"], found["reason"]) == ("False", "Overlap")
    assert f"pod CIDR of node {cluster.nodes[0]}" in found["message"]
