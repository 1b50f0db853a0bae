# SPDX-License-Identifier: Apache-2.0
"""The pods, Services and namespaces that all tests share.

    node 1: web-1  client-1  host-1        node 2: web-2  client-2  host-2      namespace a
            guest-1 (app=client)                   guest-2 (app=guest)          namespace b

web-* answer on TCP 8080 ("http"), 8090-8093 and UDP 8081 ("udp") behind the Service web (80 and
81). host-* are in the host network and may kill processes of their node. `empty` is a Service
without endpoints. With a single node both halves are on it.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from e2e.suite.kubectl import Manifest, apply, eventually, get, kubectl
from e2e.suite.probes import Probe

LABEL = "weir.dev/e2e"
TCP, UDP = 8080, 8081
MORE_TCP = [8090, 8091, 8092, 8093]
_PROBE = Path(__file__).with_name("probe.py")


@dataclass(frozen=True, slots=True)
class World:
    """What the tests work with."""

    weir: str  # the namespace that Weir is in
    image: str
    a: str
    b: str
    nodes: tuple[str, ...]
    families: tuple[int, ...]
    probes: dict[str, Probe]
    services: dict[str, dict[int, str]]

    def __getitem__(self, name: str) -> Probe:
        return self.probes[name]

    @property
    def clients(self) -> list[Probe]:
        return [self[name] for name in ("client-1", "client-2", "guest-1", "guest-2")]


def installation() -> tuple[str, str]:
    """Namespace and image of the Weir that is installed."""
    found = get("daemonsets", "--all-namespaces", "--selector=app.kubernetes.io/part-of=weir")
    items = [i for i in found["items"] if i["metadata"]["name"] == "weir-agent"]
    assert items, "no weir-agent DaemonSet: is Weir installed?"
    image = items[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    return items[0]["metadata"]["namespace"], image


def build() -> World:
    """Create everything and wait until it answers. Earlier runs' leftovers are deleted first."""
    kubectl("delete", "namespaces", f"--selector={LABEL}", "--ignore-not-found", "--wait=false")
    weir, image = installation()
    names = eventually(schedulable, bool, 60, "a node that takes pods")
    one, two = names[0], names[min(1, len(names) - 1)]
    run = secrets.token_hex(3)
    a, b = f"weir-e2e-{run}-a", f"weir-e2e-{run}-b"
    apply(namespace(a, team="a"), namespace(b, team="b"), probe_source(a), probe_source(b))
    pods = [
        pod(a, "web-1", one, image, app="web", number="1"),
        pod(a, "web-2", two, image, app="web", number="2"),
        pod(a, "client-1", one, image, app="client"),
        pod(a, "client-2", two, image, app="client"),
        pod(b, "guest-1", one, image, app="client"),
        pod(b, "guest-2", two, image, app="guest"),
        host_pod(a, "host-1", one, image),
        host_pod(a, "host-2", two, image),
    ]
    web = service(a, "web", {"app": "web"})
    apply(*pods, web, service(a, "empty", {"app": "nobody"}))
    probes = {item["metadata"]["name"]: when_ready(item) for item in pods}
    families = tuple(sorted({6 if ":" in x else 4 for x in probes["web-1"].addresses}))
    services = {name: cluster_ips(a, name) for name in ("web", "empty")}
    return World(weir, image, a, b, names, families, probes, services)


def schedulable() -> tuple[str, ...]:
    """Nodes that take pods; none while a node is not ready, so that a run has all of them."""
    items = get("nodes")["items"]
    if not all(map(is_ready, items)):
        return ()
    return tuple(
        item["metadata"]["name"]
        for item in items
        if not any(t["effect"] == "NoSchedule" for t in item["spec"].get("taints", []))
    )


def namespace(name: str, **labels: str) -> Manifest:
    meta = {"name": name, "labels": {LABEL: "true", **labels}}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": meta}


def probe_source(space: str) -> Manifest:
    meta = {"name": "probe", "namespace": space}
    data = {"probe.py": _PROBE.read_text()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def pod(space: str, name: str, node: str, image: str, **labels: str) -> Manifest:
    """A probe that serves and asks; ready when its TCP port answers the kubelet."""
    tcp = [TCP, *MORE_TCP]
    container = {
        "name": "probe",
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "/probe/probe.py", "serve"],
        "env": [
            {"name": "PROBE_NAME", "value": name},
            {"name": "PROBE_TCP", "value": json.dumps(tcp)},
            {"name": "PROBE_UDP", "value": json.dumps([UDP])},
        ],
        "ports": [
            {"name": "http", "containerPort": TCP},
            {"name": "udp", "containerPort": UDP, "protocol": "UDP"},
        ],
        "readinessProbe": {"tcpSocket": {"port": TCP}, "periodSeconds": 1, "timeoutSeconds": 2},
        "volumeMounts": [{"name": "probe", "mountPath": "/probe"}],
    }
    spec = {
        "nodeName": node,
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "tolerations": [{"operator": "Exists"}],
        "containers": [container],
        "volumes": [{"name": "probe", "configMap": {"name": "probe"}}],
    }
    meta = {"name": name, "namespace": space, "labels": {LABEL: "true", **labels}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def host_pod(space: str, name: str, node: str, image: str) -> Manifest:
    """A probe in the host network; it sees the node's processes, to kill Weir's."""
    made = pod(space, name, node, image, app="host")
    made["spec"] |= {"hostNetwork": True, "hostPID": True}
    container = made["spec"]["containers"][0]
    container["env"] = [{"name": "PROBE_NAME", "value": name}]
    container["securityContext"] = {"privileged": True}
    del container["ports"], container["readinessProbe"]
    return made


def service(space: str, name: str, selector: dict[str, str]) -> Manifest:
    ports = [
        {"name": "http", "port": 80, "targetPort": "http"},
        {"name": "udp", "port": 81, "targetPort": "udp", "protocol": "UDP"},
    ]
    spec = {"ipFamilyPolicy": "PreferDualStack", "selector": selector, "ports": ports}
    meta = {"name": name, "namespace": space}
    return {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec}


def cluster_ips(space: str, name: str) -> dict[int, str]:
    found = get("service", name, f"--namespace={space}")["spec"]["clusterIPs"]
    return {6 if ":" in address else 4: address for address in found}


def is_ready(item: Manifest) -> bool:
    conditions = item["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def when_ready(item: Manifest, seconds: float = 60) -> Probe:
    """Wait for a pod and give the probe in it."""
    name, space = item["metadata"]["name"], item["metadata"]["namespace"]
    read = eventually(
        lambda: get("pod", name, f"--namespace={space}"), is_ready, seconds, f"pod {space}/{name}"
    )
    addresses = tuple(entry["ip"] for entry in read["status"]["podIPs"])
    return Probe(space, name, read["spec"]["nodeName"], addresses)
