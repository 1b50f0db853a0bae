# SPDX-License-Identifier: Apache-2.0
"""Two nodes with an agent each, on one segment: routing between them, policy on.

pod a ─┐                                  ┌─ pod b
pod c ─┤ node1 ── eth0 ── br0 ── eth0 ── node2
                           │
                     outside 192.0.2.254
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.agents import (
    AgentNode,
    address_resource,
    class_resource,
    node_resource,
    pod_resource,
    selector_resource,
)
from support.datapaths import place
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.timing import SCALE
from support.traffic import Echo, connects, deny_all, eventually

from weir.api.v1 import weir_pb2 as pb

ADDRESSES = {1: ["192.0.2.1", "2001:db8::1"], 2: ["192.0.2.2", "2001:db8::2"]}
CIDRS = {n: [f"10.244.{n}.0/24", f"fd00:244:{n}::/64"] for n in (1, 2)}
CLASSES = {"a": 1, "b": 2, "c": 3}
SO_RCVBUFFORCE = 33
HOMES = {"a": 1, "c": 1, "b": 2}


@dataclass
class Cluster:
    nodes: dict[int, AgentNode]
    operators: dict[int, ScriptedOperator]
    pods: dict[str, NetNs]
    addresses: dict[str, list[str]]

    @property
    def logs(self) -> str:
        return "\n".join(node.log for node in self.nodes.values())

    @property
    def outside(self) -> NetNs:
        return self.nodes[1].outside

    def set(self, *items: pb.Resource, gone: tuple[str, ...] = ()) -> None:
        for operator in self.operators.values():
            operator.wait_acknowledged(operator.set(*items, gone=gone))


@contextmanager
def cluster(folder: Path, routing: str) -> Iterator[Cluster]:
    with ExitStack() as stack:
        made = Cluster({}, {}, {name: NetNs() for name in HOMES}, {})
        for pod in made.pods.values():
            stack.callback(pod.close)
        for number in (1, 2):
            pins, cgroup = stack.enter_context(place())
            operator = ScriptedOperator()
            operator.set(
                *(node_resource(f"node{n}", ADDRESSES[n], CIDRS[n]) for n in (1, 2)),
                selector_resource(1, "pods ns=ns app=a"),
                selector_resource(2, "pods ns=ns app=b"),
                class_resource(1, 1),
                class_resource(2, 2),
                class_resource(3),
                *(pod_resource(name, CLASSES[name]) for name in HOMES if HOMES[name] == number),
            )
            place_of_node = folder / f"node{number}"
            place_of_node.mkdir()
            node = AgentNode(
                place_of_node, pins, cgroup, operator, number, made.nodes.get(1), routing=routing
            )
            stack.callback(node.close)
            operator._where = node.node.entered()
            stack.callback(operator.stop)
            node.config["operators"] = [f"127.0.0.1:{operator.start()}"]
            node.start()
            made.nodes[number], made.operators[number] = node, operator
        for name, home in HOMES.items():
            made.addresses[name] = made.nodes[home].add(made.pods[name], name)
        made.set(
            *(
                address_resource(addr, name, CLASSES[name])
                for name, addrs in made.addresses.items()
                for addr in addrs
            )
        )
        yield made


@pytest.mark.parametrize("routing", ["vxlan", "native"])
def test_pods_of_two_nodes_reach_each_other_as_policy_says(tmp_path: Path, routing: str) -> None:
    with cluster(tmp_path, routing) as made, ExitStack() as stack:
        for name in "ab":
            stack.callback(Echo(made.pods[name], 80).close)
        made.set(deny_all("only-a", 2, 1))
        for source, target, passes in (("a", "b", True), ("c", "b", False), ("b", "a", True)):
            for address in made.addresses[target]:
                seconds = 5 if passes else 0.4
                assert connects(made.pods[source], address, 80, seconds) == passes, (
                    f"{source} to {target} {address}\n{made.logs}"
                )
        for number, name in ((1, "a"), (2, "b")):
            for address in made.addresses[name]:
                # The node's own, and the other node's: this one is no pod, so policy denies b.
                assert connects(made.nodes[number].node, address, 80, 5), made.logs
        for address in made.addresses["a"]:
            assert connects(made.nodes[2].node, address, 80, 5), made.logs
        route = made.nodes[1].node.run("ip", "route", "get", made.addresses["b"][0])
        assert ("dev weir_vxlan" in route) == (routing == "vxlan"), route
        assert ("via 192.0.2.2" in route) == (routing == "native"), route


def echoed(source: NetNs, address: str, port: int, size: int) -> int:
    """Bytes that came back of as many sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with source.entered():
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(10 * SCALE)
    with client:
        client.connect((address, port))
        sending = threading.Thread(target=client.sendall, args=(bytes(size),))
        sending.start()
        got = 0
        while got < size and (data := client.recv(1 << 16)):
            got += len(data)
        sending.join()
    return got


