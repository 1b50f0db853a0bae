# SPDX-License-Identifier: Apache-2.0
"""The compiler against a naive reading of the spec, over random clusters and changes."""

from __future__ import annotations

import ipaddress
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from support.operator_state import State, View, key
from unit.operator.oracle import Cluster

Json = dict[str, Any]
Action = tuple[str, str, str, Any]

NAMESPACES = ["blue", "green", "red"]
NAMES = ["p0", "p1", "p2", "p3", "p4"]
POLICIES = ["n0", "n1", "n2"]
V4 = [f"10.0.0.{i}" for i in (1, 2, 3, 129, 130)] + ["10.0.1.1"]
V6 = ["fd00::1", "fd00::2", "fd00:1::1"]
OUTSIDE = ["10.0.0.99", "192.0.2.1", "192.0.2.200", "2001:db8::1", "fd00::99"]
BLOCKS: list[tuple[str, list[str]]] = [
    ("0.0.0.0/0", []),
    ("0.0.0.0/0", ["10.0.0.0/8"]),
    ("::/0", []),
    ("::/0", ["fd00::/16"]),
    ("10.0.0.0/24", ["10.0.0.128/25"]),
    ("10.0.0.0/24", ["10.0.0.1/32", "10.0.0.0/30"]),
    ("10.0.0.128/25", ["10.0.0.129/32"]),
    ("10.0.0.0/8", []),
    ("192.0.2.0/24", ["192.0.2.128/25"]),
    ("fd00::/16", ["fd00::2/128"]),
]
PORTS = [("TCP", 80), ("TCP", 81), ("TCP", 8080), ("UDP", 80)]

label_sets = st.fixed_dictionaries(
    {}, optional={"app": st.sampled_from("abc"), "tier": st.sampled_from("xy")}
)


@st.composite
def selectors(draw: st.DrawFn) -> Json:
    made: Json = {}
    if draw(st.booleans()):
        made["matchLabels"] = draw(label_sets)
    if draw(st.booleans()):
        expressions = []
        for _ in range(draw(st.integers(1, 2))):
            operator = draw(st.sampled_from(["In", "NotIn", "Exists", "DoesNotExist"]))
            expression: Json = {"key": draw(st.sampled_from(["app", "tier"])), "operator": operator}
            if operator in ("In", "NotIn"):
                values = st.lists(st.sampled_from("abcxy"), min_size=1, max_size=3)
                expression["values"] = draw(values)
            expressions.append(expression)
        made["matchExpressions"] = expressions
    return made


@st.composite
def peers(draw: st.DrawFn) -> Json:
    match draw(st.sampled_from(["block", "pods", "namespaces", "both"])):
        case "block":
            cidr, holes = draw(st.sampled_from(BLOCKS))
            return {"ipBlock": {"cidr": cidr, **({"except": holes} if holes else {})}}
        case "pods":
            return {"podSelector": draw(selectors())}
        case "namespaces":
            return {"namespaceSelector": draw(selectors())}
        case _:
            return {"podSelector": draw(selectors()), "namespaceSelector": draw(selectors())}


ports = st.sampled_from(
    [
        {},
        {"protocol": "UDP"},
        {"port": 80},
        {"port": 80, "endPort": 81, "protocol": "TCP"},
        {"port": "web"},
        {"port": "web", "protocol": "UDP"},
        {"port": "api"},
    ]
)


@st.composite
def rules(draw: st.DrawFn, side: str) -> Json:
    rule: Json = {}
    if draw(st.booleans()):
        rule[side] = draw(st.lists(peers(), max_size=2))
    if draw(st.booleans()):
        rule["ports"] = draw(st.lists(ports, max_size=2))
    return rule


@st.composite
def policies(draw: st.DrawFn) -> Json:
    spec: Json = {"podSelector": draw(selectors())}
    if draw(st.booleans()):
        spec["ingress"] = draw(st.lists(rules("from"), max_size=2))
    if draw(st.booleans()):
        spec["egress"] = draw(st.lists(rules("to"), max_size=2))
    if draw(st.booleans()):
        types = [["Ingress"], ["Egress"], ["Ingress", "Egress"]]
        spec["policyTypes"] = draw(st.sampled_from(types))
    return spec


container_ports = st.lists(
    st.sampled_from(
        [
            {"name": "web", "containerPort": 80},
            {"name": "web", "containerPort": 8080},
            {"name": "web", "containerPort": 80, "protocol": "UDP"},
            {"name": "api", "containerPort": 81},
            {"containerPort": 80},
        ]
    ),
    max_size=3,
)

