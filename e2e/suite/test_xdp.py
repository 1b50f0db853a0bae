# SPDX-License-Identifier: Apache-2.0
"""BlockLists as kubectl makes them, and everything from outside again with XDP on the uplinks.

    outside: its own addresses, which the API server has too ── node port ──────┐
             others, which only the VIPs of this test are asked from ── VIP ── nodes ── web-1, web-2

With ROUTING=native XDP itself carries node ports to the other node; with an overlay it has the
BlockLists alone, and tc does the rest.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest

from e2e.suite.conftest import Objects
from e2e.suite.frontends import (
    CLASS,
    PROPAGATION_S,
    frontend,
    give_addresses,
    node_addresses,
    node_ports,
)
from e2e.suite.kubectl import Manifest, apply, delete, eventually, get, kubectl
from e2e.suite.outsider import Outsider
from e2e.suite.release import Release
from e2e.suite.world import World

pytestmark = pytest.mark.timeout(300)

VIP = {4: "198.51.100.{}", 6: "2001:db8:100::{}"}
FIRST_VIP = 40
PROMPT_S = 1.0
LIST = "weir-e2e"
BACKENDS = {"web-1", "web-2"}


@pytest.fixture(scope="module", params=["off", "generic", "native"])
def mode(request: pytest.FixtureRequest, cluster: World, outside_client: Outsider) -> Iterator[str]:
    """xdp.mode of every node, set as people set it."""
    wanted: str = request.param
    release = Release(cluster.weir)
    before = release.values()["xdp"]["mode"]
    nodes = node_addresses()
    with outside_client.ready_for_xdp(wanted, nodes) if wanted != "off" else nullcontext():
        try:
            if wanted != before:
                release.upgrade(xdp__mode=wanted)
            yield wanted
        finally:
            if wanted != before:
                release.upgrade(xdp__mode=before)


@pytest.fixture(scope="module")
def others(cluster: World, outside_client: Outsider) -> Iterator[dict[int, str]]:
    """Addresses of the client that nothing else uses."""
    found = {}
    for address in outside_client.addresses:
        family = 6 if ":" in address else 4
        if family in cluster.families:
            network = ipaddress.ip_network((address, 24 if family == 4 else 120), strict=False)
            found[family] = str(network[-30])
    with outside_client.more_addresses(found.values()):
        yield found


@pytest.fixture(scope="module")
def vips(
    cluster: World, mode: str, outside_client: Outsider, others: dict[int, str]
) -> Iterator[dict[str, int]]:
    """By address the family: one for each node and family, asked from `others`."""
    made = frontend(
        cluster.a, "fenced", {"app": "web"}, type="LoadBalancer", loadBalancerClass=CLASS
    )
    apply(made)
    routes, found = {}, {}
    for number, own in enumerate(node_addresses().values(), start=FIRST_VIP):
        for family in cluster.families:
            address = VIP[family].format(number)
            routes[address], found[address] = own[family], family
    give_addresses(cluster.a, "fenced", list(found))
    with outside_client.routes(routes, others):
        wait_for_all(outside_client, found, "answer", PROPAGATION_S)
        yield found
    delete(made, wait=True)


def wait_for_all(client: Outsider, addresses: Iterable[str], want: str, seconds: float) -> None:
    """Side by side: silence takes its time."""

    def one(address: str) -> dict[str, Any]:
        target = ["tcp", address, 80]
        found: dict[str, Any] = client.call("until", target=target, want=want, deadline=seconds)
        return found

    asked = list(addresses)
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = dict(zip(asked, threads.map(one, asked), strict=True))
    assert {answer.get("error", "answer") for answer in answers.values()} == {want}, answers


def block_list(*cidrs: str) -> Manifest:
    return {
        "apiVersion": "weir.dev/v1alpha1",
        "kind": "BlockList",
        "metadata": {"name": LIST},
        "spec": {"cidrs": list(cidrs)},
    }


def test_the_uplinks_have_it(cluster: World, mode: str) -> None:
    agents = get("pods", "--selector=app.kubernetes.io/name=weir-agent",
                 f"--namespace={cluster.weir}")["items"]  # fmt: skip
    for item in agents:
        said = kubectl("exec", item["metadata"]["name"], f"--namespace={cluster.weir}",
                       "--", "weir", "status", "-o", "json")  # fmt: skip
        found = [status["xdp"] for status in with_key(json.loads(said), "xdp")]
        assert found
        assert all(set(by_device.values()) == {mode} for by_device in found), found


def with_key(value: Any, key: str) -> Iterator[dict[str, Any]]:
    """All mappings in the value that have the key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from with_key(one, key)


