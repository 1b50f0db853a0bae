# SPDX-License-Identifier: Apache-2.0
"""Service rows: services × their slices → (cluster IP, port, protocol) → backends.

A service row's backends never change in place: each change is a new service id with slots of
its own, so that the reconciler can publish it by one update. Survivors keep their slot, so that
a change moves few clients. Without a ready endpoint, serving terminating ones are used (as
kube-proxy does); without those the row says count 0, which refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from weir.agent.resources import Service, ServicePort, Slice, same_family
from weir.agent.rows import Rows
from weir.api.address import Addr
from weir.datapath import records

SCOPE_CLUSTER = 0
ID_LIMIT = 1 << 32
# Ids used and freed just before a restart may linger in conntrack: stay clear of them.
ID_GAP = 1 << 16

ServiceName = tuple[str, str]


class ServiceTables:
    """Owns the rows of `services` and `backends`."""

    def __init__(self) -> None:
        self.services: Rows[records.ServiceKey, records.Service] = Rows("services")
        self.backends: Rows[records.BackendKey, records.Backend] = Rows("backends")
        self._services: dict[ServiceName, Service] = {}
        self._slices: dict[str, Slice] = {}
        self._slices_of: dict[ServiceName, dict[str, None]] = {}
        self._keys: dict[ServiceName, tuple[records.ServiceKey, ...]] = {}
        self._owner: dict[records.ServiceKey, ServiceName] = {}
        self._claims: dict[records.ServiceKey, list[ServiceName]] = {}
        self._current: dict[records.ServiceKey, tuple[int, tuple[records.Backend, ...]]] = {}
        self._adoptable: dict[records.ServiceKey, tuple[int, tuple[records.Backend, ...]]] = {}
        self._next_id = 1
        self._dirty: set[ServiceName] = set()

    # ---- inputs

    def set_service(self, service: Service) -> None:
        name = (service.namespace, service.name)
        self._services[name] = service
        self._dirty.add(name)

    def remove_service(self, name: ServiceName) -> None:
        if self._services.pop(name, None) is not None:
            self._dirty.add(name)

    def set_slice(self, resource: str, item: Slice) -> None:
        self.remove_slice(resource)
        name = (item.namespace, item.service)
        self._slices[resource] = item
        self._slices_of.setdefault(name, {})[resource] = None
        self._dirty.add(name)

    def remove_slice(self, resource: str) -> None:
        old = self._slices.pop(resource, None)
        if old is None:
            return
        name = (old.namespace, old.service)
        del self._slices_of[name][resource]
        if not self._slices_of[name]:
            del self._slices_of[name]
        self._dirty.add(name)

    def adopt(
        self,
        services: Mapping[records.ServiceKey, records.Service],
        backends: Mapping[records.BackendKey, records.Backend],
    ) -> None:
        """What the kernel holds after a restart: unchanged services keep their ids and slots."""
        for key, row in services.items():
            slots = [backends.get(records.BackendKey(row.id, slot)) for slot in range(row.count)]
            known = tuple(slot for slot in slots if slot is not None)
            if len(known) == row.count:
                self._adoptable[key] = (row.id, known)
        highest = max((row.id for row in services.values()), default=0)
        highest = max(highest, max((key.service for key in backends), default=0))
        if highest:
            self._next_id = (highest + ID_GAP) % ID_LIMIT or 1

    def forget_adoptable(self) -> None:
        self._adoptable.clear()

    # ---- projection

    def project(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for name in dirty:
            self._project(name)

    def owner(self, key: records.ServiceKey) -> ServiceName | None:
        return self._owner.get(key)

    def owner_of_backend(self, key: records.BackendKey) -> str:
        for service_key, (number, _) in self._current.items():
            if number == key.service:
                return "/".join(self._owner.get(service_key, ("?", "?")))
        return f"service id {key.service}"

    def listing(self) -> Iterator[tuple[ServiceName, ServicePort, records.ServiceKey]]:
        """For the API: every row with its service and port."""
        for name, service in self._services.items():
            for port in service.ports:
                for address in service.cluster_ips:
                    key = records.ServiceKey(address, port.port, port.protocol, SCOPE_CLUSTER)
                    if self._owner.get(key) == name:
                        yield name, port, key

    def backends_of(self, key: records.ServiceKey) -> tuple[records.Backend, ...]:
        return self._current[key][1] if key in self._current else ()

    def _project(self, name: ServiceName) -> None:
        service = self._services.get(name)
        wanted: dict[records.ServiceKey, tuple[records.Backend, ...]] = {}
        if service is not None:
            slices = [self._slices[resource] for resource in self._slices_of.get(name, ())]
            for port in service.ports:
                for address in service.cluster_ips:
                    key = records.ServiceKey(address, port.port, port.protocol, SCOPE_CLUSTER)
                    wanted[key] = self._endpoints(port, slices, address)
        for key in self._keys.get(name, ()):
            if key not in wanted:
                self._disclaim(key, name)
        for key, members in wanted.items():
            self._claim(key, name, members)
        if wanted:
            self._keys[name] = tuple(wanted)
        else:
            self._keys.pop(name, None)

    def _endpoints(
        self, port: ServicePort, slices: Iterable[Slice], cluster_ip: Addr
    ) -> tuple[records.Backend, ...]:
        """Those of the cluster IP's family: what the other family has ready is no use to it."""
        ready: dict[records.Backend, None] = {}
        draining: dict[records.Backend, None] = {}
        for item in slices:
            for slice_port in item.ports:
                if slice_port.name != port.name or slice_port.protocol != port.protocol:
                    continue
                for endpoint in item.endpoints:
                    if not same_family(endpoint.address, cluster_ip):
                        continue
                    backend = records.Backend(endpoint.address, slice_port.port)
                    if endpoint.ready:
                        ready[backend] = None
                    elif endpoint.serving and endpoint.terminating:
                        draining[backend] = None
        return tuple(ready or draining)

    def _claim(
        self,
        key: records.ServiceKey,
        name: ServiceName,
        wanted: tuple[records.Backend, ...],
    ) -> None:
        """The first service to claim an address and port has it; others wait for it to go."""
        claims = self._claims.setdefault(key, [])
        if name not in claims:
            claims.append(name)
        if claims[0] != name:
            return
        self._owner[key] = name
        self._publish(key, wanted)

    def _disclaim(self, key: records.ServiceKey, name: ServiceName) -> None:
        claims = self._claims.get(key, [])
        if name in claims:
            claims.remove(name)
        if self._owner.get(key) != name:
            return
        del self._owner[key]
        if claims:
            self._dirty.add(claims[0])
            self._project(claims[0])
            return
        self._claims.pop(key, None)
        self._retract(key)

    def _publish(self, key: records.ServiceKey, wanted: tuple[records.Backend, ...]) -> None:
        current = self._current.get(key)
        number, slots = current or self._adoptable.pop(key, (0, ()))
        order = stable_order(slots, wanted)
        if current is not None:
            if order == slots:
                return
            self._drop_slots(number, len(slots))
        if not number or order != slots:
            number = self._fresh_id()
        self._current[key] = (number, order)
        self.backends.add(
            {records.BackendKey(number, slot): backend for slot, backend in enumerate(order)}
        )
        self.services.put(key, records.Service(number, len(order), 0, 0))

    def _retract(self, key: records.ServiceKey) -> None:
        number, slots = self._current.pop(key)
        self.services.drop(key)
        self._drop_slots(number, len(slots))

    def _drop_slots(self, number: int, count: int) -> None:
        for slot in range(count):
            self.backends.drop(records.BackendKey(number, slot))

    def _fresh_id(self) -> int:
        number = self._next_id
        self._next_id = (number + 1) % ID_LIMIT or 1
        return number


def stable_order(
    slots: tuple[records.Backend, ...], wanted: tuple[records.Backend, ...]
) -> tuple[records.Backend, ...]:
    """`wanted` in an order that moves as few of `slots` as possible: newcomers take the slots of
    those that left, and the last ones move into slots that stay empty."""
    if not slots:
        return wanted
    members = set(wanted)
    if members == set(slots) and len(slots) == len(members):
        return slots
    kept = set(slots) & members
    newcomers = iter([backend for backend in wanted if backend not in kept])
    result = [backend if backend in kept else next(newcomers, None) for backend in slots]
    result += newcomers
    length = len(members)
    tail = [backend for backend in result[length:] if backend is not None]
    head = [backend if backend is not None else tail.pop() for backend in result[:length]]
    return tuple(head)
