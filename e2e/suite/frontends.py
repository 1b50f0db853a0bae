# SPDX-License-Identifier: Apache-2.0
"""Services of all kinds for tests: their manifests, and where they answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from e2e.suite.kubectl import Manifest, eventually, get, kubectl
from e2e.suite.world import cluster_ips, service

PROPAGATION_S = 10
BALANCER = {4: "198.51.100.7", 6: "2001:db8:100::7"}
EXTERNAL = {4: "203.0.113.7", 6: "2001:db8:113::7"}
# Nobody's: so no controller has an opinion on the addresses that a test writes.
CLASS = "e2e.weir.dev/none"


@dataclass(frozen=True, slots=True)
class Ports:
    """Node ports of a Service of `world.service`'s two ports."""

    tcp: int
    udp: int

    def of(self, protocol: str) -> int:
        return self.tcp if protocol == "tcp" else self.udp


def frontend(space: str, name: str, selector: dict[str, str], **spec: Any) -> Manifest:
    """The Service of `world.service`, with more in its specification."""
    made = service(space, name, selector)
    made["spec"] |= spec
    return made


def node_ports(space: str, name: str) -> Ports:
    found = get("service", name, f"--namespace={space}")["spec"]["ports"]
    by_name = {port["name"]: port["nodePort"] for port in found}
    return Ports(by_name["http"], by_name["udp"])


def give_addresses(space: str, name: str, addresses: list[str]) -> None:
    """As a load balancer's controller does."""
    ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses]
    status = json.dumps({"status": {"loadBalancer": {"ingress": ingress}}})
    where = [f"--namespace={space}", "--subresource=status"]
    kubectl("patch", "service", name, *where, "--type=merge", f"--patch={status}")


def node_addresses() -> dict[str, dict[int, str]]:
    """By node and family."""
    return {
        item["metadata"]["name"]: {
            6 if ":" in entry["address"] else 4: entry["address"]
            for entry in item["status"]["addresses"]
            if entry["type"] == "InternalIP"
        }
        for item in get("nodes")["items"]
    }


def families(space: str, name: str) -> tuple[int, ...]:
    return tuple(cluster_ips(space, name))


def wait_for_endpoints(space: str, name: str, count: int) -> None:
    """Ready ones, as the EndpointSlices say."""

    def ready() -> int:
        selector = f"--selector=kubernetes.io/service-name={name}"
        slices = get("endpointslices", f"--namespace={space}", selector)["items"]
        return max(
            (
                sum(bool(e["conditions"].get("ready")) for e in item.get("endpoints") or [])
                for item in slices
            ),
            default=0,
        )

    eventually(ready, lambda found: found == count, 30, f"{count} endpoints of {name}")
