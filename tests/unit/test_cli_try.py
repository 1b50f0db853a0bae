# SPDX-License-Identifier: Apache-2.0
"""`weir policy try`: flows judged as the specifications say, and what is told of those that change.

The clusters of `test_every_end_is_judged_as_the_specs_say` are random; the oracle reads the same
JSON.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support import spec_oracle
from support.spec_oracle import EGRESS, INGRESS

from weir.agent.judge import Flow
from weir.api.address import parse, text
from weir.cli import attempt, cluster, denials, forecast
from weir.cli.cluster import Objects
from weir.cli.errors import CliError
from weir.cli.main import parser
from weir.cli.source import Answer, Kubectl, Question, Show
from weir.operator.objects import Key

Json = dict[str, Any]
LISTS = {"namespaces": "Namespace", "nodes": "Node", "pods": "Pod",
         **{made.resource: kind for kind, made in cluster.POLICY_KINDS.items()}}  # fmt: skip
NUMBERS = {"TCP": 6, "UDP": 17}


class FakeKubectl:
    def __init__(self, *objects: Json) -> None:
        self.objects = objects

    def get(self, resource: str, *, optional: bool = False) -> str:
        assert optional is resource.startswith("clusternetworkpolicies")
        items = [thing for thing in self.objects if thing["kind"] == LISTS[resource]]
        return json.dumps({"kind": "List", "metadata": {"resourceVersion": ""}, "items": items})

    def default_namespace(self) -> str:
        return "shop"


def meta(name: str, namespace: str = "", **labels: str) -> Json:
    return {"name": name, "labels": labels} | ({"namespace": namespace} if namespace else {})


def namespace(name: str, **labels: str) -> Json:
    return {"kind": "Namespace", "metadata": meta(name, **labels)}


def node(name: str, ip: str, pod_cidr: str, **labels: str) -> Json:
    return {
        "kind": "Node",
        "metadata": meta(name, **labels),
        "spec": {"podCIDRs": [pod_cidr]},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
    }


def pod(
    where: str, name: str, on: str, *ips: str, ports: Sequence[Json] = (), **labels: str
) -> Json:
    return {
        "kind": "Pod",
        "metadata": {**meta(name, where, **labels), "uid": f"{where}-{name}"},
        "spec": {"nodeName": on, "containers": [{"name": "c", "ports": list(ports)}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip} for ip in ips]},
    }


def policy(where: str, name: str, **spec: Any) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": meta(name, where),
        "spec": spec,
    }


def cluster_policy(name: str, **spec: Any) -> Json:
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": meta(name),
        "spec": spec,
    }


# ---- against the oracle

BLOCKS = ["10.1.0.0/24", "10.0.0.0/8", "192.0.2.0/24", "0.0.0.0/0"]
PORTS: list[Json] = [
    {}, {"port": 80}, {"protocol": "UDP"}, {"port": "web"}, {"port": 80, "endPort": 90}
]  # fmt: skip
ADDRESSES = [
    *("10.1.0.1", "10.1.0.2", "10.2.0.1", "10.2.0.2"),
    *("10.1.0.77", "192.0.2.1", "192.0.2.2", "198.51.100.1"),
]


PROTOCOLS: list[Json] = [
    {"tcp": {"destinationPort": {"number": 80}}},
    {"tcp": {"destinationPort": {"range": {"start": 81, "end": 90}}}},
    {"udp": {"destinationPort": {"number": 80}}},
    {"destinationNamedPort": "web"},
]


def some_labels(rng: Random) -> dict[str, str]:
    return {k: rng.choice(v) for k, v in (("app", "ab"), ("tier", "xy")) if rng.random() < 0.8}


def some_selector(rng: Random) -> Json:
    return {"matchLabels": some_labels(rng)} if rng.random() < 0.7 else {}


def some_peer(rng: Random) -> Json:
    if rng.random() < 0.4:
        return {"ipBlock": {"cidr": rng.choice(BLOCKS)}}
    peer: Json = {"podSelector": some_selector(rng)}
    return peer | ({"namespaceSelector": some_selector(rng)} if rng.random() < 0.5 else {})


def some_rule(rng: Random, side: str) -> Json:
    rule: Json = {}
    if rng.random() < 0.8:
        rule[side] = [some_peer(rng) for _ in range(rng.randint(1, 2))]
    if rng.random() < 0.5:
        rule["ports"] = rng.sample(PORTS, rng.randint(1, 2))
    return rule


def some_cluster(rng: Random) -> list[Json]:
    made = [
        *(namespace(name, **some_labels(rng)) for name in ("blue", "red")),
        node("n1", "192.0.2.1", "10.1.0.0/24", **some_labels(rng)),
        node("n2", "192.0.2.2", "10.2.0.0/24", **some_labels(rng)),
    ]
    for i, ip in enumerate(ADDRESSES[:4]):
        ports = (
            [{"name": "web", "containerPort": rng.choice([80, 81])}] if rng.random() < 0.5 else []
        )
        on = "n1" if ip.startswith("10.1") else "n2"
        made.append(
            pod(rng.choice(["blue", "red"]), f"p{i}", on, ip, ports=ports, **some_labels(rng))
        )
    for i in range(rng.randint(1, 3)):
        spec: Json = {"podSelector": some_selector(rng)}
        for direction, side in (("ingress", "from"), ("egress", "to")):
            if rng.random() < 0.7:
                spec[direction] = [some_rule(rng, side) for _ in range(rng.randint(0, 2))]
        made.append(policy(rng.choice(["blue", "red"]), f"n{i}", **spec))
    return made + [some_cluster_policy(rng, f"c{i}") for i in range(rng.randint(0, 4))]


def some_cluster_peer(rng: Random, side: str) -> Json:
    kind = rng.random()
    if kind < 0.3:
        return {"namespaces": some_selector(rng)}
    if kind < 0.6 or side == "from":
        return {
            "pods": {"namespaceSelector": some_selector(rng), "podSelector": some_selector(rng)}
        }
    return {"networks": [rng.choice(BLOCKS)]} if kind < 0.8 else {"nodes": some_selector(rng)}


def some_cluster_policy(rng: Random, name: str) -> Json:
    spec: Json = {
        "tier": rng.choice(["Admin", "Baseline"]),
        "priority": rng.randint(0, 2),
        "subject": {"namespaces": some_selector(rng)},
    }
    for direction, side in (("ingress", "from"), ("egress", "to")):
        spec[direction] = [
            {
                "action": rng.choice(["Accept", "Deny", "Pass"]),
                side: [some_cluster_peer(rng, side) for _ in range(rng.randint(1, 2))],
                **({"protocols": [rng.choice(PROTOCOLS)]} if rng.random() < 0.5 else {}),
            }
            for _ in range(rng.randint(0, 2))
        ]
    return cluster_policy(name, **spec)


@settings(
    max_examples=80, deadline=None, phases=[Phase.generate], derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.integers(0, 2**32))
def test_every_end_is_judged_as_the_specs_say(seed: int) -> None:
    objects = some_cluster(Random(seed))
    spec = spec_oracle.Cluster()
    for thing in objects:
        spec.put(thing)
    told = forecast.Cluster(cluster.read_cluster(FakeKubectl(*objects)))  # type: ignore[arg-type]
    for source in ADDRESSES:
        for target in ADDRESSES:
            for protocol, port in (("TCP", 80), ("TCP", 81), ("UDP", 80)):
                flow = Flow(parse(source), parse(target), NUMBERS[protocol], port)
                for outcome in told.outcomes(flow):
                    side = EGRESS if outcome.direction == "egress" else INGRESS
                    wanted = spec.decision(side, source, target, protocol, port)
                    assert outcome.allowed == wanted.allowed, (seed, side, source, target, port)
                    if not wanted.allowed and wanted.by:
                        assert all(by.policy in outcome.because for by in wanted.by), outcome
                    if wanted.tier in (spec_oracle.ADMIN, spec_oracle.BASELINE):
                        [by] = wanted.by
                        rule = f"{outcome.direction} rule {by.rule} of {by.policy} "
                        assert outcome.because.startswith(rule), (seed, outcome, wanted)


# ---- the command

SHOP = (
    namespace("shop"),
    node("n1", "192.0.2.1", "10.1.0.0/24"),
    pod("shop", "cart", "n1", "10.1.0.1", "fd00:1::1", app="cart"),
    pod("shop", "db", "n1", "10.1.0.2", "fd00:1::2", app="db"),
)
ONLY_API = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "only-api"},
    "spec": {
        "podSelector": {"matchLabels": {"app": "db"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "api"}}}]}],
    },
}
OPEN = policy("shop", "open", podSelector={}, ingress=[{}])
SHUT = policy("shop", "shut", podSelector={"matchLabels": {"app": "db"}})


def flow(source: str, target: str, port: int = 5432, **fields: Any) -> Json:
    return {
        "protocol": "TCP",
        "source": {"address": source, "port": 40000, "pod": ""},
        "destination": {"address": target, "port": port, "pod": ""},
        "judged": True,
        **fields,
    }


class FakeSource:
    def __init__(self, flows: Sequence[Json] = (), denied: Sequence[Json] = ()) -> None:
        self.flows = list(flows)
        self.denied = list(denied)
        self.errors: dict[str, str] = {}

    def stream(self, question: Question, show: Show) -> dict[str, str]:
        assert question.words == ("ct", "list")
        for item in self.flows:
            show("n1", item)
        return dict(self.errors)

    def ask(self, question: Question) -> list[Answer]:
        assert question == denials.QUESTION
        return [Answer("n1", self.denied)]

    def follow(self, everything: bool, show: Show) -> None:
        raise AssertionError


V4 = flow("10.1.0.1", "10.1.0.2")
V6 = flow("fd00:1::1", "fd00:1::2")
VIP = flow("10.1.0.1", "10.96.0.1", judged=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "new.yaml"
    path.write_text(json.dumps(ONLY_API))
    return path


def attempted(source: FakeSource, *words: str, objects: Sequence[Json] = SHOP) -> int:
    arguments = parser().parse_args(["policy", "try", *words])
    return attempt.run(arguments, source, FakeKubectl(*objects))  # type: ignore[arg-type]


def test_newly_denied(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FakeSource([V4, V4, V6, VIP, flow("10.1.0.2", "10.1.0.1")])
    assert attempted(source, "-f", str(file)) == 2
    header, *rows, counts = capsys.readouterr().out.splitlines()
    assert header.split() == ["NEWLY", "FROM", "TO", "DIRECTION", "AS", "BEFORE"]
    assert [row.split()[:4] for row in rows] == [
        ["DENIED", "shop/cart", "shop/db:5432/TCP", "ingress"]
    ] * 2
    assert "shop/only-api isolates shop/db, and it has no rule that matches" in rows[0]
    assert rows[0].endswith("no policy selects shop/db for ingress")
    assert counts == "3 flows seen lately: 2 newly denied, 0 newly allowed, 1 as before"


def test_audit_mode(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    audited = {"kind": "Namespace", "metadata": {
        "name": "shop", "annotations": {"policy.weir.dev/audit": "true"}}}  # fmt: skip
    objects = (audited, *SHOP[1:])
    assert attempted(FakeSource([V4]), "-f", str(file), objects=objects) == 2
    assert capsys.readouterr().out.splitlines()[1].startswith("denied (audit)  shop/cart")
    attempted(FakeSource([V4]), "-f", str(file), "-o", "json", objects=objects)
    [changed] = json.loads(capsys.readouterr().out)["newly_denied"]
    assert changed["audited"] is True


def test_newly_allowed_by_a_deletion(capsys: pytest.CaptureFixture[str]) -> None:
    """What was denied is among the denials: conntrack has nothing of it."""
    now = time.time()
    long_ago = {**flow("10.1.0.1", "10.1.0.2", 1), "last_seen": now - 4000}
    source = FakeSource(denied=[{**V4, "last_seen": now}, long_ago])
    words = ("--delete", "netpol/shop/shut", "-o", "json")
    assert attempted(source, *words, objects=(*SHOP, SHUT)) == 2
    told = json.loads(capsys.readouterr().out)
    [changed] = told["newly_allowed"]
    assert changed["source"] == {"address": "10.1.0.1", "name": "shop/cart"}
    assert changed["destination"] == {"address": "10.1.0.2", "name": "shop/db", "port": 5432}
    assert (changed["because"], changed["seen"]) == ("no policy selects shop/db for ingress", 1)
    assert (told["flows"], told["newly_denied"], told["problems"]) == (1, [], [])


ADMIN = cluster_policy(
    "no-db", tier="Admin", priority=5, subject={"namespaces": {}},
    ingress=[{"action": "Deny", "from": [{"namespaces": {}}],
              "protocols": [{"tcp": {"destinationPort": {"number": 5432}}}]}],
)  # fmt: skip


def test_a_cluster_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "admin.yaml"
    path.write_text(json.dumps(ADMIN))
    source = FakeSource([V4, flow("10.1.0.1", "10.1.0.2", 80)])
    assert attempted(source, "-f", str(path), "-o", "json", objects=(*SHOP, OPEN)) == 2
    [changed] = json.loads(capsys.readouterr().out)["newly_denied"]
    assert changed["because"] == "ingress rule 0 of ClusterNetworkPolicy no-db denies it"
    assert changed["before"] == "ingress rule 0 of shop/open accepts it"
    words = ("--delete", "clusternetworkpolicy/no-db")
    assert attempted(source, *words, objects=(*SHOP, ADMIN)) == 2


def test_a_changed_policy_replaces_the_one_of_its_name(tmp_path: Path) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(json.dumps({**OPEN, "metadata": {"name": "shut", "namespace": "shop"}}))
    assert attempted(FakeSource([V4]), "-f", str(path), objects=(*SHOP, SHUT)) == 2


def test_nothing_changes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert attempted(FakeSource([V4]), "-f", str(file), objects=(*SHOP, OPEN)) == 0
    assert capsys.readouterr().out.strip() == (
        "1 flows seen lately: 0 newly denied, 0 newly allowed, 1 as before"
    )


def test_problems_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said with their field; the rest is shown as Weir would enforce it."""
    bad = {**ONLY_API, "spec": {**ONLY_API["spec"], "policyTypes": ["Sideways"]}}  # type: ignore[dict-item]
    path = tmp_path / "bad.yaml"
    path.write_text("---\n".join(json.dumps(d) + "\n" for d in (bad, {"kind": "Deployment"})))
    assert attempted(FakeSource([V4]), "-f", str(path)) == 1
    said = capsys.readouterr()
    assert "NetworkPolicy shop/only-api: spec.policyTypes[0]: unknown type 'Sideways'" in said.err
    assert "Deployment ? (None): no policy that Weir knows, left out" in said.err
    assert "1 newly denied" in said.out


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({**ONLY_API, "spec": {"podSelector": []}}, "object"),
        ({**ONLY_API, "metadata": {}}, "metadata.name"),
        (cluster_policy("x", tier="Sideways", priority=1, subject={}), "spec.tier"),
    ],
)
def test_what_is_no_policy_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], document: Json, field: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(document))
    assert attempted(FakeSource(), "-f", str(path)) == 1
    assert f"{field}: " in capsys.readouterr().err