pod_actions = st.tuples(
    st.just("pod"),
    st.sampled_from(NAMESPACES[:2]),
    st.sampled_from(NAMES),
    st.fixed_dictionaries(
        {
            "labels": label_sets,
            "ports": container_ports,
            "v4": st.sampled_from(V4),
            "v6": st.sampled_from([*V6, ""]),
            "phase": st.just("Running"),
            "host": st.just(False),
            "node": st.just("n"),
            "uid": st.just("a"),
        }
    ),
)
policy_actions = st.tuples(
    st.just("policy"), st.sampled_from(NAMESPACES[:2]), st.sampled_from(POLICIES), policies()
)
actions = st.one_of(
    pod_actions,
    policy_actions,
    st.tuples(st.just("namespace"), st.sampled_from(NAMESPACES), st.just(""), label_sets),
    st.tuples(st.just("no namespace"), st.sampled_from(NAMESPACES), st.just(""), st.none()),
    st.tuples(
        st.just("pod"),
        st.sampled_from(NAMESPACES),
        st.sampled_from(NAMES),
        st.fixed_dictionaries(
            {
                "labels": label_sets,
                "ports": container_ports,
                "v4": st.sampled_from([*V4, ""]),
                "v6": st.sampled_from([*V6, ""]),
                "phase": st.sampled_from(["Running"] * 6 + ["Succeeded", "Pending"]),
                "host": st.sampled_from([False] * 6 + [True]),
                "node": st.sampled_from(["n"] * 6 + [""]),
                "uid": st.sampled_from(["a", "a", "b"]),
            }
        ),
    ),
    st.tuples(st.just("no pod"), st.sampled_from(NAMESPACES), st.sampled_from(NAMES), st.none()),
    st.tuples(
        st.just("policy"), st.sampled_from(NAMESPACES), st.sampled_from(POLICIES), policies()
    ),
    st.tuples(
        st.just("no policy"), st.sampled_from(NAMESPACES), st.sampled_from(POLICIES), st.none()
    ),
    st.tuples(st.just("flush"), st.just(""), st.just(""), st.none()),
)


def change(cluster: Cluster, action: Action) -> None:
    what, namespace, name, value = action
    meta = {"namespace": namespace, "name": name}
    match what:
        case "namespace":
            cluster.namespaces[namespace] = {"metadata": {"name": namespace, "labels": value}}
        case "no namespace":
            cluster.namespaces.pop(namespace, None)
        case "pod":
            # Addresses are nobody's twice: who keeps a contested one is another test's matter.
            taken = {
                entry["ip"]
                for at, pod in cluster.pods.items()
                if at != (namespace, name)
                for entry in pod["status"]["podIPs"]
            }
            ips = [{"ip": ip} for ip in (value["v4"], value["v6"]) if ip and ip not in taken]
            cluster.pods[namespace, name] = {
                "metadata": {
                    **meta,
                    "uid": f"{namespace}-{name}-{value['uid']}",
                    "labels": value["labels"],
                },
                "spec": {
                    "nodeName": value["node"],
                    "hostNetwork": value["host"],
                    "containers": [{"ports": value["ports"]}],
                },
                "status": {"phase": value["phase"], "podIPs": ips},
            }
        case "no pod":
            cluster.pods.pop((namespace, name), None)
        case "policy":
            cluster.policies[namespace, name] = {"metadata": meta, "spec": value}
        case "no policy":
            cluster.policies.pop((namespace, name), None)


def apply(state: State, cluster: Cluster, action: Action) -> None:
    """Bring the compiler to what the cluster holds, for the object of one action."""
    what, namespace, name, _ = action
    if what.endswith("namespace"):
        state.set("Namespace", key("", namespace), cluster.namespaces.get(namespace))
    elif what.endswith("pod"):
        state.set("Pod", key(namespace, name), cluster.pods.get((namespace, name)))
    elif what.endswith("policy"):
        state.set("NetworkPolicy", key(namespace, name), cluster.policies.get((namespace, name)))
    else:
        state.flush()


def from_scratch(cluster: Cluster) -> View:
    state = State()
    for (namespace, name), pod in cluster.pods.items():
        state.set("Pod", key(namespace, name), pod)
    for (namespace, name), policy in cluster.policies.items():
        state.set("NetworkPolicy", key(namespace, name), policy)
    for name, namespace_object in cluster.namespaces.items():
        state.set("Namespace", key("", name), namespace_object)
    state.flush()
    return state.view


def all_pairs_agree(cluster: Cluster, view: View) -> None:
    addresses = V4 + V6 + OUTSIDE
    for source in addresses:
        for target in addresses:
            if ipaddress.ip_address(source).version != ipaddress.ip_address(target).version:
                continue
            for protocol, port in PORTS:
                wanted = cluster.allows(source, target, protocol, port)
                got = view.allows(source, target, protocol, port)
                assert got == wanted, (source, target, protocol, port)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(pod_actions, min_size=5, max_size=8),
    st.lists(policy_actions, min_size=2, max_size=5),
    st.booleans(),
    st.lists(actions, max_size=12),
)
def test_resources_join_to_what_the_spec_says(
    pods: list[Action], some_policies: list[Action], pods_first: bool, script: list[Action]
) -> None:
    cluster, state = Cluster(), State()
    for name in NAMESPACES[:2]:
        first = ("namespace", name, "", {"app": "a"})
        change(cluster, first)
        apply(state, cluster, first)
    start = [*pods, *some_policies] if pods_first else [*some_policies, *pods]
    for action in [*start, ("flush", "", "", None), *script]:
        change(cluster, action)
        apply(state, cluster, action)
    state.flush()
    all_pairs_agree(cluster, state.view)
    assert state.view.meaning() == from_scratch(cluster).meaning()
    state.view.check_classes()
