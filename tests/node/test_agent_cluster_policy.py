# SPDX-License-Identifier: Apache-2.0
"""ClusterNetworkPolicies, audit mode and what is remembered of both: the real agent, real packets.

pod a ── veth ─┐
pod b ── veth ─┤ node namespace: agent ── eth0
               └ scripted operator on 127.0.0.1
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator

import pytest
from support.agents import (
    AgentNode,
    UnixConnection,
    class_resource,
    pod_resource,
    selector_resource,
)
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.traffic import Echo, connects, deny_all, eventually

from weir.api.address import parse
from weir.api.v1 import weir_pb2 as pb
from weir.datapath import libbpf, pins
from weir.datapath.records import DenialFlag, Direction, DropReason

A, B, NODE = 1, 2, 3  # selectors of pods and of the node
NODE_ADDRESSES = ["192.0.2.1", "2001:db8::1"]


def cluster_policy(*rules: pb.Rule, tier: pb.Tier.ValueType = pb.TIER_ADMIN) -> pb.Resource:
    """About pods a and their egress."""
    policy = pb.Policy(name="guard", subject=A, egress=True, rules=rules, tier=tier, priority=5)
    return pb.Resource(name="cluster-policy/guard", policy=policy)


def rule(index: int, action: pb.Action.ValueType, *peers: int) -> pb.Rule:
    return pb.Rule(egress=True, index=index, action=action, peers=peers, any_peer=not peers)


def own_node(operator: ScriptedOperator) -> list[pb.Resource]:
    """The node, in a class that a selector of nodes selects."""
    node = pb.Resource.FromString(operator.resources["node/node1"])
    setattr(node.node, "class", 9)
    return [node, class_resource(9, NODE), selector_resource(NODE, "nodes zone in (a)")]


def denials(agent: AgentNode) -> Iterator[tuple[bytes, bytes, int, int, int, int, int]]:
    """Source, destination, port, direction, packets, reason, flags."""
    with pins.opened(agent.pins / "maps" / "denials") as fd:
        chunks = list(libbpf.walk(fd, 36, 24, 64))
    for keys, values in chunks:
        for at in range(len(keys) // 36):
            source, target, port, _, direction = struct.unpack_from(">16s16sHBB", keys, at * 36)
            _, packets, _, _, reason, flags = struct.unpack_from("<6I", values, at * 24)
            yield source, target, port, direction, packets, reason, flags


@pytest.fixture
def echoes(agent: AgentNode, pods: dict[str, NetNs]) -> Iterator[dict[str, list[str]]]:
    """Addresses by pod, and "node": all listen on port 80."""
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "abc"} | {"node": NODE_ADDRESSES}
    made = [Echo(pods["b"], 80), Echo(agent.node, 80)]
    yield addresses
    for echo in made:
        echo.close()


def test_rules_decide_by_order_and_reach_the_node(
    agent: AgentNode,
    operator: ScriptedOperator,
    pods: dict[str, NetNs],
    echoes: dict[str, list[str]],
) -> None:
    for address in (*echoes["b"], *echoes["node"]):
        assert connects(pods["a"], address, 80, 5), agent.log
    policy = cluster_policy(rule(0, pb.ACTION_ACCEPT, B), rule(1, pb.ACTION_DENY))
    operator.wait_acknowledged(operator.set(policy, *own_node(operator)))
    for address in echoes["b"]:
        assert connects(pods["a"], address, 80, 5), agent.log
    for address in echoes["node"]:
        assert not connects(pods["a"], address, 80), agent.log
        assert connects(pods["b"], address, 80, 5), "b is no subject"
    # By the labels of the node alone, with a NetworkPolicy that isolates beside it.
    policy = cluster_policy(rule(0, pb.ACTION_DENY, NODE))
    isolates = pb.Policy(namespace="ns", name="shut", subject=A, egress=True)
    shut = pb.Resource(name="policy/ns/shut", policy=isolates)
    operator.wait_acknowledged(operator.set(policy, shut))
    for address in (*echoes["b"], *echoes["node"]):
        assert not connects(pods["a"], address, 80), agent.log
    operator.wait_acknowledged(operator.set(cluster_policy(rule(0, pb.ACTION_PASS, NODE))))
    for address in echoes["node"]:
        assert connects(pods["a"], address, 80, 5), "NetworkPolicies never forbid that"
    (shown,) = (view for view in agent.ask("policies") if view["tier"])
    assert (shown["policy"], shown["tier"]) == ("ClusterNetworkPolicy guard", "admin")
    assert shown["pods"] == ["ns/a"]


def test_a_rule_that_denies_is_named_and_remembered(
    agent: AgentNode,
    operator: ScriptedOperator,
    pods: dict[str, NetNs],
    echoes: dict[str, list[str]],
) -> None:
    policy = cluster_policy(rule(4, pb.ACTION_DENY, B), tier=pb.TIER_BASELINE)
    operator.wait_acknowledged(operator.set(policy))
    connection = UnixConnection(agent.folder / "run" / "agent.sock")
    connection.request("GET", "/v1/events")
    response = connection.getresponse()
    assert response.readline() == b"{}\n"
    for address in echoes["b"]:
        assert not connects(pods["a"], address, 80), agent.log
    event = {}
    while not event:
        event = json.loads(response.readline())
    connection.close()
    assert (event["verdict"], event["reason"]) == ("drop", "policy-egress")
    assert event["policies"] == ["ClusterNetworkPolicy guard"]
    assert event["rule"] == "egress rule 4 of ClusterNetworkPolicy guard"
    found = {
        (source, target): (port, direction, reason, flags)
        for source, target, port, direction, packets, reason, flags in denials(agent)
        if packets
    }
    ends = zip(map(parse, echoes["a"]), map(parse, echoes["b"]), strict=True)
    assert found == dict.fromkeys(ends, (80, Direction.EGRESS, DropReason.POLICY_EGRESS, 0))


def test_audit_of_a_pod_and_of_the_whole_node(
    agent: AgentNode,
    operator: ScriptedOperator,
    pods: dict[str, NetNs],
    echoes: dict[str, list[str]],
) -> None:
    audited = pod_resource("b", B)
    audited.pod.audit = True
    operator.wait_acknowledged(operator.set(deny_all("only-a", B, A), audited))
    connection = UnixConnection(agent.folder / "run" / "agent.sock")
    connection.request("GET", "/v1/events")
    response = connection.getresponse()
    assert response.readline() == b"{}\n"
    for address in echoes["b"]:
        assert connects(pods["c"], address, 80, 5), agent.log
    event = {}
    while not event:
        event = json.loads(response.readline())
    connection.close()
    assert (event["verdict"], event["reason"]) == ("audit", "policy-ingress")
    assert event["policies"] == ["ns/only-a"]
    assert {row[-1] for row in denials(agent)} == {DenialFlag.AUDITED}
    (view,) = (view for view in agent.ask("endpoints") if view["pod"] == "ns/b")
    assert view["audit"]
    operator.wait_acknowledged(operator.set(pod_resource("b", B)))
    for address in echoes["b"]:
        assert not connects(pods["c"], address, 80), agent.log
    agent.stop()
    agent.config["policy"] = {"audit": True}
    agent.start()
    assert agent.ask("status")["audit"]
    open_again = (connects(pods["c"], address, 80, 5) for address in echoes["b"])
    assert eventually(lambda: all(open_again)), agent.log
