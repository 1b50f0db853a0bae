# SPDX-License-Identifier: Apache-2.0
"""Random clusters and what happens to them, as lists of plain data.

A script can lose any of its actions and still make sense, so a failing one is cut down by
leaving actions out (`shortest`).
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from random import Random

from support.oracle import HEADLESS, OTHER_PROXY, Cluster, Json, Name, pod_addresses

# What happens, kind, namespace, name, content.
Action = tuple[str, str, str, str, Json]
Script = list[list[Action]]

HERE, ELSEWHERE, LATER = "n1", "n2", "n3"
NAMESPACES = ["blue", "green", "red"]
PODS = [f"p{i}" for i in range(5)]
POLICIES = [f"np{i}" for i in range(4)]
CLUSTER_POLICIES = [f"cnp{i}" for i in range(4)]
SERVICES = [f"s{i}" for i in range(3)]
NODES: dict[str, tuple[list[str], list[str]]] = {
    HERE: (["192.0.2.1", "2001:db8::1"], ["10.0.1.0/24", "fd00:0:0:1::/64"]),
    ELSEWHERE: (["192.0.2.2", "2001:db8::2"], ["10.0.2.0/24", "fd00:0:0:2::/64"]),
    LATER: (["192.0.2.3", "2001:db8::3"], ["10.0.3.0/24", "fd00:0:0:3::/64"]),
}
OUTSIDE = [
    "198.51.100.9",
    "198.51.100.200",
    "192.0.2.77",
    "10.0.9.9",
    "2001:db8:f::9",
    "2001:db8:f:8000::9",
    "fd00:0:0:9::9",
]
UNKNOWN = ["10.0.2.99", "fd00:0:0:2::99"]
BLOCKS: list[tuple[str, list[str]]] = [
    ("0.0.0.0/0", []),
    ("0.0.0.0/0", ["10.0.0.0/8"]),
    ("0.0.0.0/0", ["10.0.1.0/24", "192.0.2.2/32", "198.51.100.128/25"]),
    ("::/0", []),
    ("::/0", ["fd00::/16"]),
    ("::/0", ["2001:db8:f:8000::/49", "fd00:0:0:2::4/128"]),
    ("::/64", []),
    ("::/80", []),
    ("::ffff:0:0/96", []),
    ("10.0.0.0/8", []),
    ("10.0.1.0/24", ["10.0.1.4/30"]),
    ("10.0.2.0/24", ["10.0.2.2/32", "10.0.2.4/31", "10.0.2.0/30"]),
    ("10.0.2.3/32", []),
    ("10.0.1.2/32", []),
    ("10.0.1.5/24", []),
    ("10.0.1.2/32", ["10.0.1.2/32"]),
    ("198.51.100.0/24", ["198.51.100.0/24"]),
    ("198.51.100.0/24", ["198.51.100.128/25"]),
    ("198.51.100.0/24", ["203.0.113.0/24"]),
    ("192.0.2.0/24", []),
    ("192.0.2.2/32", []),
    ("fd00::/16", ["fd00:0:0:1::/64"]),
    ("fd00:0:0:1::3/128", []),
    ("fd00:0:0:2::/64", ["fd00:0:0:2::2/127"]),
    ("2001:db8::/32", ["2001:db8:f::/48"]),
    ("2001:db8:f::/48", ["2001:db8:f:8000::/49"]),
]
# (protocol, port) of packets. ICMP has no port, and no port rule matches it.
PROBES = [
    ("TCP", 80),
    ("TCP", 81),
    ("TCP", 443),
    ("TCP", 8080),
    ("TCP", 65535),
    ("UDP", 53),
    ("UDP", 80),
    ("UDP", 8080),
    ("SCTP", 80),
    ("ICMP", 0),
]
POLICY_PORTS: list[Json] = [
    {},
    {"protocol": "UDP"},
    {"protocol": "SCTP"},
    {"port": 80},
    {"port": 80, "protocol": "UDP"},
    {"port": 80, "protocol": "SCTP"},
    {"port": 80, "endPort": 443, "protocol": "TCP"},
    {"port": 1024, "endPort": 65535},
    {"port": 1, "endPort": 79},
    {"port": 53, "endPort": 80, "protocol": "UDP"},
    {"port": 443, "endPort": 443},
    {"port": 65535},
    {"port": "web"},
    {"port": "web", "protocol": "UDP"},
    {"port": "api"},
    {"port": "nobody"},
]
NAMED_PORTS = [port for port in POLICY_PORTS if isinstance(port.get("port"), str)]
CONTAINER_PORTS: list[Json] = [
    {"name": "web", "containerPort": 80},
    {"name": "web", "containerPort": 8080},
    {"name": "web", "containerPort": 80, "protocol": "UDP"},
    {"name": "api", "containerPort": 81, "protocol": "TCP"},
    {"name": "api", "containerPort": 443},
    {"name": "other", "containerPort": 80},
    {"containerPort": 80},
]
LABELS = {"app": ["a", "b", "c"], "tier": ["x", "y", ""]}
SERVICE_PORTS: list[list[Json]] = [
    [{"port": 80}],
    [{"name": "t", "port": 80, "protocol": "TCP"}, {"name": "u", "port": 80, "protocol": "UDP"}],
    [{"name": "t", "port": 80}, {"name": "s", "port": 443}],
    [{"name": "u", "port": 53, "protocol": "UDP"}, {"name": "t", "port": 53, "protocol": "TCP"}],
]
SERVICE_LABELS = [OTHER_PROXY, HEADLESS]
SLICE_PORTS = [80, 8080, 53, 443]


def some_labels(rng: Random) -> Json:
    return {key: rng.choice(values) for key, values in LABELS.items() if rng.random() < 0.7}


def some_selector(rng: Random) -> Json:
    selector: Json = {}
    if rng.random() < 0.35:
        selector["matchLabels"] = some_labels(rng)
    if rng.random() < 0.45:
        selector["matchExpressions"] = [some_expression(rng) for _ in range(rng.randint(1, 2))]
    return selector


def some_expression(rng: Random) -> Json:
    key = rng.choice([*LABELS, "absent"])
    operator = rng.choice(["In", "NotIn", "Exists", "DoesNotExist"])
    expression: Json = {"key": key, "operator": operator}
    if operator in {"In", "NotIn"}:
        known = LABELS.get(key, ["a"])
        expression["values"] = rng.sample(known, rng.randint(1, len(known)))
    return expression


def some_peer(rng: Random) -> Json:
    kind = rng.random()
    if kind < 0.45:
        cidr, holes = rng.choice(BLOCKS)
        block: Json = {"cidr": cidr}
        if holes or rng.random() < 0.1:
            block["except"] = holes
        return {"ipBlock": block}
    if kind < 0.65:
        return {"podSelector": some_selector(rng)}
    if kind < 0.8:
        return {"namespaceSelector": some_selector(rng)}
    return {"podSelector": some_selector(rng), "namespaceSelector": some_selector(rng)}


def some_rules(rng: Random, side: str) -> list[Json]:
    made: list[Json] = []
    for _ in range(rng.choice([0, 1, 1, 2])):
        rule: Json = {}
        if rng.random() < 0.8:
            rule[side] = [some_peer(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 2]))]
        if rng.random() < 0.5:
            some = NAMED_PORTS if rng.random() < 0.3 else POLICY_PORTS
            rule["ports"] = rng.sample(some, rng.choice([0, 1, 1, 2]))
        made.append(rule)
    return made


def some_policy(rng: Random) -> Json:
    spec: Json = {"podSelector": some_selector(rng) if rng.random() < 0.8 else {}}
    if rng.random() < 0.75:
        spec["ingress"] = some_rules(rng, "from")
    if rng.random() < 0.6:
        spec["egress"] = some_rules(rng, "to")
    if rng.random() < 0.7:
        spec["policyTypes"] = rng.choice([[], ["Ingress"], ["Egress"], ["Ingress", "Egress"]])
    return {"spec": spec}


def some_cluster_peer(rng: Random, side: str) -> Json:
    """nodes and networks are egress rules' alone."""
    kind = rng.random()
    if side == "to" and kind < 0.25:
        return {"nodes": some_selector(rng)}
    if side == "to" and kind < 0.55:
        cidrs = [cidr for cidr, _ in BLOCKS]
        return {"networks": rng.sample(cidrs, rng.randint(1, 2))}
    if kind < 0.75:
        return {"namespaces": some_selector(rng)}
    return {"pods": {"namespaceSelector": some_selector(rng), "podSelector": some_selector(rng)}}


