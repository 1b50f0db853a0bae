# SPDX-License-Identifier: Apache-2.0
"""What the specifications say of packets and Services, in the plainest way: over the API's JSON.

An independent model: it shares no code with the product, keeps no state between questions and
has no classes, rows or prefixes. NetworkPolicy as in the API reference of networking.k8s.io/v1,
EndpointSlices as in that of discovery.k8s.io/v1. What the reference leaves open and Weir decides
(docs/architecture.md): between a pod and its own node all passes, a pod reaches itself, and an
address of a pod CIDR that no known pod has is in nobody's selectors and in no ipBlock.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

Json = dict[str, Any]
Name = tuple[str, str]
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Well-known labels of Services and slices that are not for the cluster's proxy.
OTHER_PROXY = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


@dataclass
class Cluster:
    """Objects by kind, then by (namespace, name)."""

    objects: dict[str, dict[Name, Json]] = field(default_factory=dict)

    def of(self, kind: str) -> dict[Name, Json]:
        return self.objects.setdefault(kind, {})


class Oracle:
    """Answers about the cluster as it is now, for what node `here` decides."""

    def __init__(self, cluster: Cluster, here: str) -> None:
        self._cluster = cluster
        self._here = here
        self._pods: dict[str, Json] = {
            ip: pod for pod in cluster.of("Pod").values() for ip in pod_addresses(pod)
        }
        self._nodes: dict[str, str] = {
            entry["address"]: name
            for (_, name), node in cluster.of("Node").items()
            for entry in node["status"]["addresses"]
        }
        self._cidrs = [
            network(text)
            for node in cluster.of("Node").values()
            for text in node["spec"].get("podCIDRs", [])
        ]

    def is_local(self, ip: str) -> bool:
        """Of a pod on this node."""
        pod = self._pods.get(ip)
        return pod is not None and pod["spec"]["nodeName"] == self._here

    def allows(self, source: str, target: str, protocol: str, port: int) -> bool:
        return self.egress(source, target, protocol, port) and self.ingress(
            source, target, protocol, port
        )

    def egress(self, source: str, target: str, protocol: str, port: int) -> bool:
        """As far as this node decides it: for its own pods."""
        if not self.is_local(source) or self._exempt(source, target):
            return True
        return self._direction("Egress", source, target, target, protocol, port)

    def ingress(self, source: str, target: str, protocol: str, port: int) -> bool:
        if not self.is_local(target) or self._exempt(source, target):
            return True
        return self._direction("Ingress", target, source, target, protocol, port)

    def backends(self, vip: str, protocol: str, port: int) -> set[tuple[str, int]] | None:
        """Where a new flow to a cluster IP may go; None: that is no Service's."""
        for (namespace, name), service in self._cluster.of("Service").items():
            if vip not in service["spec"].get("clusterIPs", []):
                continue
            # HEADLESS on a Service says nothing: kube-proxy looks for it on slices alone.
            if OTHER_PROXY in labels(service):
                return None
            for wanted in service["spec"]["ports"]:
                if wanted["port"] == port and wanted.get("protocol", "TCP") == protocol:
                    return self._endpoints(namespace, name, wanted, version(vip))
        return None

    def _exempt(self, source: str, target: str) -> bool:
        if self._here in {self._nodes.get(source), self._nodes.get(target)}:
            return True
        return self._pods.get(source) is not None and self._pods[source] is self._pods.get(target)

    def _direction(
        self, direction: str, own: str, peer: str, target: str, protocol: str, port: int
    ) -> bool:
        pod = self._pods[own]
        where = pod["metadata"]["namespace"]
        isolated = False
        for (namespace, _), policy in self._cluster.of("NetworkPolicy").items():
            spec = policy["spec"]
            if namespace != where or direction not in policy_types(spec):
                continue
            if not selects(spec.get("podSelector"), labels(pod)):
                continue
            isolated = True
            for rule in spec.get(direction.lower()) or []:
                peers = rule.get("from" if direction == "Ingress" else "to")
                ports = rule.get("ports")
                if peers and not any(self._is_peer(p, namespace, peer) for p in peers):
                    continue
                if ports and not any(self._is_port(p, target, protocol, port) for p in ports):
                    continue
                return True
        return not isolated

    def _is_peer(self, peer: Json, namespace: str, ip: str) -> bool:
        pod = self._pods.get(ip)
        if "ipBlock" in peer:
            if pod is None and ip not in self._nodes and self._in_pod_cidr(ip):
                return False
            block = peer["ipBlock"]
            return within(ip, block["cidr"]) and not any(
                within(ip, hole) for hole in block.get("except") or []
            )
        if pod is None:
            return False
        where = pod["metadata"]["namespace"]
        if "namespaceSelector" in peer:
            of = labels(self._cluster.of("Namespace")["", where])
            if not selects(peer["namespaceSelector"], of):
                return False
        elif where != namespace:
            return False
        return selects(peer.get("podSelector"), labels(pod))

    def _in_pod_cidr(self, ip: str) -> bool:
        return any(address(ip) in cidr for cidr in self._cidrs)

    def _is_port(self, wanted: Json, target: str, protocol: str, port: int) -> bool:
        if wanted.get("protocol", "TCP") != protocol:
            return False
        first = wanted.get("port")
        if first is None:
            return True
        if isinstance(first, int):
            return bool(first <= port <= wanted.get("endPort", first))
        pod = self._pods.get(target)
        if pod is None:
            return False
        numbers = [
            named["containerPort"]
            for named in container_ports(pod)
            if named.get("name") == first and named.get("protocol", "TCP") == protocol
        ]
        return port in numbers[:1]

    def _endpoints(
        self, namespace: str, name: str, wanted: Json, family: int
    ) -> set[tuple[str, int]]:
        ready: set[tuple[str, int]] = set()
        draining: set[tuple[str, int]] = set()
        for (where, _), item in self._cluster.of("EndpointSlice").items():
            of = labels(item).get("kubernetes.io/service-name")
            if where != namespace or of != name or item["addressType"] != f"IPv{family}":
                continue
            for port in item.get("ports") or []:
                if port.get("name", "") != wanted.get("name", "") or (
                    port.get("protocol", "TCP") != wanted.get("protocol", "TCP")
                ):
                    continue
                for endpoint in item.get("endpoints") or []:
                    at = (endpoint["addresses"][0], port["port"])
                    conditions = endpoint.get("conditions") or {}
                    if conditions.get("ready") is not False:
                        ready.add(at)
                    elif conditions.get("serving") and conditions.get("terminating"):
                        draining.add(at)
        return ready or draining


