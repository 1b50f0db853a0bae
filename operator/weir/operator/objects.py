# SPDX-License-Identifier: Apache-2.0
"""Kubernetes objects as the compiler sees them: frozen dataclasses, and a parser for each.

A parser never raises for bad content: what it cannot use becomes a `Problem`, and the object it
returns is what remains (None: nothing does). NetworkPolicy has a module of its own, as it has
the rules about failing closed: `weir.operator.policy`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from weir.api.address import Addr, Cidr, parse, parse_cidr
from weir.operator import wire

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132}
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
# With any value: a Service, and so its slices, that another proxy serves; slices for DNS alone.
PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
ZONE = "topology.kubernetes.io/zone"
# With any value: a node that no load balancer sends to.
EXCLUDED = "node.kubernetes.io/exclude-from-external-load-balancers"
OS = "kubernetes.io/os"
AUDIT = "policy.weir.dev/audit"
TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one field of one object, in words for whoever wrote it. `reason`: of the
    Event that tells it. `identity`: what tells it from the object's other problems, if not the
    words."""

    field: str
    message: str
    reason: str = "Invalid"
    identity: str = ""


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Names an object among those of its kind; cluster-wide kinds have no namespace."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Parsed(Generic[T]):
    """What a parser made of an object."""

    value: T | None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True, order=True)
class Port:
    """A port of an EndpointSlice, or a container's named port."""

    name: str
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Endpoint:
    address: Addr
    ready: bool
    serving: bool
    terminating: bool
    node: str
    zone: str
    for_zones: tuple[str, ...] = ()
    for_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    key: Key
    service: str  # empty: of none
    ports: tuple[Port, ...]
    endpoints: tuple[Endpoint, ...]
    served: bool = True  # False: it is for DNS alone, or another proxy's


Labels = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Namespace:
    key: Key
    labels: Labels
    audit: bool = False  # what policies deny its pods is only reported


@dataclass(frozen=True, slots=True)
class Node:
    key: Key
    addresses: tuple[Addr, ...]  # InternalIPs first
    pod_cidrs: tuple[Cidr, ...]
    created: str = ""  # as a pod's
    uid: str = ""
    zone: str = ""
    ready: bool = True  # what its Ready condition says
    balances: bool = True  # False: load balancers are to leave it out
    leaving: bool = False  # is being deleted, or will be by the cluster autoscaler
    labels: Labels = ()


@dataclass(frozen=True, slots=True)
class HostPort:
    """A container's port that its node answers on."""

    protocol: int
    host_port: int
    container_port: int
    host_ip: Addr | None = None  # None: all of the node's; 0.0.0.0 or ::: all of that family


@dataclass(frozen=True, slots=True)
class Pod:
    key: Key
    uid: str
    created: str  # RFC 3339 in UTC, so that text order is time order
    labels: Labels
    node: str  # empty: not scheduled yet
    live: bool  # False: in the host's network, or finished; then no address is its own
    addresses: tuple[Addr, ...]
    ports: tuple[Port, ...]  # the named ones
    host_ports: tuple[HostPort, ...] = ()


def key_of(meta: wire.Meta | wire.Identity) -> Key:
    return Key(sys.intern(meta.namespace), meta.name)


def labels_of(meta: wire.Meta) -> Labels:
    return tuple(sorted((sys.intern(k), sys.intern(v)) for k, v in (meta.labels or {}).items()))


def protocol_number(name: str | None, field: str, problems: list[Problem]) -> int | None:
    number = PROTOCOLS.get(name or "TCP")
    if number is None:
        problems.append(Problem(field, f"unknown protocol {name!r}"))
    return number


def port_number(port: int | None, field: str, problems: list[Problem]) -> int | None:
    if port is None or not 1 <= port <= 65535:
        problems.append(Problem(field, f"{port} is not a port: must be between 1 and 65535"))
        return None
    return port