CLUSTER_PROTOCOLS: list[Json] = [
    {"tcp": {"destinationPort": {"number": 80}}},
    {"tcp": {"destinationPort": {"range": {"start": 80, "end": 443}}}},
    {"tcp": {"destinationPort": {"range": {"start": 1024, "end": 65535}}}},
    {"udp": {"destinationPort": {"number": 53}}},
    {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}},
    {"sctp": {"destinationPort": {"number": 80}}},
    {"destinationNamedPort": "web"},
    {"destinationNamedPort": "api"},
]


def some_cluster_rules(rng: Random, side: str) -> list[Json]:
    made: list[Json] = []
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        peers = [some_cluster_peer(rng, side) for _ in range(rng.choice([1, 1, 2]))]
        rule: Json = {"action": rng.choice(["Accept", "Deny", "Pass"]), side: peers}
        if rng.random() < 0.45:
            rule["protocols"] = rng.sample(CLUSTER_PROTOCOLS, rng.choice([1, 1, 2]))
        made.append(rule)
    return made


def some_cluster_policy(rng: Random) -> Json:
    subject: Json = {"namespaces": some_selector(rng) if rng.random() < 0.5 else {}}
    if rng.random() < 0.5:
        subject = {
            "pods": {"namespaceSelector": some_selector(rng), "podSelector": some_selector(rng)}
        }
    return {
        "spec": {
            "tier": rng.choice(["Admin", "Admin", "Baseline"]),
            "priority": rng.choice([0, 1, 1, 1000]),
            "subject": subject,
            "ingress": some_cluster_rules(rng, "from"),
            "egress": some_cluster_rules(rng, "to"),
        }
    }


