# SPDX-License-Identifier: Apache-2.0
"""What a Service, or a pod with host ports, asks for on this node: rows and backends, pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from weir.agent import frontends
from weir.agent.frontends import Row, ServiceFacts, SetName, set_name
from weir.agent.resources import HostPort, Service, Slice
from weir.agent.topology import choose
from weir.api.address import Addr, Cidr, is_ipv4
from weir.datapath.records import ServiceFlag

PortName = tuple[str, int]


class Exposed(NamedTuple):
    """A pod of this node with host ports."""

    ports: tuple[HostPort, ...]
    addresses: tuple[Addr, ...]


@dataclass(slots=True)
class Wanted:
    """sets: packed backends, of those that rows lead to. source_ranges: of `ranged` ports."""

    rows: list[Row] = field(default_factory=list)
    sets: dict[SetName, list[bytes]] = field(default_factory=dict)
    affinity_seconds: int = 0
    source_ranges: tuple[Cidr, ...] = ()

    @property
    def ports(self) -> dict[PortName, None]:
        return dict.fromkeys(port_of(row.backends) for row in self.rows)

    @property
    def ranged(self) -> set[PortName]:
        ranged = (row for row in self.rows if row.flags & ServiceFlag.SOURCE_RANGES)
        return {port_of(row.backends) for row in ranged}

    @property
    def tables(self) -> set[SetName]:
        """The sets of which a row wants a Maglev table."""
        return {row.backends for row in self.rows if row.flags & ServiceFlag.MAGLEV}


def port_of(name: SetName) -> PortName:
    return name.port, name.protocol


def of_service(service: Service, slices: Sequence[Slice], facts: ServiceFacts) -> Wanted:
    sets: dict[SetName, list[bytes]] = {}
    reachable: set[SetName] = set()
    for port in service.ports:
        for ipv4 in frontends.families(service):
            choice = choose(slices, port, facts.place, ipv4=ipv4)
            cluster = set_name(port.name, port.protocol, ipv4, False)
            sets[cluster] = choice.cluster
            if service.internal_local or service.external.local:
                sets[set_name(port.name, port.protocol, ipv4, True)] = choice.local
            if choice.anywhere:
                reachable.add(cluster)
    rows = frontends.of_service(service, facts, frozenset(reachable))
    used = {row.backends for row in rows}
    return Wanted(
        rows,
        {name: members for name, members in sets.items() if name in used},
        service.affinity_seconds,
        service.external.source_ranges,
    )


def of_pod(exposed: Exposed, facts: ServiceFacts) -> Wanted:
    wanted = Wanted()
    for item in exposed.ports:
        for addr in exposed.addresses:
            rows = frontends.of_host_port(item, is_ipv4(addr), facts)
            if rows:
                wanted.sets[rows[0].backends] = [addr + item.container_port.to_bytes(2)]
                wanted.rows += rows
    return wanted