def test_a_node_that_is_silent(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = FakeSource([V4])
    source.errors["n2"] = "container not found"
    assert attempted(source, "-f", str(file)) == 1
    said = capsys.readouterr()
    assert "n2: container not found: its flows are missing" in said.err
    assert "1 newly denied" in said.out


def test_a_list_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = json.dumps({"kind": "List", "items": [ONLY_API]})
    monkeypatch.setattr("sys.stdin", io.StringIO(listed))
    policies, troubles, others = cluster.read_files(["-"], "shop")
    assert list(policies) == [("NetworkPolicy", Key("shop", "only-api"))]
    assert (troubles, others) == ([], [])


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("-f", "/nowhere"),
        ("--delete", "netpol/shop/none"),
        ("--delete", "netpol/shut"),
        ("--delete", "pod/shop/cart"),
    ],
    ids=" ".join,
)
def test_bad_words(words: tuple[str, ...]) -> None:
    with pytest.raises(CliError):
        attempted(FakeSource(), *words)


def test_files_that_are_no_objects(tmp_path: Path) -> None:
    for content in ("{", "- 1", "just text"):
        path = tmp_path / "bad"
        path.write_text(content)
        with pytest.raises(CliError):
            cluster.read_files([str(path)], "shop")


def test_icmp_has_no_port() -> None:
    item = flow("10.1.0.1", "10.1.0.2", port=77, protocol="ICMP")
    seen, _ = attempt.flows(FakeSource([item, {**item, "protocol": "47"}]))
    assert {(f.protocol, f.port) for f in seen} == {(1, 0), (47, 77)}