def pod_addresses(pod: Json) -> list[str]:
    """None of its own in the host's network, when not scheduled, or when it has finished."""
    if pod["spec"].get("hostNetwork") or not pod["spec"].get("nodeName"):
        return []
    if pod["status"].get("phase") in {"Succeeded", "Failed"}:
        return []
    return [entry["ip"] for entry in pod["status"].get("podIPs", [])]


def container_ports(pod: Json) -> Iterator[Json]:
    """Of containers, then of init containers that keep running."""
    sidecars = [
        c for c in pod["spec"].get("initContainers", []) if c.get("restartPolicy") == "Always"
    ]
    for container in [*pod["spec"]["containers"], *sidecars]:
        yield from container.get("ports", [])


def labels(thing: Json) -> Json:
    found: Json = thing["metadata"].get("labels") or {}
    return found


def policy_types(spec: Json) -> list[str]:
    if spec.get("policyTypes"):
        return list(spec["policyTypes"])
    return ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def selects(selector: Json | None, on: Json) -> bool:
    for key, value in ((selector or {}).get("matchLabels") or {}).items():
        if key not in on or on[key] != value:
            return False
    for expression in (selector or {}).get("matchExpressions") or []:
        key, values = expression["key"], expression.get("values") or []
        found = {
            "In": key in on and on[key] in values,
            "NotIn": key not in on or on[key] not in values,
            "Exists": key in on,
            "DoesNotExist": key not in on,
        }
        if not found[expression["operator"]]:
            return False
    return True


@lru_cache(10_000)
def address(text: str) -> IpAddress:
    return ipaddress.ip_address(text)


@lru_cache(10_000)
def network(text: str) -> IpNetwork:
    """Blocks of IPv4-mapped addresses are IPv4's, as Go's net.ParseCIDR has them."""
    found = ipaddress.ip_network(text, strict=False)
    if isinstance(found, ipaddress.IPv6Network) and found.subnet_of(MAPPED):
        low = int(found.network_address) & 0xFFFFFFFF
        return ipaddress.IPv4Network((low, found.prefixlen - 96))
    return found


@lru_cache(100_000)
def within(ip: str, cidr: str) -> bool:
    """Never across families."""
    return address(ip) in network(cidr)


def version(ip: str) -> int:
    return address(ip).version
