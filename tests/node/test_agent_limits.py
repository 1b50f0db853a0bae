# SPDX-License-Identifier: Apache-2.0
"""Full maps with the real agent: who is left out is named, and less gets through, never more."""

from __future__ import annotations

import http.client
import re

import pytest
from support.agents import AgentNode, service_resources
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.traffic import Echo, connects, deny_all, eventually

from weir.api.v1 import weir_pb2 as pb

SAMPLE = re.compile(
    r'(?P<name>[a-z_][a-z0-9_]*)(?:\{(?P<labels>[a-z_]+="[^"\\]*"(?:,[a-z_]+="[^"\\]*")*)\})? '
    r"(?P<value>-?[0-9.]+(?:e[+-]?[0-9]+)?)"
)
COMMENT = re.compile(r"# (HELP|TYPE) (?P<name>[a-z_][a-z0-9_]*) (?P<text>.+)")


def scrape(agent: AgentNode) -> dict[tuple[str, frozenset[str]], float]:
    """Samples by name and labels. Every line must be Prometheus' text format, and each sample's
    family described before it."""
    with agent.node.entered():
        connection = http.client.HTTPConnection("127.0.0.1", 9880, timeout=10)
        connection.request("GET", "/metrics")
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
    assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert text.endswith("\n")
    described: dict[str, set[str]] = {}
    found: dict[tuple[str, frozenset[str]], float] = {}
    for line in text.splitlines():
        if comment := COMMENT.fullmatch(line):
            described.setdefault(comment["name"], set()).add(comment[1])
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert described.get(sample["name"]) == {"HELP", "TYPE"}, line
        key = (sample["name"], frozenset(filter(None, (sample["labels"] or "").split(","))))
        assert key not in found, line
        found[key] = float(sample["value"])
    return found


def label(**values: str) -> frozenset[str]:
    return frozenset(f'{name}="{value}"' for name, value in values.items())


def test_metrics_tell_drops_and_map_fill(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ac"}
    operator.wait_acknowledged(operator.set(deny_all("nobody", 1)))
    before = scrape(agent)
    dropped = ("weir_packets_total", label(reason="policy_ingress", direction="ingress"))
    assert not connects(pods["c"], addresses["a"][0], 80)
    connects(pods["a"], addresses["c"][0], 80)  # refused, by the pod: forwarded
    # On a busy machine a packet may wait for its CPU longer than the connection did.
    assert eventually(lambda: scrape(agent).get(dropped, 0) > before.get(dropped, 0)), agent.log
    after = scrape(agent)
    assert after["weir_bytes_total", dropped[1]] >= 40 * after[dropped]
    assert ("weir_packets_total", label(reason="none", direction="egress")) in after
    assert after["weir_map_rows", label(map="endpoints")] == 4
    assert after["weir_map_capacity", label(map="policy")] == 65536
    assert after["weir_endpoints", frozenset()] == 2
    assert after["weir_ready", frozenset()] == 1
    assert after["weir_operator_connected", frozenset()] == 1


def rejected(agent: AgentNode, table: str) -> list[str]:
    found: dict[str, list[str]] = agent.ask("status")["rejected"]
    return found.get(table, [])


def test_a_full_backends_map_leaves_out_a_service_by_name(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.config["maps"] |= {"backends": 16}  # type: ignore[operator]  # a dict, made in support
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ab"}
    small = service_resources("small", ["10.96.0.10"], 80, {addresses["b"][0]: 8080})
    operator.wait_acknowledged(operator.set(*small))
    many = {f"10.244.2.{n}": 8080 for n in range(1, 101)}
    operator.wait_acknowledged(operator.set(*service_resources("big", ["10.96.0.11"], 80, many)))
    assert rejected(agent, "backends") == ["service ns/big"], agent.log
    assert "no room in backends for service ns/big" in agent.log
    assert scrape(agent)["weir_map_rejected_rows", label(map="backends")] >= 80
    echo = Echo(pods["b"], 8080)
    try:
        assert connects(pods["a"], "10.96.0.10", 80, 5), agent.log
        gone = ("service/ns/big", *(f"slice/ns/big-{n}" for n in range(100)))
        operator.wait_acknowledged(operator.set(gone=gone))
        assert eventually(lambda: not agent.ask("status")["rejected"]), agent.log
        assert connects(pods["a"], "10.96.0.10", 80, 5), agent.log
    finally:
        echo.close()


def test_a_full_policy_map_denies(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.config["maps"] |= {"policy": 64}  # type: ignore[operator]  # a dict, made in support
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "abc"}
    wide = deny_all("wide", 2, 1)
    # Odd ports cannot be joined to prefixes: a row each.
    wide.policy.rules[0].ports.extend(
        pb.PortRange(protocol=6, first=port, last=port) for port in range(1001, 1401, 2)
    )
    operator.wait_acknowledged(operator.set(wide))
    assert rejected(agent, "policy") == ["policy ns/wide"], agent.log
    assert "no room in policy for policy ns/wide" in agent.log
    assert scrape(agent)["weir_map_rejected_rows", label(map="policy")] >= 100
    echo = Echo(pods["b"], 80)
    try:
        for name in "ac":
            assert not connects(pods[name], addresses["b"][0], 80), agent.log
        operator.wait_acknowledged(operator.set(gone=("policy/ns/wide",)))
        assert eventually(lambda: not agent.ask("status")["rejected"]), agent.log
        assert connects(pods["c"], addresses["b"][0], 80, 5), agent.log
    finally:
        echo.close()


def test_a_full_endpoints_map_refuses_the_pod(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.config["maps"] |= {"endpoints": 2}  # type: ignore[operator]  # a dict, made in support
    agent.start()
    addresses = agent.add(pods["a"], "a")
    with pytest.raises(AssertionError, match="no room in the datapath's maps"):
        agent.add(pods["b"], "b")
    assert "no room in endpoints for pod ns/b: it fails closed" in agent.log
    assert "eth0" not in pods["b"].run("ip", "link")
    echo = Echo(pods["a"], 80)
    try:
        for address in addresses:
            assert connects(agent.node, address, 80, 5), agent.log
    finally:
        echo.close()
    agent.cni("DEL", pods["a"], "a")
    assert agent.add(pods["b"], "b")
