# SPDX-License-Identifier: Apache-2.0
"""What the specifications say of packets and Services, in the plainest way: over the API's JSON.

An independent model: it shares no code with the product, keeps no state between questions and
has no classes, rows or prefixes. Policies are judged by `spec_oracle`; EndpointSlices are as in
the API reference of discovery.k8s.io/v1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from support import spec_oracle
from support.spec_oracle import Json, Name, address, labels, pod_addresses

__all__ = ["Cluster", "Json", "Name", "Oracle", "address", "pod_addresses", "version"]

# Well-known labels of Services and slices that are not for the cluster's proxy.
OTHER_PROXY = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"


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
        self.spec = spec_oracle.Cluster(
            namespaces={name: thing for (_, name), thing in cluster.of("Namespace").items()},
            nodes={name: thing for (_, name), thing in cluster.of("Node").items()},
            pods=cluster.of("Pod"),
            policies=cluster.of("NetworkPolicy"),
            cluster_policies={
                name: thing for (_, name), thing in cluster.of("ClusterNetworkPolicy").items()
            },
        )

    def is_local(self, ip: str) -> bool:
        """Of a pod on this node."""
        pod = self.spec.pod_at(ip)
        return pod is not None and pod["spec"]["nodeName"] == self._here

    def allows(self, source: str, target: str, protocol: str, port: int) -> bool:
        return self.egress(source, target, protocol, port) and self.ingress(
            source, target, protocol, port
        )

    def egress(self, source: str, target: str, protocol: str, port: int) -> bool:
        """As far as this node decides it: for its own pods."""
        return not self.is_local(source) or (
            self.spec.decision(spec_oracle.EGRESS, source, target, protocol, port).allowed
        )

    def ingress(self, source: str, target: str, protocol: str, port: int) -> bool:
        return not self.is_local(target) or (
            self.spec.decision(spec_oracle.INGRESS, source, target, protocol, port).allowed
        )

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


def version(ip: str) -> int:
    return address(ip).version