def some_pod(rng: Random) -> Json:
    node = rng.choice([HERE, HERE, HERE, ELSEWHERE, ELSEWHERE, LATER, ""])
    ips = []
    if node:
        cidrs = [cidr.partition("/")[0] for cidr in NODES[node][1]]
        if rng.random() < 0.9:
            ips.append(cidrs[0][:-1] + str(rng.randint(2, 7)))
        if not ips or rng.random() < 0.8:
            ips.append(f"{cidrs[1]}{rng.randint(2, 7)}")
    host = rng.random() < 0.08
    if host and node:
        ips = list(NODES[node][0])
    ports = rng.sample(CONTAINER_PORTS, rng.randint(0, 3))
    spec: Json = {"nodeName": node, "containers": [{"ports": ports}, {}]}
    if host:
        spec["hostNetwork"] = True
    if rng.random() < 0.15:
        sidecar: Json = {"ports": rng.sample(CONTAINER_PORTS, 1)}
        if rng.random() < 0.5:
            sidecar["restartPolicy"] = "Always"
        spec["initContainers"] = [sidecar]
    # What never changes in a pod's life tells which pod it is.
    tag = zlib.crc32(repr((spec, ips, rng.randint(0, 2))).encode())
    return {
        "metadata": {"uid": f"{tag:08x}", "labels": some_labels(rng)},
        "spec": spec,
        "status": {
            "phase": rng.choices(["Running", "Pending", "Succeeded", "Failed"], [12, 1, 1, 1])[0],
            "podIPs": [{"ip": ip} for ip in ips],
        },
        "announced": rng.random() < 0.3,
    }


