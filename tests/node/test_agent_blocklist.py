# SPDX-License-Identifier: Apache-2.0
"""BlockLists by the agent as a whole: from the operator's word to packets that are gone.

outside (192.0.2.254, 2001:db8::254) ── eth0 of the node: XDP or tc ── the node
"""

from __future__ import annotations

import json

import pytest
from support.agents import AgentNode, UnixConnection
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.timing import SCALE
from support.traffic import eventually

from weir.api.address import parse_cidr
from weir.api.v1 import weir_pb2 as pb

TARGETS = ("192.0.2.1", "2001:db8::1")
WAIT = f"-W{SCALE:.0f}"


def answers(outside: NetNs, target: str) -> bool:
    try:
        outside.run("ping", "-c1", WAIT, target)
    except AssertionError:
        return False
    return True


def blocked(name: str, *prefixes: str) -> pb.Resource:
    message = pb.Blocked(name=name)
    for text in prefixes:
        cidr = parse_cidr(text)
        message.cidrs.add(address=cidr.address, bits=cidr.bits)
    return pb.Resource(name=f"blocked/{name}", blocked=message)


def drops(agent: AgentNode) -> float:
    text = agent.node.run("curl", "-sf", "http://127.0.0.1:9880/metrics")
    wanted = 'weir_packets_total{reason="blocked"'
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(wanted))


@pytest.mark.parametrize("mode", ["off", "native", "generic"])
def test_blocked_and_let_through_again(
    agent: AgentNode, operator: ScriptedOperator, mode: str
) -> None:
    """Each drop is counted and names its list; over a restart the list stays in force."""
    agent.config["xdp"] = {"mode": mode}
    agent.start()
    assert agent.ask("status")["xdp"] == {"eth0": mode}
    for target in TARGETS:
        assert answers(agent.outside, target), agent.log
    revision = operator.set(blocked("flood", "192.0.2.254/32", "2001:db8::254/128"))
    operator.wait_acknowledged(revision)
    before = drops(agent)
    events = UnixConnection(agent.folder / "run" / "agent.sock")
    events.request("GET", "/v1/events")
    stream = events.getresponse()
    for target in TARGETS:
        assert not answers(agent.outside, target), agent.log
    seen = []
    while len(seen) < len(TARGETS):
        if event := json.loads(stream.readline()):  # empty: still there
            seen.append(event)
    events.close()
    assert {event["reason"] for event in seen} == {"blocked"}
    assert {tuple(event["policies"]) for event in seen} == {("BlockList flood",)}
    assert drops(agent) >= before + 2
    agent.stop()
    assert not answers(agent.outside, TARGETS[0]), "the agent is away, its programs are not"
    agent.start()
    assert not answers(agent.outside, TARGETS[0])
    operator.wait_acknowledged(operator.set(gone=("blocked/flood",)))
    for target in TARGETS:
        assert eventually(lambda target=target: answers(agent.outside, target)), agent.log  # type: ignore[misc]


def test_a_mode_that_the_device_does_not_take(agent: AgentNode) -> None:
    """Told in the status; tc does the work."""
    # What the other end sends would not fit into the page that native XDP needs on a veth.
    agent.outside.run("ip", "link", "set", "node1", "mtu", "9000")
    agent.config["xdp"] = {"mode": "native"}
    agent.start()
    assert agent.ask("status")["xdp"] == {"eth0": "refused"}
    operator = agent.operator
    operator.wait_acknowledged(operator.set(blocked("flood", "192.0.2.254/32")))
    assert not answers(agent.outside, TARGETS[0])