def bare_packets(sniffer: socket.socket, addresses: list[str]) -> int:
    """Captured packets that are of or to an address, with nothing around them."""
    found = 0
    wanted = [
        socket.inet_pton(socket.AF_INET6 if ":" in a else socket.AF_INET, a) for a in addresses
    ]
    try:
        while frame := sniffer.recv(1 << 16):
            ends = (frame[26:30], frame[30:34], frame[22:38], frame[38:54])
            found += any(addr in ends for addr in wanted)
    except BlockingIOError:
        return found
    return found


@pytest.mark.parametrize("routing", ["vxlan", "native"])
def test_pods_and_other_nodes_reach_each_other(tmp_path: Path, routing: str) -> None:
    """Both ways, with more than a packet holds; through the overlay where there is one, so that
    nothing from the uplink need be believed to be a pod."""
    with cluster(tmp_path, routing) as made, ExitStack() as stack:
        node, pod = made.nodes[2].node, made.pods["a"]
        stack.callback(Echo(node, 8081).close)
        stack.callback(Echo(pod, 8082).close)
        with made.nodes[1].node.entered():
            sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            sniffer.bind(("eth0", 3))
        stack.callback(sniffer.close)
        sniffer.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        sniffer.setblocking(False)
        size = 1 << 20
        for address in ADDRESSES[2]:
            assert echoed(pod, address, 8081, size) == size, made.logs
        for address in made.addresses["a"]:
            assert echoed(node, address, 8082, size) == size, made.logs
        bare = bare_packets(sniffer, made.addresses["a"])
        assert bool(bare) == (routing == "native"), f"{bare} packets of the pod as they were"


def source_seen_outside(made: Cluster, pod: NetNs) -> str:
    """The address by which the outside knows a pod that connects to it."""
    with made.nodes[1].outside.entered():
        server = socket.create_server(("192.0.2.254", 0))
    server.settimeout(5)
    with pod.entered():
        client = socket.socket()
    client.settimeout(5)
    with server, client:
        client.connect(server.getsockname())
        connection, (address, _) = server.accept()
        connection.close()
    return str(address)


@pytest.mark.parametrize("routing", ["vxlan", "native"])
def test_a_node_that_changes_its_address_goes_on(tmp_path: Path, routing: str) -> None:
    with cluster(tmp_path, routing) as made, ExitStack() as stack:
        stack.callback(Echo(made.pods["b"], 80).close)
        target = made.addresses["b"]
        assert source_seen_outside(made, made.pods["a"]) == "192.0.2.1", made.logs
        with made.pods["a"].entered():
            open_one = stack.enter_context(socket.create_connection((target[0], 80), timeout=10))
        moving = made.nodes[1].node
        moving.run("ip", "address", "del", "192.0.2.1/24", "dev", "eth0")
        moving.run("ip", "address", "add", "192.0.2.11/24", "dev", "eth0")
        moving.run("ip", "route", "replace", "default", "via", "192.0.2.254")
        made.set(node_resource("node1", ["192.0.2.11", "2001:db8::1"], CIDRS[1]))
        assert eventually(lambda: "192.0.2.11" in made.nodes[1].ask("status")["addresses"]), (
            made.logs
        )
        for address in target:
            assert eventually(lambda a=address: connects(made.pods["a"], a, 80, 2)), made.logs
        open_one.sendall(b"x")
        assert open_one.recv(1) == b"x"
        assert source_seen_outside(made, made.pods["a"]) == "192.0.2.11", made.logs
