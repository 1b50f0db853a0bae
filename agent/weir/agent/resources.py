# SPDX-License-Identifier: Apache-2.0
"""Resources as the operator names them, parsed once from their encoded form.

Everything past `parse` works on these. Numbers are the sending operator's own; sizes and
shapes are checked here, because what comes over the wire is not trusted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NewType

from google.protobuf.message import DecodeError

from weir.agent.errors import BadResource
from weir.api.address import Addr, Cidr, is_ipv4
from weir.api.v1 import weir_pb2

WireSelector = NewType("WireSelector", int)
WireClass = NewType("WireClass", int)

MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class ServicePort:
    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class FrontendPort:
    """An address and port that some Service may not have."""

    address: Addr
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class External:
    """What a Service has besides its cluster IPs. node_ports: one a port of the Service, 0: none.
    source_ranges: of load_balancer_ips; a family with none is open to everybody."""

    node_ports: tuple[int, ...] = ()
    external_ips: tuple[Addr, ...] = ()
    load_balancer_ips: tuple[Addr, ...] = ()
    local: bool = False
    source_ranges: tuple[Cidr, ...] = ()
    health_check_node_port: int = 0
    refused: frozenset[FrontendPort] = frozenset()


NOT_EXTERNAL = External()


@dataclass(frozen=True, slots=True)
class Service:
    """internal_local: internalTrafficPolicy Local. affinity_seconds: of ClientIP, 0: none."""

    namespace: str
    name: str
    cluster_ips: tuple[Addr, ...]
    ports: tuple[ServicePort, ...]
    internal_local: bool = False
    affinity_seconds: int = 0
    external: External = NOT_EXTERNAL


@dataclass(frozen=True, slots=True)
class Hints:
    """Whose traffic an endpoint should get: nodes by name, nodes of zones."""

    nodes: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()


NO_HINTS = Hints()


@dataclass(frozen=True, slots=True)
class Slice:
    """ready, draining (serving though terminating): 16 bytes an address, back to back, as there
    are hundreds of thousands of them; of one family, as Kubernetes has it. Other endpoints are of
    no use to anybody.

    nodes: of the ready ones, then of those that drain. hints: of the ready ones; () if one has
    none, which makes a node ignore those of the others."""

    namespace: str
    service: str
    ports: tuple[ServicePort, ...]
    ready: bytes
    draining: bytes
    nodes: tuple[str, ...] = ()
    hints: tuple[Hints, ...] = ()


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    addresses: tuple[Addr, ...]
    pod_cidrs: tuple[Cidr, ...]
    zone: str = ""
    leaving: bool = False
    wire_class: WireClass | None = None  # of its labels alone


@dataclass(frozen=True, slots=True)
class Selector:
    number: WireSelector
    key: str


@dataclass(frozen=True, slots=True, order=True)
class NamedPort:
    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Class:
    number: WireClass
    selectors: tuple[WireSelector, ...]
    named_ports: tuple[NamedPort, ...]


@dataclass(frozen=True, slots=True)
class PortRange:
    protocol: int
    first: int
    last: int
    name: str


class Tier(IntEnum):
    NETWORK_POLICY = 0
    ADMIN = 1
    BASELINE = 2


class Action(IntEnum):
    ACCEPT = 0
    DENY = 1
    PASS = 2


@dataclass(frozen=True, slots=True)
class Rule:
    egress: bool
    index: int
    any_peer: bool
    peers: tuple[WireSelector, ...]
    ports: tuple[PortRange, ...]
    action: Action = Action.ACCEPT


@dataclass(frozen=True, slots=True)
class Policy:
    """namespace: empty for a ClusterNetworkPolicy."""

    namespace: str
    name: str
    subject: WireSelector
    ingress: bool
    egress: bool
    rules: tuple[Rule, ...]
    tier: Tier = Tier.NETWORK_POLICY
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    address: Addr
    wire_class: WireClass
    namespace: str
    pod: str


@dataclass(frozen=True, slots=True)
class Prefix:
    cidr: Cidr
    wire_class: WireClass


@dataclass(frozen=True, slots=True)
class HostPort:
    """host_ip: None for all of the node's, an unspecified one for all of its family."""

    protocol: int
    host_port: int
    container_port: int
    host_ip: Addr | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """audit: what policies deny it is reported and let through."""

    namespace: str
    name: str
    uid: str
    wire_class: WireClass
    host_ports: tuple[HostPort, ...] = ()
    audit: bool = False


@dataclass(frozen=True, slots=True)
class Blocked:
    name: str
    cidrs: tuple[Cidr, ...]


