# SPDX-License-Identifier: Apache-2.0
"""Rows of Services and host ports: frontends → sets of backends.

What each asks for is pure (weir.agent.wanted); here is who gets an address and port that several
ask for, and the numbers: ids of sets (weir.agent.sets), and identities. A port's identity is the
same on all of its frontends and stays across restarts, as rows in the kernel (affinity, source
ranges) go by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weir.agent import wanted as requests
from weir.agent.backends import split, unpack
from weir.agent.claims import Claims
from weir.agent.frontends import EXTERNAL, INTERNAL, Rank, Row, ServiceFacts, SetName
from weir.agent.resources import Service, ServicePort, Slice
from weir.agent.rows import Rows
from weir.agent.sets import Adoption, Counter, SetTables
from weir.agent.topology import ADDRESS_BYTES, local_ready, serving
from weir.agent.wanted import Exposed, PortName, Wanted, port_of
from weir.datapath import records
from weir.datapath.records import ServiceFlag

IDENTITY_BITS = 32
ALLOWED = 1

ServiceName = tuple[str, str]

HOST_PORTS = "host ports of "
"""Begins the name of a pod with host ports, which no Service has."""


@dataclass(frozen=True, slots=True)
class Projected:
    """What one got: claimed keys of SCOPE_INTERNAL, ids of its sets, identities of its ports."""

    keys: tuple[records.ServiceKey, ...] = ()
    sets: tuple[tuple[SetName, int], ...] = ()
    identities: tuple[tuple[PortName, int], ...] = ()
    ranges: frozenset[records.SourceRangeKey] = frozenset()


NOTHING = Projected()


class ServiceTables:
    """Owns the rows of `services`, `backends`, `maglev` and `source_ranges`."""

    def __init__(self) -> None:
        self.services: Rows[records.ServiceKey, records.Service] = Rows("services")
        self.source_ranges: Rows[records.SourceRangeKey, int] = Rows("source_ranges")
        self.claims: Claims[records.ServiceKey, ServiceName] = Claims()
        self.health_checks: dict[ServiceName, int] = {}
        self.facts = ServiceFacts()
        self._adoption = Adoption()
        self._sets = SetTables(self._adoption)
        self.backends = self._sets.backends
        self.maglev = self._sets.maglev
        self._identities = Counter()
        self._services: dict[ServiceName, Service] = {}
        self._exposed: dict[ServiceName, Exposed] = {}
        self._slices: dict[str, Slice] = {}
        self._slices_of: dict[ServiceName, dict[str, None]] = {}
        self._projected: dict[ServiceName, Projected] = {}
        self._host_backed: set[ServiceName] = set()
        # In order: of those that come together, the first gets what several claim.
        self._dirty: dict[ServiceName, None] = {}

    # ---- inputs

    def set_service(self, service: Service) -> None:
        name = (service.namespace, service.name)
        self._services[name] = service
        self._dirty[name] = None

    def remove_service(self, name: ServiceName) -> None:
        if self._services.pop(name, None) is not None:
            self._dirty[name] = None

    def set_slice(self, resource: str, item: Slice) -> None:
        self.remove_slice(resource)
        name = (item.namespace, item.service)
        self._slices[resource] = item
        self._slices_of.setdefault(name, {})[resource] = None
        self._dirty[name] = None

    def remove_slice(self, resource: str) -> None:
        old = self._slices.pop(resource, None)
        if old is None:
            return
        name = (old.namespace, old.service)
        del self._slices_of[name][resource]
        if not self._slices_of[name]:
            del self._slices_of[name]
        self._dirty[name] = None

    def set_exposed(self, exposed: Mapping[ServiceName, Exposed]) -> None:
        """All pods of this node with host ports, by (namespace, HOST_PORTS + name)."""
        for name in (*self._exposed, *exposed):
            if self._exposed.get(name) != exposed.get(name):
                self._dirty[name] = None
        self._exposed = dict(exposed)

    def set_facts(self, facts: ServiceFacts) -> None:
        if facts != self.facts:
            self.facts = facts
            self._sets.maglev_table_size = facts.maglev_table_size
            self._dirty |= dict.fromkeys((*self._services, *self._exposed))

    def adopt(
        self,
        services: Mapping[records.ServiceKey, records.Service],
        backends: Mapping[records.BackendKey, records.Backend],
        identities: Iterable[int] = (),
    ) -> None:
        """What the kernel holds after a restart. `identities`: others that rows go by."""
        self._adoption.learn(services, backends)
        ids = {row.id for row in services.values()}
        self._sets.ids.skip(ids | {key.service for key in backends})
        self._identities.skip({row.identity for row in services.values()} | set(identities))

    def forget_adoptable(self) -> None:
        self._adoption.forget()

    # ---- questions

    @property
    def features(self) -> int:
        return int(records.RuntimeFeature.HOST_BACKENDS) if self._host_backed else 0

    @property
    def all_services(self) -> Mapping[ServiceName, Service]:
        return self._services

    @property
    def exposed(self) -> Mapping[ServiceName, Exposed]:
        return self._exposed

    def slices_of(self, name: ServiceName) -> list[Slice]:
        return [self._slices[resource] for resource in self._slices_of.get(name, ())]

    def rows_of(self, name: ServiceName) -> list[Row]:
        """Its frontends, also those that another has."""
        return self._wanted(name).rows

    def owner(self, key: records.ServiceKey) -> ServiceName | None:
        return self.claims.owner(_with_scope(key, INTERNAL))

    def owner_of_id(self, number: int) -> str:
        for name, projected in self._projected.items():
            if any(number == known for _, known in projected.sets):
                return describe(name)
        return f"service id {number}"

    def owner_of_identity(self, identity: int) -> str:
        for name, projected in self._projected.items():
            if any(identity == known for _, known in projected.identities):
                return describe(name)
        return f"service identity {identity}"

    def backends_of(self, key: records.ServiceKey) -> tuple[records.Backend, ...]:
        row = self.services.get(key)
        return tuple(unpack(self.backends.packed(row.id))) if row is not None else ()

    def serving(self, key: records.ServiceKey) -> set[bytes] | None:
        """Packed backends that may have flows through a frontend: those that it leads to, and those
        that drain. None: it is no frontend."""
        name, published = self.owner(key), self.services.get(key)
        if name is None or published is None:
            return None
        found = set(split(self.backends.packed(published.id)))
        row = next((row for row in self._wanted(name).rows if row.key == key), None)
        if row is not None and name in self._services:
            port = ServicePort(row.backends.port, row.backends.protocol, 0)
            found |= serving(self.slices_of(name), port)
        return found

    def local_endpoints(self, name: ServiceName, *, ipv4: bool) -> int:
        """What a health check answers: ready endpoints on this node."""
        return local_ready(self.slices_of(name), self.facts.place.node, ipv4=ipv4)

    # ---- projection

    def project(self) -> None:
        while self._dirty:
            name = next(iter(self._dirty))
            del self._dirty[name]
            self._project(name)

    def _wanted(self, name: ServiceName) -> Wanted:
        service = self._services.get(name)
        if service is not None:
            return requests.of_service(service, self.slices_of(name), self.facts)
        exposed = self._exposed.get(name)
        return requests.of_pod(exposed, self.facts) if exposed is not None else Wanted()

    def _project(self, name: ServiceName) -> None:
        old = self._projected.get(name, NOTHING)
        wanted = self._wanted(name)
        self._note(name, wanted)
        identities = self._identify(dict(old.identities), wanted)
        sets = self._sets.publish(dict(old.sets), wanted)
        ranges = self._publish_ranges(old.ranges, wanted, identities)
        keys = tuple(row.key for row in wanted.rows if row.key.scope == INTERNAL)
        for key in old.keys:
            if key not in keys:
                self._disclaim(key, name)
        for row in wanted.rows:
            if row.key.scope == INTERNAL and self.claims.claim(row.key, name, row.rank):
                self.services.drop(_with_scope(row.key, EXTERNAL))
        outer = {row.key for row in wanted.rows if row.key.scope == EXTERNAL}
        for row in wanted.rows:
            if self.owner(row.key) != name:
                continue
            number, identity = sets[row.backends], identities[port_of(row.backends)]
            flags = row.flags
            if flags & ServiceFlag.MAGLEV and number not in self.maglev:
                flags &= ~ServiceFlag.MAGLEV
            count = self._sets.count(number)
            self.services.put(
                row.key,
                records.Service(number, count, flags, wanted.affinity_seconds, identity),
            )
            if row.key.scope == INTERNAL and row.rank is not Rank.CLUSTER_IP:
                other = _with_scope(row.key, EXTERNAL)
                if other not in outer:
                    self.services.drop(other)
        if keys:
            keys = old.keys if old.keys == keys else keys
            self._projected[name] = Projected(
                keys, tuple(sets.items()), tuple(identities.items()), ranges
            )
        else:
            self._projected.pop(name, None)

    def _note(self, name: ServiceName, wanted: Wanted) -> None:
        service = self._services.get(name)
        port = service.external.health_check_node_port if service else 0
        if port:
            self.health_checks[name] = port
        else:
            self.health_checks.pop(name, None)
        own = self.facts.own
        if any(slot[:ADDRESS_BYTES] in own for members in wanted.sets.values() for slot in members):
            self._host_backed.add(name)
        else:
            self._host_backed.discard(name)

    def _disclaim(self, key: records.ServiceKey, name: ServiceName) -> None:
        had = self.claims.owner(key) == name
        following = self.claims.release(key, name)
        if had:
            self.services.drop(key)
            self.services.drop(_with_scope(key, EXTERNAL))
        if following is not None:
            self._dirty[following] = None

    def _identify(self, known: Mapping[PortName, int], wanted: Wanted) -> dict[PortName, int]:
        return {
            port: known.get(port)
            or self._adoption.identity(wanted, port)
            or self._identities.take()
            for port in wanted.ports
        }

    def _publish_ranges(
        self,
        old: frozenset[records.SourceRangeKey],
        wanted: Wanted,
        identities: Mapping[PortName, int],
    ) -> frozenset[records.SourceRangeKey]:
        if not old and not wanted.source_ranges:
            return old
        ranges = frozenset(
            records.SourceRangeKey(IDENTITY_BITS + cidr.bits, identities[port], cidr.address)
            for port in wanted.ranged
            for cidr in wanted.source_ranges
        )
        for key in old - ranges:
            self.source_ranges.drop(key)
        for key in ranges:
            self.source_ranges.put(key, ALLOWED)
        return ranges


def describe(name: ServiceName) -> str:
    """As its user knows it."""
    namespace, rest = name
    if rest.startswith(HOST_PORTS):
        return f"{HOST_PORTS}pod {namespace}/{rest.removeprefix(HOST_PORTS)}"
    return f"service {namespace}/{rest}"


def _with_scope(key: records.ServiceKey, scope: int) -> records.ServiceKey:
    if key.scope == scope:
        return key
    return records.ServiceKey(key.address, key.port, key.protocol, scope)
