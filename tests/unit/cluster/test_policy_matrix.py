# SPDX-License-Identifier: Apache-2.0
"""The live matrix's pure parts: its table, its targets, and how a difference reads."""

from __future__ import annotations

from typing import cast

import pytest
from support.spec_oracle import Cluster

from e2e.suite import cluster_policy_rows, policy_rows
from e2e.suite.api import Api
from e2e.suite.arena import PODS, SPACES, WEB, Arena, key, matrix_pod
from e2e.suite.kubectl import Manifest
from e2e.suite.probe_matrix import ANSWER, TIMEOUT
from e2e.suite.probes import Probe
from e2e.suite.world import namespace

NODES = {"node1": "172.30.0.11", "node2": "172.30.0.12"}


@pytest.fixture(autouse=True)
def _ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [{"spec": {"podCIDRs": [f"10.244.{n}.0/24"]}} for n in (1, 2)]
    monkeypatch.setattr(policy_rows, "get", lambda _: {"items": items})


@pytest.fixture
def pods() -> Arena:
    oracle = Cluster()
    probes = {}
    for number, (node, address) in enumerate(NODES.items(), 1):
        oracle.put({
            "kind": "Node",
            "metadata": {"name": node, "labels": {"kubernetes.io/hostname": node}},
            "spec": {"podCIDRs": [f"10.244.{number}.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]},
        })  # fmt: skip
        probes[f"host-{number}"] = Probe("s", f"host-{number}", node, (address,))
    for space, labels in SPACES.items():
        oracle.put(namespace(space, **labels))
        for name in PODS:
            node = "node2" if name == "b" else "node1"
            address = f"10.244.{node[-1]}.{len(probes) + 10}"
            made = matrix_pod(space, name, node, "image", WEB[name], PODS[name])
            oracle.put(made | {"status": {"podIPs": [{"ip": address}]}})
            probes[f"{space}/{name}"] = Probe(space, name, node, (address,))
    api = cast("Api", None)
    return Arena("run", api, probes, {}, {s: s for s in SPACES}, (4,), oracle)


def put(pods: Arena, row: policy_rows.Row) -> list[Manifest]:
    made = row.make(pods)
    for policy in made:
        pods.oracle.put(policy)
    pods.policies = made
    return made


def test_the_table_is_large_and_its_rows_have_names_of_their_own() -> None:
    ids = [row.id for row in (*policy_rows.ROWS, *cluster_policy_rows.ROWS)]
    assert len(policy_rows.ROWS) >= 200
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("table", [policy_rows.ROWS, cluster_policy_rows.ROWS])
def test_the_policies_of_a_row_have_names_of_their_own(
    pods: Arena, table: list[policy_rows.Row]
) -> None:
    del pods.probes["host-2"]  # as on a cluster of one node
    for row in table:
        made = row.make(pods)
        assert len({key(policy) for policy in made}) == len(made), row.id
        assert {p["metadata"].get("namespace", "x") for p in made} <= set(SPACES), row.id


def test_a_difference_reads_as_a_matrix(pods: Arena) -> None:
    row = next(r for r in policy_rows.ROWS if r.id == "ingress-namespaces-label-and-expression")
    put(pods, row)  # only y comes into x
    expected = pods.expected()
    a, b = pods.address("x/a", 4), pods.address("x/b", 4)
    assert expected["y/c", a, "udp", 8090] == ANSWER
    assert expected["z/c", a, "udp", 8090] == TIMEOUT
    assert expected["host-1", a, "tcp", 8080] == ANSWER  # its node
    assert expected["host-2", a, "tcp", 8080] == TIMEOUT
    wrong = {("y/c", a, "udp", 8090): TIMEOUT, ("z/c", b, "udp", 8090): ANSWER}
    text = pods.explain(expected, wrong)
    assert "2 of 484 differ" in text  # 11 clients, 11 servers, two protocols, two ports
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}
    assert lines["y/c"][:2] == ["-", "o"]
    assert lines["z/c"][:2] == [".", "X"]
    assert '"matchLabels": {"team": "red"}' in text