@dataclass(frozen=True, slots=True)
class Announced:
    """Of a load balancer's address, the node that answers for it."""

    address: Addr
    node: str


Resource = (
    Service
    | Slice
    | Node
    | Selector
    | Class
    | Policy
    | Address
    | Prefix
    | Pod
    | Blocked
    | Announced
)


def resource_name(encoded: bytes) -> str:
    """The name alone. Raises BadResource when it has none or cannot be decoded."""
    try:
        name = weir_pb2.Resource.FromString(encoded).name
    except DecodeError as error:
        raise BadResource("?", f"cannot be decoded: {error}") from error
    if not name:
        raise BadResource("?", "has no name")
    return name


def parse(encoded: bytes) -> tuple[str, Resource]:
    """A resource and its name. Raises BadResource."""
    try:
        message = weir_pb2.Resource.FromString(encoded)
    except DecodeError as error:
        raise BadResource("?", f"cannot be decoded: {error}") from error
    kind = message.WhichOneof("kind")
    if not message.name or kind is None:
        raise BadResource(message.name or "?", "has no name or no content")
    try:
        item = _parse(kind, message)
    except ValueError as error:
        raise BadResource(message.name, str(error)) from error
    if expected_name(item, message.name) != message.name:
        raise BadResource(message.name, "its name is not that of its content")
    return message.name, item


def expected_name(item: Resource, name: str) -> str:
    """What a resource must be called, so that its removal by name finds it."""
    match item:
        case Service():
            return f"service/{item.namespace}/{item.name}"
        case Policy():
            if item.tier == Tier.NETWORK_POLICY:
                return f"policy/{item.namespace}/{item.name}"
            return f"cluster-policy/{item.name}" if not item.namespace else ""
        case Node():
            return f"node/{item.name}"
        case Selector():
            return f"selector/{item.number}"
        case Class():
            return f"class/{item.number}"
        case Address():
            return f"address/{item.address.hex()}"
        case Prefix():
            return f"prefix/{item.cidr.address.hex()}/{item.cidr.bits}"
        case Pod():
            return f"pod/{item.uid}"
        case Blocked():
            return f"blocked/{item.name}"
        case Announced():
            return f"announced/{item.address.hex()}"
        case Slice():
            return name if name.startswith("slice/") else ""


def _parse(kind: str, message: weir_pb2.Resource) -> Resource:
    match kind:
        case "service":
            return _service(message.service)
        case "slice":
            return _slice(message.slice)
        case "node":
            return _node(message.node)
        case "selector":
            return Selector(WireSelector(message.selector.number), message.selector.key)
        case "class":
            return _class(getattr(message, "class"))
        case "policy":
            return _policy(message.policy)
        case "address":
            item = message.address
            wire_class = WireClass(getattr(item, "class"))
            return Address(_addr(item.address), wire_class, item.namespace, item.pod)
        case "prefix":
            prefix = message.prefix
            return Prefix(_cidr(prefix.cidr), WireClass(getattr(prefix, "class")))
        case "announced":
            return Announced(_addr(message.announced.address), message.announced.node)
        case "blocked":
            return Blocked(message.blocked.name, tuple(map(_cidr, message.blocked.cidrs)))
        case _:
            pod = message.pod
            return Pod(
                pod.namespace,
                pod.name,
                pod.uid,
                WireClass(getattr(pod, "class")),
                tuple(map(_host_port, pod.host_ports)),
                pod.audit,
            )


def _addr(raw: bytes) -> Addr:
    if len(raw) != 16:
        raise ValueError(f"address of {len(raw)} bytes")
    return Addr(raw)


def _addrs(raws: object) -> tuple[Addr, ...]:
    return tuple(_addr(raw) for raw in raws)  # type: ignore[attr-defined]  # protobuf container


def _cidr(message: weir_pb2.Cidr) -> Cidr:
    return Cidr(_addr(message.address), message.bits)


def _node(message: weir_pb2.Node) -> Node:
    number = getattr(message, "class")
    return Node(
        message.name,
        _addrs(message.addresses),
        tuple(map(_cidr, message.pod_cidrs)),
        message.zone,
        message.leaving,
        WireClass(number) if number else None,
    )


def _port(port: int, protocol: int) -> int:
    if not 0 < port <= MAX_PORT or not 0 < protocol < 256:
        raise ValueError(f"port {port} of protocol {protocol}")
    return port


@lru_cache(maxsize=256)
def _shared(ports: tuple[ServicePort, ...]) -> tuple[ServicePort, ...]:
    """One tuple for all that are equal: most services have the ports of many others."""
    return ports


