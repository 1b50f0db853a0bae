# SPDX-License-Identifier: Apache-2.0
"""Three nodes with real agents, an outside, and Services of every kind over every backend place.

pods self, near        pod far              pod other
      │                   │                    │
    node1               node2                node3
      └──────────────── br0 ───────────────────┘
                         │
         outside 192.0.2.254, VIPs routed via node1

With XDP, the bridge's ports fill in the checksums, which XDP takes for whole, and have XDP
programs of their own: without one, a veth takes nothing that its other end's XDP sends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.agents import AgentNode, address_resource, class_resource, node_resource
from support.datapaths import place
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.places import Place
from support.service_oracle import FRONT, Backend, Case, Client, Kind, serving_node
from weir.api.address import is_ipv4, parse
from weir.api.v1 import weir_pb2 as pb
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.libbpf import AttachType, XdpMode
from weir.datapath.settings import Settings

NODES = (1, 2, 3)
PODS = {"self": 1, "near": 1, "far": 2, "other": 3}
PROTOCOLS = {"tcp": 6, "udp": 17}
PORT, POD_TARGET, HOST_TARGET = 80, 8080, 8081
FIRST_NODE_PORT, FIRST_HOST_PORT = 30080, 9080
ONLY_CLASS = 1
NET = {
    Kind.CLUSTER_IP: {4: "10.96.0.{}", 6: "fd00:96::{}"},
    Kind.LOAD_BALANCER: {4: "198.51.100.{}", 6: "2001:db8:100::{}"},
    Kind.EXTERNAL_IP: {4: "203.0.113.{}", 6: "2001:db8:113::{}"},
}
VIP_ROUTES = ("10.96.0.0/24", "198.51.100.0/24", "203.0.113.0/24",
              "fd00:96::/64", "2001:db8:100::/64", "2001:db8:113::/64")  # fmt: skip
START_SECONDS = 90.0  # three agents' programs are verified side by side
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
OUTSIDE = 254
SERVERS = {
    Backend.SELF: "self",
    Backend.NEAR: "near",
    Backend.FAR: "far",
    Backend.NEAR_HOST: "node1",
    Backend.FAR_HOST: "node2",
}


def node_address(number: int, family: int) -> str:
    return f"192.0.2.{number}" if family == 4 else f"2001:db8::{number}"


def service_number(backend: Backend, local: bool) -> int:
    return 10 + list(Backend).index(backend) * 2 + local


@dataclass(frozen=True, slots=True)
class Ways:
    """How packets go: the agents' settings."""

    routing: str
    dsr: bool = False
    xdp: bool = False

    @property
    def config(self) -> dict[str, object]:
        return {
            "routing": self.routing,
            "loadBalancer": {"mode": "dsr" if self.dsr else "snat"},
            "xdp": {"mode": "native" if self.xdp else "off"},
        }


@dataclass
class ServiceWorld:
    """`places` are processes by the name of who they are; POD_PACKETS is in no cgroup."""

    ways: Ways
    nodes: dict[int, AgentNode] = field(default_factory=dict)
    operators: dict[int, ScriptedOperator] = field(default_factory=dict)
    pods: dict[str, NetNs] = field(default_factory=dict)
    addresses: dict[str, dict[int, str]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)

    @property
    def logs(self) -> str:
        return "\n".join(node.log for node in self.nodes.values())

    def set(self, *items: pb.Resource, gone: tuple[str, ...] = ()) -> None:
        revisions = {n: op.set(*items, gone=gone) for n, op in self.operators.items()}
        for number, operator in self.operators.items():
            operator.wait_acknowledged(revisions[number])

    def place_of(self, client: Client) -> Place:
        names = {
            Client.POD: "self",
            Client.HOST: "node1",
            Client.BACKEND_NODE: "node2",
            Client.OTHER_POD: "other",
            Client.OTHER_NODE: "node3",
        }
        return self.places[names.get(client, client.value)]

    def address_of(self, client: Client, family: int) -> str:
        if client is Client.OUTSIDE:
            return node_address(OUTSIDE, family)
        name = "self" if client is Client.POD_PACKETS else self.place_of(client).name
        return self.addresses[name][family]

    def target(self, case: Case) -> tuple[str, int]:
        number = service_number(case.backend, case.local)
        match case.kind:
            case Kind.NODE_PORT:
                return node_address(FRONT, case.family), FIRST_NODE_PORT + number
            case Kind.LOOPBACK:
                return LOOPBACK[case.family], FIRST_NODE_PORT + number
            case Kind.HOST_PORT:
                at = node_address(serving_node(case), case.family)
                return at, FIRST_HOST_PORT + list(Backend).index(case.backend)
            case _:
                return NET[case.kind][case.family].format(number), PORT

    def source_seen(self, case: Case, source: str) -> str:
        """The address that the oracle's word stands for."""
        if source == "front":
            return node_address(serving_node(case), case.family)
        return self.address_of(case.client, case.family)


def pod_resource(name: str) -> pb.Resource:
    pod = pb.Pod(namespace="ns", name=name, uid=f"u-{name}")
    setattr(pod, "class", ONLY_CLASS)
    backend = next((place for place, server in SERVERS.items() if server == name), None)
    if backend is not None:
        host_port = FIRST_HOST_PORT + list(Backend).index(backend)
        for protocol in PROTOCOLS.values():
            pod.host_ports.add(
                protocol=protocol, host_port=host_port, container_port=POD_TARGET, host_ip=b""
            )
    return pb.Resource(name=f"pod/u-{name}", pod=pod)


