# SPDX-License-Identifier: Apache-2.0
"""A large cluster with policies, as the API server has it, for benchmarks and tests of scale.

Namespaces have pods of ten apps and a hundred policies, ten for each app: seven let another app of
the namespace in by a port, one the same app of all the team's namespaces, one a network without a
part of it, one lets out to the cluster's DNS. So every pod is isolated both ways, and a selector
is asked for by one namespace or by all of a team.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from weir.operator import kinds
from weir.operator.compiler import Compiler
from weir.operator.objects import Namespace, Node, Pod
from weir.operator.policy import NetworkPolicy
from weir.operator.reflector import Kind

Json = dict[str, Any]

APPS = 10
POLICIES = 10  # for each app
PODS = 100  # in a namespace
TEAM = 10  # namespaces
PER_NODE = 30
POD_NETWORK = ipaddress.ip_network("10.128.0.0/12")
# The agent's node (support.agents): its pods are in "ns", their uids have the form "u-NAME".
HOME, HOME_NODE = "ns", "node1"
CREATED = "2026-01-01T00:00:00Z"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shape:
    """`unique`: each pod has a label of its own, as a StatefulSet's have."""

    namespaces: int
    unique: bool = True

    @property
    def pods(self) -> int:
        return self.namespaces * PODS

    @property
    def policies(self) -> int:
        return self.namespaces * APPS * POLICIES


def namespace_name(number: int) -> str:
    return HOME if number == 0 else f"ns{number}"


def metadata(name: str, namespace: str = "", **more: Any) -> Json:
    made = {"name": name, "creationTimestamp": CREATED, "uid": f"u-{namespace}-{name}"}
    return made | ({"namespace": namespace} if namespace else {}) | more


def namespace(number: int, **labels: str) -> Json:
    name = namespace_name(number)
    own = {"kubernetes.io/metadata.name": name, "team": f"team{number // TEAM}"}
    return {"metadata": metadata(name, labels=own | labels)}


def pod_labels(number: int, unique: bool) -> dict[str, str]:
    """Of the pod with that number in its namespace."""
    app = number % APPS
    labels = {"app": f"app{app}", "pod-template-hash": f"6d4cf56db{app}"}
    return labels | ({"statefulset.kubernetes.io/pod-name": f"p{number}"} if unique else {})


def pod(shape: Shape, home: int, number: int, **labels: str) -> Json:
    """Number `number` of a namespace. The first ones of namespace 0 are on the agent's node, and
    have no address until the agent gives them one."""
    name, space = f"p{number}", namespace_name(home)
    local = home == 0 and number < PER_NODE
    index = home * PODS + number
    meta = metadata(name, space, labels=pod_labels(number, shape.unique) | labels)
    meta["uid"] = f"u-{name}" if local else f"u-{space}-{name}"
    status: Json = {"phase": "Running"}
    if not local:
        status["podIPs"] = [{"ip": str(POD_NETWORK[index])}]
    container = {"name": "main", "ports": [{"name": "http", "containerPort": 8080}]}
    node = HOME_NODE if local else f"far{index // PER_NODE}"
    return {"metadata": meta, "spec": {"nodeName": node, "containers": [container]},
            "status": status}  # fmt: skip


def peer(app: int, **namespaces: str) -> Json:
    made: Json = {"podSelector": {"matchLabels": {"app": f"app{app % APPS}"}}}
    if namespaces:
        made["namespaceSelector"] = {"matchLabels": namespaces}
    return made


def port(number: int, protocol: str = "TCP") -> Json:
    return {"protocol": protocol, "port": number}


def policy(home: int, app: int, number: int, first_port: int = 8000) -> Json:
    """Number `number` of an app's ten."""
    spec: Json = {"podSelector": {"matchLabels": {"app": f"app{app}"}}}
    if number < 7:
        rule = {"from": [peer(app + number + 1)], "ports": [port(first_port + number)]}
        spec |= {"policyTypes": ["Ingress"], "ingress": [rule]}
    elif number == 7:
        rule = {"from": [peer(app, team=f"team{home // TEAM}")], "ports": [port(first_port + 7)]}
        spec |= {"policyTypes": ["Ingress"], "ingress": [rule]}
    elif number == 8:
        block = {"cidr": "192.168.0.0/16", "except": [f"192.168.{app}.0/24"]}
        spec |= {"policyTypes": ["Ingress"], "ingress": [{"from": [{"ipBlock": block}]}]}
    else:
        dns = {"kubernetes.io/metadata.name": namespace_name(1)}
        rule = {"to": [peer(0, **dns)], "ports": [port(53, "UDP"), port(53)]}
        spec |= {"policyTypes": ["Egress"], "egress": [rule]}
    return {"metadata": metadata(f"app{app}-{number}", namespace_name(home)), "spec": spec}


def node(name: str, cidr: str, addr: str) -> Json:
    addresses = [{"type": "InternalIP", "address": addr}]
    return {"metadata": metadata(name), "spec": {"podCIDRs": [cidr]},
            "status": {"addresses": addresses}}  # fmt: skip


def nodes(shape: Shape) -> Iterator[Json]:
    yield node(HOME_NODE, "10.244.1.0/24", "192.0.2.1")
    for number in range(-(-shape.pods // PER_NODE)):
        addr = ipaddress.ip_address("198.18.0.0") + number
        yield node(f"far{number}", f"{POD_NETWORK[number * PER_NODE]}/32", str(addr))


def namespaces(shape: Shape) -> Iterator[Json]:
    return (namespace(number) for number in range(shape.namespaces))


def pods(shape: Shape) -> Iterator[Json]:
    for home in range(shape.namespaces):
        for number in range(PODS):
            yield pod(shape, home, number)


def policies(shape: Shape) -> Iterator[Json]:
    for home in range(shape.namespaces):
        for app in range(APPS):
            for number in range(POLICIES):
                yield policy(home, app, number)


def parsed(kind: Kind[T], item: Json) -> T:
    """As the operator's reflector reads it; there is nothing wrong with it."""
    made = kind.read(msgspec.Raw(json.dumps(item).encode()))
    if made.value is None or made.problems:
        raise AssertionError(f"{item}: {made.problems}")
    return made.value


@dataclass(frozen=True, slots=True)
class Objects:
    """All of a cluster, parsed."""

    nodes: list[Node]
    namespaces: list[Namespace]
    policies: list[NetworkPolicy]
    pods: list[Pod]

    def fill(self, compiler: Compiler) -> None:
        """In the order of the operator's first compilation."""
        for namespace in self.namespaces:
            compiler.namespace(namespace.key, namespace)
        for policy in self.policies:
            compiler.policy(policy.key, policy)
        for node in self.nodes:
            compiler.node(node.key, node)
        for pod in self.pods:
            compiler.pod(pod.key, pod)


def objects(shape: Shape) -> Objects:
    def read(kind: Kind[T], items: Iterable[Json]) -> list[T]:
        return [parsed(kind, item) for item in items]

    return Objects(
        read(kinds.NODE, nodes(shape)),
        read(kinds.NAMESPACE, namespaces(shape)),
        read(kinds.POLICY, policies(shape)),
        read(kinds.POD, pods(shape)),
    )
