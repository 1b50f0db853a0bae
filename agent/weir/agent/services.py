# SPDX-License-Identifier: Apache-2.0
"""Service rows: services × their slices → (cluster IP, port, protocol) → backends.

A service row's backends never change in place: each change is a new service id with slots of
its own, so that the reconciler can publish it by one update. Survivors keep their slot, so that
a change moves few clients. Without a ready endpoint, serving terminating ones are used (as
kube-proxy does); without those the row says count 0, which refuses.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from weir.agent.backends import ADDRESS_BYTES, SLOT_BYTES, BackendRows, pack, split, unpack
from weir.agent.resources import Service, ServicePort, Slice
from weir.agent.rows import Rows
from weir.api.address import Addr, is_ipv4
from weir.datapath import records

INTERNAL = records.ServiceScope.INTERNAL
ID_LIMIT = 1 << 32
# Ids used and freed just before a restart may linger in conntrack: stay clear of them.
ID_GAP = 1 << 16

ServiceName = tuple[str, str]
T = TypeVar("T", bound=Hashable)


class ServiceTables:
    """Owns the rows of `services` and `backends`."""

    def __init__(self) -> None:
        self.services: Rows[records.ServiceKey, records.Service] = Rows("services")
        self.backends = BackendRows()
        self._services: dict[ServiceName, Service] = {}
        self._slices: dict[str, Slice] = {}
        self._slices_of: dict[ServiceName, dict[str, None]] = {}
        self._keys: dict[ServiceName, tuple[records.ServiceKey, ...]] = {}
        self._owner: dict[records.ServiceKey, ServiceName] = {}
        self._waiting: dict[records.ServiceKey, list[ServiceName]] = {}
        self._adoptable: dict[records.ServiceKey, tuple[int, bytes]] = {}
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
                self._adoptable[key] = (row.id, pack(known))
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
        for service_key, row in self.services.rows.items():
            if row.id == key.service:
                return "/".join(self._owner.get(service_key, ("?", "?")))
        return f"service id {key.service}"

    def listing(self) -> Iterator[tuple[ServiceName, ServicePort, records.ServiceKey]]:
        """For the API: every row with its service and port."""
        for name, service in self._services.items():
            for port in service.ports:
                for address in service.cluster_ips:
                    key = records.ServiceKey(address, port.port, port.protocol, INTERNAL)
                    if self._owner.get(key) == name:
                        yield name, port, key

    def backends_of(self, key: records.ServiceKey) -> tuple[records.Backend, ...]:
        row = self.services.get(key)
        return tuple(unpack(self.backends.slots(row.id))) if row is not None else ()

    def _project(self, name: ServiceName) -> None:
        service = self._services.get(name)
        wanted: dict[records.ServiceKey, list[bytes]] = {}
        if service is not None:
            slices = [self._slices[resource] for resource in self._slices_of.get(name, ())]
            for port in service.ports:
                for address in service.cluster_ips:
                    key = records.ServiceKey(address, port.port, port.protocol, INTERNAL)
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
    ) -> list[bytes]:
        """Those of the cluster IP's family: what the other family has ready is no use to it."""
        ready: dict[bytes, None] = {}
        draining: dict[bytes, None] = {}
        ipv4 = is_ipv4(cluster_ip)
        for item in slices:
            for slice_port in item.ports:
                if slice_port.name != port.name or slice_port.protocol != port.protocol:
                    continue
                suffix = slice_port.port.to_bytes(2)
                for found, addresses in ((ready, item.ready), (draining, item.draining)):
                    for at in range(0, len(addresses), ADDRESS_BYTES):
                        addr = Addr(addresses[at : at + ADDRESS_BYTES])
                        if is_ipv4(addr) == ipv4:
                            found[addr + suffix] = None
        return list(ready or draining)

    def _claim(self, key: records.ServiceKey, name: ServiceName, wanted: list[bytes]) -> None:
        """The first service to claim an address and port has it; others wait for it to go."""
        if self._owner.setdefault(key, name) == name:
            self._publish(key, wanted)
            return
        waiting = self._waiting.setdefault(key, [])
        if name not in waiting:
            waiting.append(name)

    def _disclaim(self, key: records.ServiceKey, name: ServiceName) -> None:
        waiting = self._waiting.get(key, [])
        if name in waiting:
            waiting.remove(name)
        elif waiting:
            self._owner[key] = waiting.pop(0)
            self._project(self._owner[key])
        else:
            del self._owner[key]
            self._retract(key)
        if not waiting:
            self._waiting.pop(key, None)

    def _publish(self, key: records.ServiceKey, wanted: list[bytes]) -> None:
        current = self.services.get(key)
        if current is not None:
            number, slots = current.id, self.backends.slots(current.id)
        else:
            number, slots = self._adoptable.pop(key, (0, b""))
        packed = b"".join(stable_order(split(slots), wanted))
        if current is not None:
            if packed == slots:
                return
            self.backends.drop(number)
        if not number or packed != slots:
            number = self._fresh_id()
        self.backends.put(number, packed)
        self.services.put(key, records.Service(number, len(packed) // SLOT_BYTES, 0, 0))

    def _retract(self, key: records.ServiceKey) -> None:
        row = self.services.get(key)
        if row is not None:
            self.services.drop(key)
            self.backends.drop(row.id)

    def _fresh_id(self) -> int:
        number = self._next_id
        self._next_id = (number + 1) % ID_LIMIT or 1
        return number


def stable_order(slots: Sequence[T], wanted: Sequence[T]) -> Sequence[T]:
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
    return [backend if backend is not None else tail.pop() for backend in result[:length]]
