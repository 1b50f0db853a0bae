# SPDX-License-Identifier: Apache-2.0
"""Services, parsed as kube-proxy reads them; who gets what several claim is `frontends`.

What cannot be understood becomes a `Problem`, and the rest of the Service works: a bad port or
address is left out, an unknown policy or affinity counts as the default one. Source ranges alone
fail closed: they are there to keep somebody out.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from weir.api.address import V4_BITS, V4_PREFIX, Addr, Cidr, cidr, is_ipv4, parse_cidr
from weir.operator import wire
from weir.operator.objects import (
    PROTOCOL_NAMES,
    PROTOCOLS,
    PROXY_NAME,
    Key,
    Parsed,
    Problem,
    key_of,
    parse_address,
    parse_addresses,
    port_number,
    protocol_number,
)

AFFINITY_SECONDS = 10800  # the API's default
AFFINITY_SECONDS_MOST = 86400
# Source ranges that nobody is in, of each family.
NOBODY = (Cidr(Addr(V4_PREFIX + bytes(4)), 128), Cidr(Addr(bytes(16)), 128))
_V4 = Addr(V4_PREFIX + bytes(4))


@dataclass(frozen=True, slots=True)
class ServicePort:
    name: str
    protocol: int
    port: int
    node_port: int = 0  # 0: none


@dataclass(frozen=True, slots=True, order=True)
class Frontend:
    address: Addr
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class Service:
    """`cluster_ips` empty: headless, ExternalName, another proxy's, or not allocated yet; then
    nothing else is there either. No address is in two of the three lists."""

    key: Key
    cluster_ips: tuple[Addr, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    external_ips: tuple[Addr, ...] = ()
    load_balancer_ips: tuple[Addr, ...] = ()  # ipMode VIP
    internal_local: bool = False
    external_local: bool = False
    affinity_seconds: int = 0  # 0: none
    source_ranges: tuple[Cidr, ...] = ()  # no IPv6 one contains the IPv4 ones
    health_check_node_port: int = 0  # 0: none
    created: str = ""  # RFC 3339 in UTC, so that text order is time order
    uid: str = ""
    refused: tuple[Frontend, ...] = ()  # of external and load balancer IPs: another has them


def parse_service(raw: wire.Service) -> Parsed[Service]:
    key, spec = key_of(raw.metadata), raw.spec
    texts = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    texts = [text for text in texts if text and text != "None"]
    if spec.type == "ExternalName" or not texts or PROXY_NAME in (raw.metadata.labels or ()):
        return Parsed(Service(key))
    problems: list[Problem] = []
    if not spec.ports:
        problems.append(Problem("spec.ports", "a Service with a cluster IP needs a port"))
    cluster_ips = parse_addresses(texts, "spec.clusterIPs", problems)
    load_balancer_ips = _load_balancer_ips(raw.status, cluster_ips, problems)
    external_ips = _external_ips(spec, cluster_ips, problems)
    internal = _is_local(spec.internal_traffic_policy, "spec.internalTrafficPolicy", problems)
    external = _is_local(spec.external_traffic_policy, "spec.externalTrafficPolicy", problems)
    external &= spec.type in ("NodePort", "LoadBalancer") or bool(spec.external_ips)
    ports = _ports(spec.ports or [], problems)
    health = 0
    if external and spec.type == "LoadBalancer" and spec.health_check_node_port:
        where = "spec.healthCheckNodePort"
        health = port_number(spec.health_check_node_port, where, problems) or 0
        if any(p.node_port == health and p.protocol == PROTOCOLS["TCP"] for p in ports if health):
            problems.append(
                Problem(where, f"{health} is a nodePort of this Service: choose another")
            )
            health = 0
    service = Service(
        key,
        cluster_ips,
        ports,
        tuple(addr for addr in external_ips if addr not in load_balancer_ips),
        load_balancer_ips,
        internal_local=internal,
        external_local=external,
        affinity_seconds=_affinity(spec, problems),
        source_ranges=_source_ranges(spec.load_balancer_source_ranges or [], problems),
        health_check_node_port=health,
        created=raw.metadata.creation_timestamp or "",
        uid=raw.metadata.uid,
    )
    return Parsed(service, tuple(problems))


def _ports(ports: list[wire.ServicePort], problems: list[Problem]) -> tuple[ServicePort, ...]:
    """What would be there twice is there once: the first."""
    made: list[ServicePort] = []
    numbers: set[tuple[int, int]] = set()
    names: set[tuple[int, str]] = set()
    node_ports: set[tuple[int, int]] = set()
    for i, port in enumerate(ports):
        field = f"spec.ports[{i}]"
        protocol = protocol_number(port.protocol, f"{field}.protocol", problems)
        number = port_number(port.port, f"{field}.port", problems)
        if protocol is None or number is None:
            continue
        name = sys.intern(port.name or "")
        if (protocol, number) in numbers:
            text = f"port {number}/{PROTOCOL_NAMES[protocol]} is there twice: choose another"
            problems.append(Problem(field, text))
            continue
        if (protocol, name) in names:
            text = f"the name {name!r} is there twice: choose another" if name else "needs a name"
            problems.append(Problem(f"{field}.name", text))
            continue
        node_port = 0
        if port.node_port:
            node_port = port_number(port.node_port, f"{field}.nodePort", problems) or 0
        if (protocol, node_port) in node_ports:
            text = f"{node_port} is there twice: choose another"
            problems.append(Problem(f"{field}.nodePort", text))
            node_port = 0
        if node_port:
            node_ports.add((protocol, node_port))
        numbers.add((protocol, number))
        names.add((protocol, name))
        made.append(ServicePort(name, protocol, number, node_port))
    return tuple(made)


def _special(addr: Addr) -> str:
    """What an address is that no Service can have. Empty: one that it can have."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    ip = ipaddress.IPv4Address(addr[12:]) if is_ipv4(addr) else ipaddress.IPv6Address(addr)
    if ip.is_unspecified:
        return "the unspecified address"
    if ip.is_loopback:
        return "a loopback address"
    if ip.is_link_local:
        return "a link-local address"
    if ip.is_multicast:
        return "a multicast address"
    return "the broadcast address" if addr == V4_PREFIX + b"\xff" * 4 else ""


