# SPDX-License-Identifier: Apache-2.0
"""Objects of any content and size: every parser survives, and the cost stays in proportion."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from support.operator_state import READERS

from weir.api.address import V4_PREFIX, Addr, Cidr
from weir.operator.objects import Parsed
from weir.operator.prefixes import PrefixTree, SortedInts
from weir.operator.selectors import IpBlock

# Names that the parsers know, so that what is made is odd in interesting places.
NAMES = [
    *("metadata", "name", "namespace", "uid", "labels", "spec", "status", "type", "ports", "port"),
    *("clusterIP", "clusterIPs", "protocol", "endpoints", "addresses", "conditions", "ready"),
    *("podCIDR", "podCIDRs", "address", "podIPs", "ip", "phase", "nodeName", "containers"),
    *("containerPort", "podSelector", "matchLabels", "matchExpressions", "key", "operator"),
    *("values", "ingress", "egress", "from", "to", "ipBlock", "cidr", "except", "endPort"),
    *("policyTypes", "namespaceSelector", "kubernetes.io/service-name", "addressType"),
    *("nodePort", "externalIPs", "loadBalancer", "ingress", "ipMode", "hostPort", "hostIP"),
    *("loadBalancerSourceRanges", "sessionAffinity", "sessionAffinityConfig", "clientIP"),
    *("timeoutSeconds", "externalTrafficPolicy", "internalTrafficPolicy", "healthCheckNodePort"),
    *("hints", "forZones", "forNodes", "initContainers", "restartPolicy"),
    *("tier", "priority", "subject", "namespaces", "pods", "nodes", "networks", "action"),
    *("protocols", "tcp", "udp", "destinationPort", "number", "range", "start", "end"),
    *("destinationNamedPort", "annotations", "policy.weir.dev/audit", "generation"),
]
TEXTS = ["TCP", "10.0.0.1", "10.0.0.0/8", "::/0", "fd00::1%eth0", "None", "In", "Ingress", "", "\0"]
TEXTS += ["Admin", "Baseline", "Accept", "Deny", "Pass", "true"]
TEXTS += ["LoadBalancer", "ClientIP", "Local", "VIP", "Always", "::ffff:10.0.0.1", "::/1", "-1"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(TEXTS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=25,
)  # fmt: skip


@pytest.mark.parametrize("kind", list(READERS))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=VALUES, meta=VALUES, status=VALUES, rest=VALUES)
def test_parsers_survive_anything(kind: str, spec: Any, meta: Any, status: Any, rest: Any) -> None:
    named = {"name": "x", "namespace": "ns", "uid": "u"}
    metas = {**named, **meta} if isinstance(meta, dict) else named
    body = {"metadata": metas, "spec": spec, "status": status, "endpoints": rest, "ports": rest}
    try:
        result = READERS[kind](msgspec.Raw(msgspec.json.encode(body)))
    except msgspec.DecodeError:
        return
    assert isinstance(result, Parsed)


@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 40), st.integers(0, 40), st.booleans()),
        max_size=300,
    )
)
def test_sorted_ints_are_a_set(steps: list[tuple[bool, int, int, bool]]) -> None:
    ints, model = SortedInts(), set[int]()
    for add, value, other, ask in steps:
        (ints.add if add else ints.discard)(value)
        (model.add if add else model.discard)(value)
        low, high = min(value, other), max(value, other)
        if ask:
            assert ints.between(low, high) == sorted(v for v in model if low <= v <= high)


def v4(number: int, bits: int = 32) -> Cidr:
    return Cidr(Addr(V4_PREFIX + number.to_bytes(4, "big")), 96 + bits)


def test_a_block_with_thousands_of_excepts() -> None:
    """A policy may have 1.5 MB. Each except against each other one would take minutes."""
    tree = PrefixTree()
    holes = tuple(v4(0x0A000000 + 2 * i) for i in range(20_000))
    wide = v4(0x0A000000, 24)  # in which 128 of the others lie
    tree.add(1, IpBlock(v4(0, 0), tuple(sorted((*holes, wide)))))
    inside = {prefix.cidr for prefix in tree if 1 in prefix.blocks}
    assert inside == {v4(0, 0)}
    tree.remove(1, IpBlock(v4(0, 0), tuple(sorted((*holes, wide)))))
    assert not list(tree)


def test_thousands_of_blocks_come_and_go() -> None:
    tree = PrefixTree()
    blocks = [IpBlock(v4(0x0A000000 + (i * 7919) % 65536)) for i in range(20_000)]
    for number, block in enumerate(blocks):
        tree.add(number, block)
    assert sum(len(prefix.blocks) for prefix in tree) == len(blocks)
    for number, block in enumerate(blocks):
        tree.remove(number, block)
    assert not list(tree)