KUBECTL = """#!/bin/sh
case "$*" in
*"get missing "*) echo "error: the server doesn't have a resource type \"missing\"" >&2; exit 1;;
*"get refused "*) echo "Error from server (Forbidden): no" >&2; exit 1;;
*"get pods --all-namespaces -o json") echo '{"metadata": {}, "items": []}';;
*"config view"*) echo "shop";;
esac
"""


def test_kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "kubectl"
    script.write_text(KUBECTL)
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    kubectl = Kubectl("kube-system", context="lab")
    assert kubectl.default_namespace() == "shop"
    for resource in ("pods", "missing"):
        assert json.loads(kubectl.get(resource, optional=True))["items"] == []
    with pytest.raises(CliError, match="resource type"):
        kubectl.get("missing")
    with pytest.raises(CliError, match="Forbidden"):
        kubectl.get("refused", optional=True)


def test_names() -> None:
    told = forecast.Cluster(cluster.read_cluster(FakeKubectl(*SHOP)))  # type: ignore[arg-type]
    found = [told.name(parse(ip)) for ip in ("10.1.0.1", "192.0.2.1", "198.51.100.1")]
    assert found == ["shop/cart", "node n1", text(parse("198.51.100.1"))]
    assert forecast.Cluster(Objects()).outcomes(Flow(parse("::1"), parse("::2"), 6, 1)) == ()