def service_resource(backend: Backend, local: bool) -> pb.Resource:
    number = service_number(backend, local)
    vips = {kind: [parse(NET[kind][family].format(number)) for family in (4, 6)] for kind in NET}
    ports = [
        pb.ServicePort(name=name, protocol=value, port=PORT, node_port=FIRST_NODE_PORT + number)
        for name, value in PROTOCOLS.items()
    ]
    service = pb.Service(
        namespace="ns",
        name=f"s{number}",
        cluster_ips=vips[Kind.CLUSTER_IP],
        load_balancer_ips=vips[Kind.LOAD_BALANCER],
        external_ips=vips[Kind.EXTERNAL_IP],
        ports=ports,
        internal_local=local,
        external_local=local,
    )
    return pb.Resource(name=f"service/ns/s{number}", service=service)


def slice_resources(world: ServiceWorld, backend: Backend, local: bool) -> list[pb.Resource]:
    """One of each family; a place that is none has slices without endpoints."""
    number = service_number(backend, local)
    host = backend in {Backend.NEAR_HOST, Backend.FAR_HOST}
    target = HOST_TARGET if host else POD_TARGET
    found = []
    for family in (4, 6):
        made = pb.Resource(name=f"slice/ns/s{number}-{family}")
        made.slice.namespace, made.slice.service = "ns", f"s{number}"
        for name, value in PROTOCOLS.items():
            made.slice.ports.add(name=name, protocol=value, port=target)
        if backend is not Backend.NONE:
            server = SERVERS[backend]
            node = server if host else f"node{PODS[server]}"
            address = parse(world.addresses[server][family])
            made.slice.endpoints.add(address=address, ready=True, serving=True, node=node)
        found.append(made)
    return found


@contextmanager
def service_world(folder: Path, ways: Ways) -> Iterator[ServiceWorld]:
    with ExitStack() as stack:
        world = ServiceWorld(ways)
        cgroups = {n: _start_node(stack, world, folder, n) for n in NODES}
        outside = world.nodes[FRONT].outside
        if ways.xdp:
            _prepare_far_ends(stack, outside)
        for node in world.nodes.values():
            node.wait_ready(START_SECONDS)
            assert node.ask("status")["xdp"] == {"eth0": "native" if ways.xdp else "off"}
        for prefix in VIP_ROUTES:
            via = node_address(FRONT, 6 if ":" in prefix else 4)
            outside.run("ip", "route", "add", prefix, "via", via)
        for name, home in PODS.items():
            world.pods[name] = NetNs()
            stack.callback(world.pods[name].close)
            given = world.nodes[home].add(world.pods[name], name)
            world.addresses[name] = {4 if is_ipv4(parse(text)) else 6: text for text in given}
        for number in NODES:
            world.addresses[f"node{number}"] = {f: node_address(number, f) for f in (4, 6)}
        _start_places(stack, world, cgroups)
        world.set(
            *(
                address_resource(text, name, ONLY_CLASS)
                for name in PODS
                for text in world.addresses[name].values()
            ),
            *(
                resource
                for backend in Backend
                for local in (False, True)
                for resource in (
                    service_resource(backend, local),
                    *slice_resources(world, backend, local),
                )
            ),
        )
        yield world


def _prepare_far_ends(stack: ExitStack, outside: NetNs) -> None:
    root, cgroup = stack.enter_context(place())
    with outside.entered():
        passing = Datapath.open(root, cgroup, Settings())
        stack.callback(Datapath.remove, root)
        stack.callback(passing.close)
        program = passing.programs["xdp_uplink"]
        for number in NODES:
            port = f"node{number}"
            outside.run("ethtool", "-K", port, "tx", "off")
            index = socket.if_nametoindex(port)
            link = libbpf.create_link(program, index, AttachType.XDP, port, XdpMode.NATIVE)
            stack.callback(os.close, link)


def _start_node(stack: ExitStack, world: ServiceWorld, folder: Path, number: int) -> Path:
    """Starts the agent, without waiting. Returns the node's cgroup."""
    pins, cgroup = stack.enter_context(place())
    operator = ScriptedOperator()
    operator.set(
        *(
            node_resource(
                f"node{n}",
                [node_address(n, 4), node_address(n, 6)],
                [f"10.244.{n}.0/24", f"fd00:244:{n}::/64"],
            )
            for n in NODES
        ),
        class_resource(ONLY_CLASS),
        *(pod_resource(name) for name, home in PODS.items() if home == number),
    )
    mine = folder / f"node{number}"
    mine.mkdir()
    front = world.nodes.get(FRONT)
    node = AgentNode(mine, pins, cgroup, operator, number, front, **world.ways.config)
    stack.callback(node.close)
    node.node.run("ip", "-6", "route", "add", "default", "via", node_address(OUTSIDE, 6))
    operator._where = node.node.entered()
    stack.callback(operator.stop)
    node.config["operators"] = [f"127.0.0.1:{operator.start()}"]
    node.start(wait=False)
    world.nodes[number], world.operators[number] = node, operator
    return cgroup


def _start_places(stack: ExitStack, world: ServiceWorld, cgroups: dict[int, Path]) -> None:
    made = [
        Place(name, world.pods[name], cgroups[home], [POD_TARGET]) for name, home in PODS.items()
    ]
    made += [
        Place(f"node{number}", world.nodes[number].node, cgroups[number], [HOST_TARGET])
        for number in NODES
    ]
    made.append(Place(Client.POD_PACKETS.value, world.pods["self"]))
    made.append(Place(Client.OUTSIDE.value, world.nodes[FRONT].outside))
    for one in made:
        stack.callback(one.close)
        world.places[one.name] = one
    for one in made:
        one.wait_ready()