def _usable(text: str, field: str, problems: list[Problem]) -> Addr | None:
    addr = parse_address(text, field, problems)
    if addr is not None and (special := _special(addr)):
        problems.append(Problem(field, f"{text} is {special}, which a Service cannot have"))
        return None
    return addr


def _external_ips(
    spec: wire.ServiceSpec, cluster_ips: tuple[Addr, ...], problems: list[Problem]
) -> tuple[Addr, ...]:
    """A family without a cluster IP has no endpoints either; one that the Service has as cluster
    IP is there already."""
    families = {is_ipv4(addr) for addr in cluster_ips}
    found: dict[Addr, None] = {}
    for i, text in enumerate(spec.external_ips or []):
        if not text.strip():
            continue
        field = f"spec.externalIPs[{i}]"
        addr = _usable(text, field, problems)
        if addr is None:
            continue
        if is_ipv4(addr) not in families:
            family = "IPv4" if is_ipv4(addr) else "IPv6"
            words = f"{text} is of {family}, which the Service is not: add it to spec.ipFamilies"
            problems.append(Problem(field, words))
        elif addr not in cluster_ips:
            found[addr] = None
    return tuple(found)


def _load_balancer_ips(
    status: wire.ServiceStatus | None, cluster_ips: tuple[Addr, ...], problems: list[Problem]
) -> tuple[Addr, ...]:
    """Those that nodes take in. Other families than the Service's are the load balancer's own."""
    ingress = status.load_balancer.ingress if status and status.load_balancer else None
    families = {is_ipv4(addr) for addr in cluster_ips}
    found: dict[Addr, None] = {}
    for i, entry in enumerate(ingress or []):
        if entry.ip and entry.ip_mode in (None, "VIP"):
            addr = _usable(entry.ip, f"status.loadBalancer.ingress[{i}].ip", problems)
            if addr is not None and is_ipv4(addr) in families and addr not in cluster_ips:
                found[addr] = None
    return tuple(found)


def _is_local(policy: str | None, field: str, problems: list[Problem]) -> bool:
    if policy not in (None, "", "Cluster", "Local"):
        problems.append(
            Problem(field, f"{policy!r} is neither Cluster nor Local: taken as Cluster")
        )
    return policy == "Local"


def _affinity(spec: wire.ServiceSpec, problems: list[Problem]) -> int:
    kind = spec.session_affinity
    if kind not in (None, "", "None", "ClientIP"):
        text = f"{kind!r} is neither None nor ClientIP: taken as None"
        problems.append(Problem("spec.sessionAffinity", text))
    if kind != "ClientIP":
        return 0
    config = spec.session_affinity_config
    seconds = config.client_ip.timeout_seconds if config and config.client_ip else None
    if seconds is None:
        return AFFINITY_SECONDS
    if not 1 <= seconds <= AFFINITY_SECONDS_MOST:
        text = f"{seconds} is not between 1 and {AFFINITY_SECONDS_MOST}: taken as "
        text += str(AFFINITY_SECONDS)
        where = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        problems.append(Problem(where, text))
        return AFFINITY_SECONDS
    return seconds


def _source_ranges(texts: list[str], problems: list[Problem]) -> tuple[Cidr, ...]:
    """A family without a range is open to everybody, and so is one with a range of length 0. One
    that does not parse may have been meant to restrict either family."""
    found: dict[bool, dict[Cidr, None]] = {True: {}, False: {}}
    bad = False
    for i, text in enumerate(texts):
        if not text.strip():
            continue
        try:
            made = parse_cidr(text.strip())
        except ValueError as error:
            bad = True
            words = f"{error}: write it like 192.0.2.0/24 or 2001:db8::/64"
            problems.append(Problem(f"spec.loadBalancerSourceRanges[{i}]", words))
            continue
        found[made.is_ipv4][made] = None
    for nobody in NOBODY:
        ranges = found[nobody.is_ipv4]
        if any(made.bits == (V4_BITS if made.is_ipv4 else 0) for made in ranges):
            ranges.clear()
        elif bad and not ranges:
            ranges[nobody] = None
    v6 = (part for made in found[False] for part in _without_ipv4(made))
    return tuple(sorted({*found[True], *v6}))


def _without_ipv4(made: Cidr) -> Iterator[Cidr]:
    """An IPv6 prefix as those without the mapped IPv4 addresses, which its text does not mean."""
    if not made.contains(_V4):
        yield made
        return
    for bits in range(made.bits + 1, V4_BITS + 1):
        at = (bits - 1) // 8
        other = bytearray(_V4)
        other[at] ^= 1 << (7 - (bits - 1) % 8)
        yield cidr(Addr(bytes(other)), bits)
