# SPDX-License-Identifier: Apache-2.0
"""Pod CIDRs that overlap: the older node keeps them, whatever the order in which they come."""

from __future__ import annotations

import itertools

import msgspec
import pytest

from weir.api.address import parse_cidr
from weir.operator import resources
from weir.operator.model import Model
from weir.operator.objects import Key, Node, Problem, parse_node
from weir.operator.revisions import Revisions
from weir.operator.wire import Node as Raw


def node(name: str, created: int, *cidrs: str) -> Node:
    claims = tuple(parse_cidr(text) for text in cidrs)
    return Node(Key("", name), (), claims, created=f"2030-01-0{created}T00:00:00Z", uid=name)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_oldest_keeps_it_and_others_are_named(order: tuple[int, ...]) -> None:
    told: dict[str, tuple[Problem, ...]] = {}
    model = Model(
        Revisions("one"), 0.0, lambda: None, lambda n, problems: told.update({n.name: problems})
    )
    nodes = [
        node("a", 1, "10.0.0.0/24", "fd00::/64"),
        node("b", 2, "10.0.0.0/16", "fd01::/64"),
        node("c", 3, "10.0.1.0/24"),
    ]
    for i in order:
        model.claims.node(nodes[i].key, nodes[i])
    model.claims.settle()
    assert [c.text() for c in model.compiler.nodes.known["a"].pod_cidrs] == [
        "10.0.0.0/24",
        "fd00::/64",
    ]
    assert [c.text() for c in model.compiler.nodes.known["b"].pod_cidrs] == ["fd01::/64"]
    assert model.compiler.nodes.known["c"].pod_cidrs == ()
    assert {key.name for _, key in model.claims.told} == {"b", "c"}
    (problem,) = told["b"]
    assert "10.0.0.0/16 of node b overlaps a pod CIDR of node a" in problem.message

    model.claims.node(nodes[1].key, None)
    model.claims.settle()
    assert [c.text() for c in model.compiler.nodes.known["c"].pod_cidrs] == ["10.0.1.0/24"]
    assert not model.claims.told
    assert told["c"] == ()


@pytest.mark.parametrize(
    ("raw", "leaving"),
    [
        pytest.param({}, False, id="stays"),
        pytest.param(
            {"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}}, False, id="x"
        ),
        pytest.param(
            {"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}, True, id="taint"
        ),
        pytest.param(
            {"metadata": {"name": "a", "deletionTimestamp": "2030-01-01T00:00:00Z"}},
            True,
            id="deleted",
        ),
    ],
)
def test_a_node_that_leaves_is_told_its_agent(raw: dict[str, object], leaving: bool) -> None:
    """As kube-proxy's /healthz has it, by which clouds take a node out of their load balancers."""
    decoded = msgspec.json.decode(msgspec.json.encode({"metadata": {"name": "a"}} | raw), type=Raw)
    parsed = parse_node(decoded).value
    change = resources.node(parsed.key, parsed)
    assert parsed.leaving is leaving
    assert change.resource is not None
    assert change.resource.node.leaving is leaving