def parse_address(text: str, field: str, problems: list[Problem]) -> Addr | None:
    try:
        return parse(text)
    except ValueError as error:
        problems.append(Problem(field, str(error)))
        return None


def parse_addresses(texts: list[str], field: str, problems: list[Problem]) -> tuple[Addr, ...]:
    found = (parse_address(text, f"{field}[{i}]", problems) for i, text in enumerate(texts))
    return tuple(dict.fromkeys(addr for addr in found if addr is not None))


def _slice_ports(
    ports: Sequence[wire.SlicePort], field: str, problems: list[Problem]
) -> tuple[Port, ...]:
    found: dict[tuple[str, int, int], Port] = {}
    for i, port in enumerate(ports):
        protocol = protocol_number(port.protocol, f"{field}[{i}].protocol", problems)
        number = port_number(port.port, f"{field}[{i}].port", problems)
        if protocol is not None and number is not None:
            made = Port(sys.intern(port.name or ""), protocol, number)
            found.setdefault((made.name, protocol, number), made)
    return tuple(found.values())


def parse_slice(raw: wire.EndpointSlice) -> Parsed[EndpointSlice]:
    """An endpoint's first address stands for it, as the API says that they are fungible."""
    problems: list[Problem] = []
    labels = raw.metadata.labels or {}
    service = labels.get("kubernetes.io/service-name", "")
    served = bool(service) and PROXY_NAME not in labels and HEADLESS not in labels
    endpoints: list[Endpoint] = []
    with_addresses = raw.endpoints or []
    if raw.address_type == "FQDN":
        with_addresses = []
    for i, endpoint in enumerate(with_addresses):
        field = f"endpoints[{i}].addresses"
        if not endpoint.addresses:
            problems.append(Problem(field, "an endpoint needs an address"))
            continue
        address = parse_address(endpoint.addresses[0], f"{field}[0]", problems)
        if address is None:
            continue
        conditions = endpoint.conditions or wire.Conditions()
        hints = endpoint.hints or wire.Hints()
        endpoints.append(
            Endpoint(
                address=address,
                ready=conditions.ready is not False,
                serving=conditions.serving is not False,
                terminating=bool(conditions.terminating),
                node=sys.intern(endpoint.node_name or ""),
                zone=sys.intern(endpoint.zone or ""),
                for_zones=_hints(hints.for_zones),
                for_nodes=_hints(hints.for_nodes),
            )
        )
    # A port without a number stands for all ports, which no Service can ask for.
    ports = _slice_ports([p for p in raw.ports or [] if p.port is not None], "ports", problems)
    key = key_of(raw.metadata)
    return Parsed(EndpointSlice(key, service, ports, tuple(endpoints), served), tuple(problems))


def _hints(names: list[wire.Hint] | None) -> tuple[str, ...]:
    return tuple(sorted({sys.intern(hint.name) for hint in names or []}))


def parse_namespace(raw: wire.Namespace) -> Parsed[Namespace]:
    """An annotation that is neither true nor false reads as false: what policies deny is denied."""
    meta = raw.metadata
    wanted = (meta.annotations or {}).get(AUDIT, "false")
    problems: tuple[Problem, ...] = ()
    if wanted not in ("true", "false"):
        text = f'{wanted!r} is neither "true" nor "false": policies are enforced'
        problems = (Problem(f"metadata.annotations[{AUDIT}]", text),)
    return Parsed(Namespace(key_of(meta), labels_of(meta), wanted == "true"), problems)


