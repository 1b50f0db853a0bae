# SPDX-License-Identifier: Apache-2.0
"""Where a Service, or a pod with host ports, is reached on this node: rows of `services`, pure.

A row says which of a port's sets of backends it leads to. SCOPE_INTERNAL is everybody's, except
that clients outside the cluster use SCOPE_EXTERNAL where externalTrafficPolicy is Local: pods and
nodes ignore that policy, as with kube-proxy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

from weir.agent.resources import FrontendPort, HostPort, Service
from weir.agent.topology import NOWHERE, Place
from weir.api.address import Addr, Cidr, is_ipv4, parse
from weir.datapath.records import ServiceFlag, ServiceKey, ServiceScope

INTERNAL, EXTERNAL = int(ServiceScope.INTERNAL), int(ServiceScope.EXTERNAL)
UNSPECIFIED = (parse("0.0.0.0"), parse("::"))  # noqa: S104  compared with, not bound


class Rank(IntEnum):
    """Who goes first where two claim an address and port."""

    CLUSTER_IP = 0
    NODE_PORT = 1
    LOAD_BALANCER = 2
    EXTERNAL_IP = 3
    HOST_PORT = 4


@dataclass(frozen=True, slots=True)
class NodePortRule:
    """Which of a node's addresses node ports answer at: those in `cidrs`, or of a family without
    one all (as kube-proxy has it), or the node's InternalIPs only."""

    cidrs: tuple[Cidr, ...] = ()
    primary: bool = False


ALL_ADDRESSES = NodePortRule()


def node_port_addresses(
    rule: NodePortRule, primary: Iterable[Addr], local: Iterable[Addr]
) -> tuple[Addr, ...]:
    if rule.primary:
        return tuple(dict.fromkeys(primary))
    given = {cidr.is_ipv4 for cidr in rule.cidrs}
    return tuple(
        dict.fromkeys(
            addr
            for addr in local
            if is_ipv4(addr) not in given or any(cidr.contains(addr) for cidr in rule.cidrs)
        )
    )


class SetName(NamedTuple):
    """One set of backends of a Service: port name and protocol, family, traffic policy Local."""

    port: str
    protocol: int
    ipv4: bool
    local: bool


class Row(NamedTuple):
    key: ServiceKey
    backends: SetName
    flags: int
    rank: Rank


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """What the rows depend on besides the resources. node_ports_at: where node ports answer.
    own: addresses of this node's sockets. maglev_table_size: 0 chooses at random. dsr: backends
    elsewhere answer the client themselves."""

    place: Place = NOWHERE
    node_ports_at: tuple[Addr, ...] = ()
    own: frozenset[Addr] = frozenset()
    maglev_table_size: int = 0
    dsr: bool = False


@lru_cache(maxsize=4096)
def set_name(port: str, protocol: int, ipv4: bool, local: bool) -> SetName:
    """One object for all that are equal: most Services have the ports of many others."""
    return SetName(port, protocol, ipv4, local)


def families(service: Service) -> tuple[bool, ...]:
    """IPv4: True. Those of its cluster IPs: it has no frontend in another."""
    return tuple(dict.fromkeys(is_ipv4(addr) for addr in service.cluster_ips))


def of_service(service: Service, facts: ServiceFacts, reachable: frozenset[SetName]) -> list[Row]:
    """`reachable`: by their name for policy Cluster, the ports that have an endpoint anywhere."""
    rows: list[Row] = []
    for number, port in enumerate(service.ports):
        for ipv4 in families(service):
            cluster = set_name(port.name, port.protocol, ipv4, False)
            local = set_name(port.name, port.protocol, ipv4, True)
            silent = ServiceFlag.LOCAL if cluster in reachable else 0
            for addr in _of_family(service.cluster_ips, ipv4):
                key = ServiceKey(addr, port.port, port.protocol, INTERNAL)
                if service.internal_local:
                    rows.append(Row(key, local, int(silent), Rank.CLUSTER_IP))
                else:
                    rows.append(Row(key, cluster, 0, Rank.CLUSTER_IP))
            for key, rank in _external(service, number, facts, ipv4):
                flags = outside = 0
                if rank is Rank.LOAD_BALANCER and ranges(service, ipv4):
                    flags |= ServiceFlag.SOURCE_RANGES
                if facts.maglev_table_size:
                    outside |= ServiceFlag.MAGLEV
                if service.external.local:
                    both = int(flags | ServiceFlag.EXTERNAL_ROW)
                    rows.append(Row(key, cluster, both, rank))
                    outer = ServiceKey(key.address, key.port, key.protocol, EXTERNAL)
                    rows.append(Row(outer, local, int(flags | outside | silent), rank))
                else:
                    outside |= ServiceFlag.DSR if facts.dsr else 0
                    rows.append(Row(key, cluster, int(flags | outside), rank))
    return rows


def ranges(service: Service, ipv4: bool) -> list[Cidr]:
    """Of one family: without any, all its clients may come."""
    return [cidr for cidr in service.external.source_ranges if cidr.is_ipv4 == ipv4]


def of_host_port(item: HostPort, ipv4: bool, facts: ServiceFacts) -> list[Row]:
    """Rows of a host port for one family of its pod's addresses."""
    name = set_name(str(item.host_port), item.protocol, ipv4, False)
    if item.host_ip is None or item.host_ip in UNSPECIFIED:
        addresses: Iterable[Addr] = facts.node_ports_at
        if item.host_ip is not None and is_ipv4(item.host_ip) != ipv4:
            addresses = ()
    else:
        addresses = (item.host_ip,)
    return [
        Row(ServiceKey(addr, item.host_port, item.protocol, INTERNAL), name, 0, Rank.HOST_PORT)
        for addr in _of_family(addresses, ipv4)
    ]


def _external(
    service: Service, number: int, facts: ServiceFacts, ipv4: bool
) -> Iterator[tuple[ServiceKey, Rank]]:
    external, port = service.external, service.ports[number]
    if external.node_ports and external.node_ports[number]:
        for addr in _of_family(facts.node_ports_at, ipv4):
            key = ServiceKey(addr, external.node_ports[number], port.protocol, INTERNAL)
            yield key, Rank.NODE_PORT
    for rank, addresses in (
        (Rank.LOAD_BALANCER, external.load_balancer_ips),
        (Rank.EXTERNAL_IP, external.external_ips),
    ):
        for addr in _of_family(addresses, ipv4):
            if FrontendPort(addr, port.protocol, port.port) not in external.refused:
                yield ServiceKey(addr, port.port, port.protocol, INTERNAL), rank


def _of_family(addresses: Iterable[Addr], ipv4: bool) -> list[Addr]:
    return [addr for addr in addresses if is_ipv4(addr) == ipv4]