def test_a_block_list_stops_a_client_within_a_second(
    cluster: World,
    outside_client: Outsider,
    others: dict[int, str],
    vips: dict[str, int],
    objects: Objects,
    monitor: list[dict[str, Any]],
) -> None:
    """At every node, and nobody else; each drop names the list. Deleted, it lets through."""
    blocked = block_list(*others.values())
    objects.apply(blocked)
    wait_for_all(outside_client, vips, "timeout", PROMPT_S)

    def unnamed() -> set[str]:
        """Whose drops no event names yet."""
        for address in vips:
            outside_client.ask("tcp", address, 80, timeout=0.1)
        told = [
            json.dumps(e) for e in list(monitor) if f"BlockList {LIST}" in e.get("policies", [])
        ]
        return {
            address
            for address, family in vips.items()
            if not any(address in one and others[family] in one for one in told)
        }

    eventually(unnamed, lambda missing: not missing, 5, "events that name the list")
    found = next(e for e in list(monitor) if f"BlockList {LIST}" in e.get("policies", []))
    assert found["reason"] == "blocked"
    [condition] = get("blocklist", LIST)["status"]["conditions"]
    assert (condition["type"], condition["status"]) == ("Accepted", "True")
    for own in node_addresses().values():
        for address in own.values():  # from the addresses that are not listed
            assert outside_client.ask("tcp", address, 1, timeout=2).get("error") == "refused"
    objects.delete(blocked, wait=False)
    wait_for_all(outside_client, vips, "answer", PROMPT_S)


def test_a_list_of_the_api_server_does_not_cut_the_cluster(
    cluster: World, outside_client: Outsider, objects: Objects
) -> None:
    """Said on the list; its other prefixes are in force."""
    own = outside_client.address(cluster.families[0])
    objects.apply(block_list(own, "198.51.100.200/32"))

    def accepted() -> dict[str, Any]:
        status = get("blocklist", LIST).get("status", {})
        return next((c for c in status.get("conditions", []) if c["type"] == "Accepted"), {})

    found = eventually(accepted, bool, 10, "a condition")
    assert found["status"] == "False", found
    assert own in found["message"], found
    address = next(iter(node_addresses().values()))[cluster.families[0]]
    assert outside_client.ask("tcp", address, 1, timeout=2).get("error") == "refused"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_node_ports(
    cluster: World, mode: str, outside_client: Outsider, vips: dict[str, int], protocol: str
) -> None:
    del vips  # they are the Service's, which is there with them
    port = node_ports(cluster.a, "fenced").of(protocol)
    for own in node_addresses().values():
        for address in own.values():
            counted = outside_client.call(
                "spread", protocol=protocol, host=address, port=port, count=30
            )
            assert set(counted) == BACKENDS, (mode, address, counted)


def test_large_transfers(
    cluster: World, mode: str, outside_client: Outsider, vips: dict[str, int]
) -> None:
    port = node_ports(cluster.a, "fenced").tcp
    for address, number in [(vip, 80) for vip in vips] + [
        (address, port) for own in node_addresses().values() for address in own.values()
    ]:
        done = outside_client.call(
            "transfer", host=address, port=number, size=5_000_000, timeout=60
        )
        assert done["sent"], (mode, address, done)
        assert done["fetched"], (mode, address, done)
