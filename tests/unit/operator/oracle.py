# SPDX-License-Identifier: Apache-2.0
"""What the NetworkPolicy spec says of two addresses, in the plainest way: over the API's JSON.

It shares no code with the operator and keeps no state: every question walks all policies.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]


@dataclass
class Cluster:
    namespaces: dict[str, Json] = field(default_factory=dict)
    pods: dict[tuple[str, str], Json] = field(default_factory=dict)
    policies: dict[tuple[str, str], Json] = field(default_factory=dict)

    def pod_at(self, address: str) -> Json | None:
        for pod in self.pods.values():
            if address in addresses(pod) and pod["metadata"]["namespace"] in self.namespaces:
                return pod
        return None

    def allows(self, source: str, target: str, protocol: str, port: int) -> bool:
        return self._direction("Egress", source, target, target, protocol, port) and (
            self._direction("Ingress", target, source, target, protocol, port)
        )

    def _direction(
        self, direction: str, own: str, peer: str, target: str, protocol: str, port: int
    ) -> bool:
        """Whether pod `own` may talk to `peer` as far as policies of one direction tell."""
        pod = self.pod_at(own)
        if pod is None:
            return True
        isolated = False
        for (namespace, _), policy in self.policies.items():
            spec = policy["spec"]
            if namespace != pod["metadata"]["namespace"] or not selects(
                spec.get("podSelector", {}), labels(pod)
            ):
                continue
            if direction not in policy_types(spec):
                continue
            isolated = True
            for rule in spec.get(direction.lower()) or []:
                peers = rule.get("from" if direction == "Ingress" else "to")
                if peers and not any(self._is_peer(p, namespace, peer) for p in peers):
                    continue
                ports = rule.get("ports")
                if ports and not any(self._is_port(p, target, protocol, port) for p in ports):
                    continue
                return True
        return not isolated

    def _is_peer(self, peer: Json, namespace: str, address: str) -> bool:
        if "ipBlock" in peer:
            block = peer["ipBlock"]
            ip = ipaddress.ip_address(address)
            if ip not in ipaddress.ip_network(block["cidr"]):
                return False
            return not any(ip in ipaddress.ip_network(hole) for hole in block.get("except", []))
        pod = self.pod_at(address)
        if pod is None:
            return False
        where = pod["metadata"]["namespace"]
        if "namespaceSelector" in peer:
            if not selects(peer["namespaceSelector"], labels(self.namespaces[where])):
                return False
        elif where != namespace:
            return False
        return selects(peer.get("podSelector", {}), labels(pod))

    def _is_port(self, wanted: Json, target: str, protocol: str, port: int) -> bool:
        if wanted.get("protocol", "TCP") != protocol:
            return False
        first = wanted.get("port")
        if first is None:
            return True
        if isinstance(first, int):
            return bool(first <= port <= wanted.get("endPort", first))
        pod = self.pod_at(target)
        if pod is None:
            return False
        for container in pod["spec"]["containers"]:
            for named in container.get("ports", []):
                if named.get("name") == first and named.get("protocol", "TCP") == protocol:
                    return bool(named["containerPort"] == port)
        return False


def addresses(pod: Json) -> list[str]:
    if pod["spec"].get("hostNetwork") or not pod["spec"].get("nodeName"):
        return []
    if pod["status"].get("phase") in ("Succeeded", "Failed"):
        return []
    return [entry["ip"] for entry in pod["status"].get("podIPs", [])]


def labels(thing: Json) -> Json:
    found: Json = thing["metadata"].get("labels", {})
    return found


def policy_types(spec: Json) -> list[str]:
    if spec.get("policyTypes"):
        return list(spec["policyTypes"])
    return ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def selects(selector: Json, on: Json) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if key not in on or on[key] != value:
            return False
    for expression in selector.get("matchExpressions", []):
        key, values = expression["key"], expression.get("values", [])
        found = {
            "In": key in on and on[key] in values,
            "NotIn": key not in on or on[key] not in values,
            "Exists": key in on,
            "DoesNotExist": key not in on,
        }
        if not found[expression["operator"]]:
            return False
    return True