def parse_node(raw: wire.Node) -> Parsed[Node]:
    problems: list[Problem] = []
    listed = [a for a in (raw.status.addresses if raw.status else None) or [] if a.address]
    texts = [a.address for a in listed if a.type == "InternalIP"]
    texts += [a.address for a in listed if a.type == "ExternalIP"]
    # The other types are names, but a name can be an address, by which policies may select it.
    names = [a.address for a in listed if a.type not in ("InternalIP", "ExternalIP")]
    texts += [name for name in names if parse_address(name, "", []) is not None]
    addresses = parse_addresses(texts, "status.addresses", problems)
    cidrs: list[Cidr] = []
    for text in raw.spec.pod_cidrs or ([raw.spec.pod_cidr] if raw.spec.pod_cidr else []):
        try:
            cidrs.append(parse_cidr(text))
        except ValueError as error:
            problems.append(Problem("spec.podCIDRs", str(error)))
    meta = raw.metadata
    labels = meta.labels or {}
    conditions = (raw.status.conditions if raw.status else None) or []
    node = Node(
        key_of(meta),
        addresses,
        tuple(cidrs),
        created=meta.creation_timestamp or "",
        uid=meta.uid,
        zone=labels.get(ZONE, ""),
        ready=any(c.type == "Ready" and c.status == "True" for c in conditions),
        # Another system's nodes have no agent.
        balances=EXCLUDED not in labels and labels.get(OS, "linux") == "linux",
        leaving=meta.deletion_timestamp is not None
        or any(taint.key == TO_BE_DELETED for taint in raw.spec.taints or ()),
        labels=labels_of(meta),
    )
    return Parsed(node, tuple(problems))


def parse_pod(raw: wire.Pod) -> Parsed[Pod]:
    problems: list[Problem] = []
    if not raw.metadata.uid:
        return Parsed(None, (Problem("metadata.uid", "a pod without a uid"),))
    status = raw.status or wire.PodStatus()
    live = not raw.spec.host_network and status.phase not in ("Succeeded", "Failed")
    texts = [entry.ip for entry in status.pod_ips or [] if entry.ip]
    if not texts and status.pod_ip:
        texts = [status.pod_ip]
    pod = Pod(
        key=key_of(raw.metadata),
        uid=raw.metadata.uid,
        created=raw.metadata.creation_timestamp or "",
        labels=labels_of(raw.metadata),
        node=sys.intern(raw.spec.node_name or ""),
        live=live,
        addresses=parse_addresses(texts, "status.podIPs", problems) if live else (),
        ports=_named_ports(raw.spec) if live else (),
        host_ports=_host_ports(raw.spec, problems) if live else (),
    )
    return Parsed(pod, tuple(problems))


def _container_ports(spec: wire.PodSpec) -> Iterator[wire.ContainerPort]:
    """Of what runs as long as the pod does: containers, then init containers that are sidecars."""
    for container in spec.containers or ():
        yield from container.ports or ()
    for container in spec.init_containers or ():
        if container.restart_policy == "Always":
            yield from container.ports or ()


def _named_ports(spec: wire.PodSpec) -> tuple[Port, ...]:
    """The first of a name wins, as for a Service's target."""
    found: dict[tuple[str, int], Port] = {}
    for port in _container_ports(spec):
        protocol = PROTOCOLS.get(port.protocol or "TCP")
        if port.name and protocol and 1 <= port.container_port <= 65535:
            made = Port(sys.intern(port.name), protocol, port.container_port)
            found.setdefault((made.name, protocol), made)
    return tuple(sorted(found.values()))


def _host_ports(spec: wire.PodSpec, problems: list[Problem]) -> tuple[HostPort, ...]:
    found: dict[tuple[int, int, Addr | None], HostPort] = {}
    for port in _container_ports(spec):
        if not port.host_port:
            continue
        field = f"hostPort {port.host_port}"
        protocol = protocol_number(port.protocol, field, problems)
        number = port_number(port.host_port, field, problems)
        target = port_number(port.container_port, field, problems)
        host_ip = parse_address(port.host_ip, field, problems) if port.host_ip else None
        if not (protocol and number and target) or (port.host_ip and host_ip is None):
            continue
        made = HostPort(protocol, number, target, host_ip)
        found.setdefault((protocol, number, host_ip), made)
    return tuple(found.values())
