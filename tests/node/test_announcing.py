# SPDX-License-Identifier: Apache-2.0
"""A load balancer's address on the segment: a neighbour's own kernel finds the node that has it,
and follows when another node takes it over.

pod a ── node1 ── eth0 ── br0 ── eth0 ── node2 ── pod b
                           │
                   outside 192.0.2.254, the neighbour
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from node.test_agents import Cluster, cluster
from support.agents import service_resources
from support.namespaces import NetNs
from support.timing import SCALE
from support.traffic import Echo, connects, eventually

from weir.agent.herald import REPEAT_SECONDS, solicited_node
from weir.api.address import parse, text
from weir.api.v1 import weir_pb2 as pb

POOL = {4: "192.0.2.100", 6: "2001:db8::100"}


def announced(address: str, node: str) -> pb.Resource:
    raw = parse(address)
    return pb.Resource(
        name=f"announced/{raw.hex()}", announced=pb.Announced(address=raw, node=node)
    )


def mac_of(ns: NetNs, device: str = "eth0") -> str:
    return str(json.loads(ns.run("ip", "-j", "link", "show", device))[0]["address"])


def neighbour(ns: NetNs, address: str) -> str:
    """The MAC that its kernel has for an address, as far as it knows one."""
    found = json.loads(ns.run("ip", "-j", "neigh", "show", "to", address) or "[]")
    return str(found[0].get("lladdr", found[0]["state"])) if found else "unknown"


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Cluster]:
    with cluster(tmp_path, "vxlan") as cluster_:
        service, *slices = service_resources(
            "web", [f"10.96.0.{n}" for n in (9,)] + ["fd00:96::9"], 80,
            dict.fromkeys(cluster_.addresses["a"], 80),
        )  # fmt: skip
        service.service.load_balancer_ips.extend(map(parse, POOL.values()))
        server = Echo(cluster_.pods["a"], 80)
        cluster_.set(service, *slices)
        yield cluster_
        server.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_neighbour_finds_the_node_and_follows_it(made: Cluster, family: int) -> None:
    address, outside = POOL[family], made.outside
    macs = {number: mac_of(node.node) for number, node in made.nodes.items()}
    assert not connects(outside, address, 80, 0.4), "nobody announces it"

    made.set(announced(address, "node1"))
    assert [made.nodes[n].ask("status")["announced"] for n in (1, 2)] == [[address], []]
    outside.run("ip", "neigh", "flush", "to", address)
    assert connects(outside, address, 80, 5 * SCALE), made.logs
    assert neighbour(outside, address) == macs[1]

    began = time.monotonic()
    made.set(announced(address, "node2"))
    # Nothing is sent by the neighbour: what it remembers changes as it is told.
    moved = eventually(lambda: neighbour(outside, address) == macs[2], 5 * SCALE)
    seconds = time.monotonic() - began
    assert moved, f"{neighbour(outside, address)} and not {macs[2]}\n{made.logs}"
    assert seconds < 1.0 * SCALE
    assert connects(outside, address, 80, 5 * SCALE), made.logs
    assert neighbour(outside, address) == macs[2]

    # Asked anew, node2 answers and node1 does not.
    for _ in range(5):
        outside.run("ip", "neigh", "flush", "to", address)
        assert connects(outside, address, 80, 5 * SCALE), made.logs
        assert neighbour(outside, address) == macs[2]

    made.set(gone=(f"announced/{parse(address).hex()}",))
    outside.run("ip", "neigh", "flush", "to", address)
    assert not connects(outside, address, 80, 0.4)


@pytest.mark.parametrize("family", [4, 6])
def test_answers_while_the_agent_is_away_and_is_told_again_when_it_is_back(
    made: Cluster, family: int
) -> None:
    address, outside, node = POOL[family], made.outside, made.nodes[1]
    made.set(announced(address, "node1"))
    assert connects(outside, address, 80, 5 * SCALE), made.logs
    node.stop()
    assert connects(outside, address, 80, 5 * SCALE)
    mac = mac_of(node.node)
    if family == 4:  # of IPv6 the group ends with the agent: probes of known ones are unicast
        outside.run("ip", "neigh", "flush", "to", address)
    assert connects(outside, address, 80, 5 * SCALE)
    wrong = "02:00:00:00:00:99"
    outside.run("ip", "neigh", "replace", address, "lladdr", wrong, "dev", "br0", "nud", "stale")
    node.start()
    assert eventually(lambda: neighbour(outside, address) == mac, 10 * SCALE), node.log


def test_the_device_takes_in_questions_for_an_announced_address(made: Cluster) -> None:
    node = made.nodes[1].node
    group = text(solicited_node(parse(POOL[6])))  # type: ignore[arg-type]  # any 16 bytes
    member = ["ip", "-6", "maddress", "show", "dev", "eth0"]
    assert group not in node.run(*member)
    made.set(announced(POOL[6], "node1"))
    assert eventually(lambda: group in node.run(*member), 5 * SCALE)
    made.set(gone=(f"announced/{parse(POOL[6]).hex()}",))
    assert eventually(lambda: group not in node.run(*member), 5 * SCALE)


def test_told_a_few_times_and_then_no_more(made: Cluster) -> None:
    outside = made.outside
    with outside.entered():
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
    listener.bind(("br0", 0))
    listener.settimeout(0.5)
    mac = bytes.fromhex(mac_of(made.nodes[1].node).replace(":", ""))
    made.set(announced(POOL[4], "node1"))
    seen = 0
    deadline = time.monotonic() + (REPEAT_SECONDS[-1] + 3) * SCALE
    with listener:
        while time.monotonic() < deadline:
            try:
                frame = listener.recv(100)
            except TimeoutError:
                continue
            ours = frame[6:12] == mac and frame[28:32] == frame[38:42] == parse(POOL[4])[12:]
            seen += ours
    assert seen == 2 * len(REPEAT_SECONDS)
