# SPDX-License-Identifier: Apache-2.0
"""LoadBalancerPools: blocks as ranges, and what of them is not the pool's to give."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.load_balancers import Nobody, pool

from weir.api.address import parse, parse_cidr, text
from weir.operator.objects import Key, Node
from weir.operator.pools import (
    Cluster,
    Judged,
    Pool,
    WirePool,
    address,
    condition,
    judge,
    parse_pool,
    range_of,
)
from weir.operator.surroundings import Surroundings


def blocks(of: Pool) -> list[str]:
    return [f"{text(address(b.range.first))}-{text(address(b.range.last))}" for b in of.blocks]


@pytest.mark.parametrize(
    ("block", "skip", "expected"),
    [
        ("192.0.2.0/30", False, "192.0.2.0-192.0.2.3"),
        ("192.0.2.0/30", True, "192.0.2.1-192.0.2.2"),
        ("192.0.2.4/31", True, "192.0.2.4-192.0.2.5"),
        ("192.0.2.4/32", True, "192.0.2.4-192.0.2.4"),
        ("192.0.2.7/30", False, "192.0.2.4-192.0.2.7"),
        ("192.0.2.9-192.0.2.20", True, "192.0.2.9-192.0.2.20"),
        ("2001:db8::/126", False, "2001:db8::-2001:db8::3"),
        ("2001:db8::/126", True, "2001:db8::1-2001:db8::3"),
        ("2001:db8::5-2001:db8::5", False, "2001:db8::5-2001:db8::5"),
    ],
)
def test_block(block: str, skip: bool, expected: str) -> None:
    made = pool("a", block, skipNetworkAndBroadcast=skip)
    assert (blocks(made), made.problems) == ([expected], ())


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"cidr": "192.0.2.0/33"}, "not a CIDR"),
        ({"cidr": "pool"}, "not a CIDR"),
        ({"first": "192.0.2.1"}, "needs a cidr"),
        ({}, "needs a cidr"),
        ({"cidr": "192.0.2.0/24", "first": "192.0.2.1", "last": "192.0.2.2"}, "both"),
        ({"first": "192.0.2.9", "last": "192.0.2.1"}, "last is before first"),
        ({"first": "192.0.2.9", "last": "2001:db8::1"}, "one family"),
        ({"first": "192.0.2.9", "last": "192.0.2"}, "not an IP address"),
        ({"cidr": "::/0"}, "IPv4 addresses written as IPv6"),
        ({"cidr": "0.0.0.0/0"}, "0.0.0.0/8"),
        ({"cidr": "127.1.0.0/16"}, "127.0.0.0/8"),
        ({"cidr": "239.0.0.0/24"}, "224.0.0.0/3"),
        ({"cidr": "fe80::/64"}, "fe80::/10"),
        ({"cidr": "::1/128"}, "::/127"),
    ],
)
def test_bad_block_is_named_and_others_are_used(block: dict[str, str], why: str) -> None:
    raw = {"metadata": {"name": "a"}, "spec": {"blocks": [block, {"cidr": "192.0.2.0/24"}]}}
    made = parse_pool(msgspec.convert(raw, WirePool)).value
    assert made is not None
    assert blocks(made) == ["192.0.2.0-192.0.2.255"]
    (problem,) = made.problems
    assert problem.field == "spec.blocks[0]"
    assert why in problem.message


def test_selector_that_cannot_be_understood_selects_nobody() -> None:
    bad = {"matchExpressions": [{"key": "app", "operator": "Like", "values": ["x"]}]}
    made = pool("a", "192.0.2.0/24", serviceSelector=bad)
    assert not made.selects({"app": "x"}, {})
    assert "unknown operator" in made.problems[0].message


def test_selectors() -> None:
    made = pool(
        "a", "192.0.2.0/24",
        serviceSelector={"matchLabels": {"app": "x"}},
        namespaceSelector={"matchLabels": {"team": "y"}},
    )  # fmt: skip
    assert made.selects({"app": "x"}, {"team": "y"})
    assert not made.selects({"app": "z"}, {"team": "y"})
    assert not made.selects({"app": "x"}, {"team": "z"})
    assert not made.selects({"app": "x"}, None)
    assert pool("b", "192.0.2.0/24").selects({}, None)
    assert made.preference() < pool("A", "192.0.2.0/24").preference()


def judged(*pools: Pool, **cluster: Any) -> dict[str, Judged]:
    return {key.name: one for key, one in judge(pools, Cluster(**cluster)).items()}


def test_overlap_with_the_cluster() -> None:
    found = judged(
        pool("a", "10.0.0.0/28", "192.0.2.0/24", "10.96.0.0/16"),
        networks=(
            ("the pod CIDR of node n1", range_of(parse_cidr("10.0.0.0/24"))),
            ("the service CIDR 10.96.0.0/12", range_of(parse_cidr("10.96.0.0/12"))),
        ),
        hosts={parse("192.0.2.7"): "n1", parse("192.0.3.7"): "n2"},
    )["a"]
    assert blocks(found.pool) == ["192.0.2.0-192.0.2.255"]
    assert found.excluded == {parse("192.0.2.7")}
    pod, service, node = found.problems
    assert (pod.field, pod.reason) == ("spec.blocks[0]", "Overlap")
    assert "10.0.0.0/28 is not used: it overlaps the pod CIDR of node n1" in pod.message
    assert service.field == "spec.blocks[2]"
    assert "service CIDR" in service.message
    assert "192.0.2.7 (n1)" in node.message
    told = condition(found)
    assert (told.status, told.reason) == ("False", "Overlap")


def test_the_older_pool_keeps_what_two_have() -> None:
    young = pool("a", "192.0.2.0/25", "198.51.100.0/24", created=2)
    old = pool("b", "192.0.2.100-192.0.2.110")
    for order in ((young, old), (old, young)):
        found = judged(*order)
        assert blocks(found["b"].pool) == ["192.0.2.100-192.0.2.110"]
        assert blocks(found["a"].pool) == ["198.51.100.0-198.51.100.255"]
        assert found["b"].problems == ()
        (problem,) = found["a"].problems
        assert "overlaps LoadBalancerPool b, which was created first" in problem.message


def test_what_a_pool_says_twice_it_has_once() -> None:
    found = judged(pool("a", "192.0.2.4-192.0.2.6", "192.0.2.0/28", "192.0.2.5-192.0.2.20"))["a"]
    assert found.problems == ()
    numbers = [n for b in found.pool.blocks for n in range(b.range.first, b.range.last + 1)]
    assert sorted(numbers) == sorted(set(numbers))
    assert (text(address(min(numbers))), text(address(max(numbers)))) == ("192.0.2.0", "192.0.2.20")
    assert len(numbers) == 21
    assert condition(found).status == "True"


def test_every_replica_says_the_same_of_a_pool() -> None:
    """Whatever it heard of first: else two that write conditions overwrite each other's."""
    nodes = [
        Node(Key("", name), (parse("198.51.100.1"),), (parse_cidr(f"10.0.{i}.0/24"),))
        for i, name in enumerate(["n1", "n2"])
    ]
    cidrs = [
        (f"the Service CIDR {c}", range_of(parse_cidr(c))) for c in ("10.8.0.0/16", "10.9.0.0/16")
    ]
    said = []
    for step in (1, -1):
        around = Surroundings(Nobody())
        for node in nodes[::step]:
            around.changed("Node", node.key, None, node)
        pools = [pool("a", "10.0.0.0/23", "10.8.0.0/15", "198.51.100.0/30")]
        (judged,) = judge(pools, around.cluster(cidrs[::step])).values()
        said.append(condition(judged).message)
    assert said[0] == said[1]
    for owner in ("pod CIDR of node n1", "Service CIDR 10.8.0.0/16", "198.51.100.1 (n2)"):
        assert owner in said[0]