def some_service(rng: Random, name: str) -> Json:
    last = 10 + SERVICES.index(name)
    families = rng.choice([[4], [6], [4, 6], [4, 6], []])
    vips = [f"10.96.0.{last}" if family == 4 else f"fd00:96::{last}" for family in families]
    spec: Json = {"ports": rng.choice(SERVICE_PORTS), "clusterIPs": vips or ["None"]}
    spec["clusterIP"] = spec["clusterIPs"][0]
    labels = {rng.choice(SERVICE_LABELS): rng.choice(["", "mesh"])} if rng.random() < 0.1 else {}
    return {"metadata": {"labels": labels}, "spec": spec}


def some_slice(rng: Random, name: str) -> Json:
    family = rng.choice([4, 6])
    service = name.partition("-")[0]
    endpoints = []
    for _ in range(rng.randint(0, 3)):
        node = rng.choice([HERE, HERE, ELSEWHERE])
        cidr = NODES[node][1][0 if family == 4 else 1].partition("/")[0]
        number = rng.randint(2, 7)
        ip = cidr[:-1] + str(number) if family == 4 else f"{cidr}{number}"
        if rng.random() < 0.15:
            others = OUTSIDE + [ip for ips, _ in NODES.values() for ip in ips]
            ip = rng.choice([ip for ip in others if (":" in ip) == (family == 6)])
        conditions = rng.choice(
            [
                {"ready": True, "serving": True, "terminating": False},
                {"ready": True},
                {},
                None,
                {"ready": False, "serving": True, "terminating": True},
                {"ready": False, "serving": False, "terminating": True},
                {"ready": False, "serving": True, "terminating": False},
                {"ready": False},
            ]
        )
        endpoints.append({"addresses": [ip], "conditions": conditions})
    named: list[Json] = [
        {},
        {"name": "t", "protocol": "TCP"},
        {"name": "u", "protocol": "UDP"},
        {"name": "s"},
        {"name": "t", "protocol": "UDP"},
    ]
    ports = [{**port, "port": rng.choice(SLICE_PORTS)} for port in rng.sample(named, 4)]
    return {
        "metadata": {"labels": {"kubernetes.io/service-name": service}},
        "addressType": f"IPv{family}",
        "endpoints": endpoints,
        "ports": ports,
    }


def some_action(rng: Random) -> Action:
    where = rng.choice(NAMESPACES)
    kind = rng.random()
    if kind < 0.10:
        return ("set", "Namespace", "", where, {"metadata": {"labels": some_labels(rng)}})
    if kind < 0.35:
        return ("set", "Pod", where, rng.choice(PODS), some_pod(rng))
    if kind < 0.43:
        return ("relabel", "Pod", where, rng.choice(PODS), some_labels(rng))
    if kind < 0.46:
        return ("finish", "Pod", where, rng.choice(PODS), {})
    if kind < 0.53:
        return ("delete", "Pod", where, rng.choice(PODS), {})
    if kind < 0.67:
        return ("set", "NetworkPolicy", where, rng.choice(POLICIES), some_policy(rng))
    if kind < 0.70:
        return ("delete", "NetworkPolicy", where, rng.choice(POLICIES), {})
    name = rng.choice(CLUSTER_POLICIES)
    if kind < 0.77:
        return ("set", "ClusterNetworkPolicy", "", name, some_cluster_policy(rng))
    if kind < 0.79:
        return ("delete", "ClusterNetworkPolicy", "", name, {})
    if kind < 0.80:
        return ("relabel", "Node", "", rng.choice([HERE, ELSEWHERE]), some_labels(rng))
    name = rng.choice(SERVICES)
    if kind < 0.84:
        return ("set", "Service", "blue", name, some_service(rng, name))
    if kind < 0.85:
        return ("delete", "Service", "blue", name, {})
    part = f"{name}-{rng.randint(0, 2)}"
    if kind < 0.94:
        return ("set", "EndpointSlice", "blue", part, some_slice(rng, part))
    if kind < 0.95:
        return ("delete", "EndpointSlice", "blue", part, {})
    if kind < 0.97:
        return ("new operator", "", "", "", {"seed": rng.random()})
    if kind < 0.985:
        return ("restart", "", "", "", {})
    return (rng.choice(["set", "delete"]), "Node", "", LATER, node(LATER))