@lru_cache(maxsize=4096)
def _shared_ranges(ranges: tuple[PortRange, ...]) -> tuple[PortRange, ...]:
    """Likewise for the rules of policies."""
    return ranges


@lru_cache(maxsize=4096)
def _hints(nodes: tuple[str, ...], zones: tuple[str, ...]) -> Hints:
    return Hints(nodes, zones)


def _service(message: weir_pb2.Service) -> Service:
    ports = tuple(ServicePort(p.name, p.protocol, _port(p.port, p.protocol)) for p in message.ports)
    return Service(
        sys.intern(message.namespace),
        message.name,
        _addrs(message.cluster_ips),
        _shared(ports),
        message.internal_local,
        message.affinity_seconds,
        _external(message),
    )


def _external(message: weir_pb2.Service) -> External:
    node_ports = tuple(_optional_port(port.node_port) for port in message.ports)
    found = External(
        node_ports if any(node_ports) else (),
        _addrs(message.external_ips),
        _addrs(message.load_balancer_ips),
        message.external_local,
        tuple(map(_cidr, message.source_ranges)),
        _optional_port(message.health_check_node_port),
        frozenset(FrontendPort(_addr(f.address), f.protocol, f.port) for f in message.refused),
    )
    return found if found != NOT_EXTERNAL else NOT_EXTERNAL


def _optional_port(port: int) -> int:
    if port > MAX_PORT:
        raise ValueError(f"node port {port}")
    return port


def _slice(message: weir_pb2.Slice) -> Slice:
    ports = tuple(ServicePort(p.name, p.protocol, _port(p.port, p.protocol)) for p in message.ports)
    ready, ready_nodes = [], []
    draining, draining_nodes = [], []
    hints: list[Hints] = []
    hinted = True
    for endpoint in message.endpoints:
        if endpoint.ready:
            ready.append(_addr(endpoint.address))
            ready_nodes.append(sys.intern(endpoint.node))
            if hinted:
                hints.append(_hints(tuple(endpoint.for_nodes), tuple(endpoint.for_zones)))
                hinted = hints[-1] != NO_HINTS
        elif endpoint.serving and endpoint.terminating:
            draining.append(_addr(endpoint.address))
            draining_nodes.append(sys.intern(endpoint.node))
    if len({is_ipv4(addr) for addr in (*ready, *draining)}) > 1:
        raise ValueError("has addresses of both families")
    return Slice(
        sys.intern(message.namespace),
        message.service,
        _shared(ports),
        b"".join(ready),
        b"".join(draining),
        (*ready_nodes, *draining_nodes),
        tuple(hints) if hinted else (),
    )


def _host_port(message: weir_pb2.HostPort) -> HostPort:
    return HostPort(
        message.protocol,
        _port(message.host_port, message.protocol),
        _port(message.container_port, message.protocol),
        _addr(message.host_ip) if message.host_ip else None,
    )


def _class(message: weir_pb2.Class) -> Class:
    selectors = tuple(WireSelector(number) for number in message.selectors)
    ports = tuple(
        sorted(
            NamedPort(p.name, p.protocol, _port(p.port, p.protocol)) for p in message.named_ports
        )
    )
    return Class(WireClass(message.number), selectors, ports)


def _range(message: weir_pb2.PortRange) -> PortRange:
    if not 0 < message.protocol < 256:
        raise ValueError(f"protocol {message.protocol}")
    if not message.name and not message.first <= message.last <= MAX_PORT:
        raise ValueError(f"port range {message.first}-{message.last}")
    return PortRange(message.protocol, message.first, message.last, message.name)


def _policy(message: weir_pb2.Policy) -> Policy:
    tier = Tier(message.tier)
    return Policy(
        sys.intern(message.namespace),
        message.name,
        WireSelector(message.subject),
        message.ingress,
        message.egress,
        tuple(_rule(rule, tier) for rule in message.rules),
        tier,
        message.priority,
    )


def _rule(message: weir_pb2.Rule, tier: Tier) -> Rule:
    """An action of a later operator's is none that would let something through."""
    ranges = _shared_ranges(tuple(map(_range, message.ports)))
    peers = tuple(WireSelector(number) for number in message.peers)
    try:
        action = Action(message.action)
    except ValueError:
        return Rule(message.egress, message.index, True, (), (), Action.DENY)
    if tier == Tier.NETWORK_POLICY and action != Action.ACCEPT:
        raise ValueError(f"a NetworkPolicy's rule with action {action.name}")
    return Rule(message.egress, message.index, message.any_peer, peers, ranges, action)