def node(name: str) -> Json:
    ips, cidrs = NODES[name]
    return {
        "metadata": {"labels": {"app": "a"} if name == ELSEWHERE else {}},
        "spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs},
        "status": {"addresses": [{"type": "InternalIP", "address": ip} for ip in ips]},
    }


def beginning(rng: Random) -> list[Action]:
    """A cluster to start from; not to be left out."""
    actions: list[Action] = [
        ("set", "Namespace", "", name, {"metadata": {"labels": some_labels(rng)}})
        for name in NAMESPACES
    ]
    actions += [("set", "Node", "", name, node(name)) for name in (HERE, ELSEWHERE)]
    return actions


def some_script(rng: Random, steps: int) -> Script:
    """First many objects at once, then a few changes a step."""
    first = [some_action(rng) for _ in range(25)]
    for name in SERVICES:
        first.append(("set", "Service", "blue", name, some_service(rng, name)))
        parts = [f"{name}-{number}" for number in range(2)]
        first += [("set", "EndpointSlice", "blue", it, some_slice(rng, it)) for it in parts]
    for name in rng.sample(CLUSTER_POLICIES, rng.randint(0, 3)):
        first.append(("set", "ClusterNetworkPolicy", "", name, some_cluster_policy(rng)))
    rng.shuffle(first)
    script: Script = [first]
    script += [[some_action(rng) for _ in range(rng.choice([1, 1, 2, 3, 6]))] for _ in range(steps)]
    return script


def change(cluster: Cluster, action: Action) -> Name | None:
    """Does it to the model. Returns the object's name if it is another now."""
    what, kind, namespace, name, content = action
    objects = cluster.of(kind)
    at = (namespace, name)
    old = objects.get(at)
    match what:
        case "set":
            meta = {**content.get("metadata", {}), "namespace": namespace, "name": name}
            if kind == "Pod":
                meta["uid"] = f"{namespace}-{name}-{meta['uid']}"
            objects[at] = {**content, "metadata": meta}
            if kind == "Pod":
                _settle(cluster, at)
        case "delete":
            objects.pop(at, None)
        case "relabel" if old is not None:
            objects[at] = {**old, "metadata": {**old["metadata"], "labels": content}}
        case "finish" if old is not None:
            objects[at] = {**old, "status": {**old["status"], "phase": "Succeeded"}}
    return at if objects.get(at) != old else None


def _settle(cluster: Cluster, at: Name) -> None:
    """No address is two live pods', and a pod's addresses go with what it is."""
    pod = cluster.of("Pod")[at]
    if pod["spec"].get("hostNetwork"):
        return
    taken = {
        ip for other, it in cluster.of("Pod").items() if other != at for ip in pod_addresses(it)
    }
    ips = [entry for entry in pod["status"]["podIPs"] if entry["ip"] not in taken]
    uid = pod["metadata"]["uid"] + "".join(f"-{entry['ip']}" for entry in ips)
    cluster.of("Pod")[at] = {
        **pod,
        "metadata": {**pod["metadata"], "uid": uid},
        "status": {**pod["status"], "podIPs": ips},
    }


def shortest(script: Script, fails: Callable[[Script], bool], seconds: float) -> Script:
    """Leaves out actions as long as it still fails, first many at once."""
    deadline = time.monotonic() + seconds
    size = max(1, sum(map(len, script)) // 2)
    while size:
        places = [(i, j) for i, step in enumerate(script) for j in range(len(step))]
        shorter = False
        for start in range(0, len(places), size):
            gone = set(places[start : start + size])
            tried = [
                [action for j, action in enumerate(step) if (i, j) not in gone]
                for i, step in enumerate(script)
            ]
            tried = [step for i, step in enumerate(tried) if step or not script[i]]
            if time.monotonic() > deadline:
                return script
            if fails(tried):
                script, shorter = tried, True
                break
        if not shorter:
            size //= 2
    return script
