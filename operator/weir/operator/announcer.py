# SPDX-License-Identifier: Apache-2.0
"""Which node answers ARP and ND requests for a load balancer's address: pure, incremental.

Every replica comes to the same result, as it follows from what the API says alone: of the nodes
that can, the one with the highest hash of address and node (rendezvous hashing). So a node that
goes moves its own addresses and no others, and they come back with it.

A node can if it is Ready, is not labelled to be left out, and, where externalTrafficPolicy is
Local, has an endpoint. If no node at all is Ready, it is the nodes' reports that fail and not the
nodes: then those that are not Ready can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import reduce

from weir.api.address import Addr
from weir.api.v1 import weir_pb2 as pb
from weir.operator.objects import EndpointSlice, Key, Node
from weir.operator.pools import Pool, number
from weir.operator.resources import Change
from weir.operator.services import Service

_Weight = tuple[bytes, str]


def weight(addr: Addr, node: str) -> _Weight:
    return hashlib.blake2b(addr + node.encode(), digest_size=8).digest(), node


def elect(addr: Addr, nodes: Iterable[str]) -> str:
    """Empty: there is none."""
    return max((weight(addr, node) for node in nodes), default=(b"", ""))[1]


@dataclass(slots=True)
class Announcer:
    """`announced` is who announces what, as `settle` said last."""

    announced: dict[Addr, str] = field(default_factory=dict)
    _pools: dict[Key, Pool] = field(default_factory=dict)
    _nodes: dict[str, Node] = field(default_factory=dict)
    _services: dict[Key, Service] = field(default_factory=dict)  # with such addresses
    _slices: dict[Key, EndpointSlice] = field(default_factory=dict)
    _slices_of: dict[Key, dict[Key, None]] = field(default_factory=dict)  # by Service
    _users: dict[Addr, dict[Key, None]] = field(default_factory=dict)
    _ready: dict[str, None] = field(default_factory=dict)
    _silent: set[str] = field(default_factory=set)
    _dirty: dict[Addr, None] = field(default_factory=dict)

    # Inputs

    def pool(self, key: Key, new: Pool | None) -> None:
        old = self._pools.pop(key, None)
        if new is not None:
            self._pools[key] = new
        if _content(old) != _content(new):
            self._all_dirty()

    def service(self, key: Key, new: Service | None) -> None:
        old = self._services.pop(key, None)
        for addr in old.load_balancer_ips if old else ():
            del self._users[addr][key]
            if not self._users[addr]:
                del self._users[addr]
            self._dirty[addr] = None
        if new is not None and new.load_balancer_ips:
            self._services[key] = new
            for addr in new.load_balancer_ips:
                self._users.setdefault(addr, {})[key] = None
                self._dirty[addr] = None

    def slice(self, key: Key, new: EndpointSlice | None) -> None:
        old = self._slices.pop(key, None)
        owners = {Key(s.key.namespace, s.service) for s in (old, new) if s and s.service}
        if old is not None and old.service:
            of = Key(old.key.namespace, old.service)
            del self._slices_of[of][key]
            if not self._slices_of[of]:
                del self._slices_of[of]
        if new is not None and new.service:
            self._slices[key] = new
            self._slices_of.setdefault(Key(new.key.namespace, new.service), {})[key] = None
        for owner in owners:
            service = self._services.get(owner)
            if service is not None and service.external_local:
                self._dirty.update(dict.fromkeys(service.load_balancer_ips))

    def node(self, key: Key, new: Node | None) -> None:
        old = self._nodes.pop(key.name, None)
        if new is not None:
            self._nodes[key.name] = new
        # None of a node's can be a Service's.
        addresses = {*(old.addresses if old else ()), *(new.addresses if new else ())}
        self._dirty.update(dict.fromkeys(addr for addr in addresses if addr in self._users))
        self._consider(key.name)

    def silent(self, name: str, on: bool) -> None:
        """A node that nothing is heard of is not Ready, whatever the API still says."""
        self._silent.discard(name)
        if on:
            self._silent.add(name)
        self._consider(name)

    def _consider(self, name: str) -> None:
        """Whether a node can announce, and what that changes."""
        node = self._nodes.get(name)
        after = node is not None and node.ready and node.balances and name not in self._silent
        before = name in self._ready
        if before == after and self._ready:
            return
        self._ready.pop(name, None)
        if not self._ready:
            self._all_dirty()
        if after:
            self._ready[name] = None
        # A node that is no candidate any more matters to what it has; a new one to what it wins.
        for addr in self._users:
            if addr in self._dirty:
                continue
            current = self.announced.get(addr, "")
            concerned = current in ("", name) or self._is_local(addr)
            if concerned or (after and weight(addr, name) > weight(addr, current)):
                self._dirty[addr] = None

    def _all_dirty(self) -> None:
        self._dirty.update(dict.fromkeys(self._users))

    # Outcome

    def settle(self) -> list[Change]:
        dirty, self._dirty = self._dirty, {}
        own = {addr for node in self._nodes.values() for addr in node.addresses} if dirty else ()
        changes = []
        for addr in dirty:
            node = elect(addr, self._candidates(addr)) if self._is_to_be(addr, own) else ""
            if node == self.announced.get(addr, ""):
                continue
            self.announced.pop(addr, None)
            if node:
                self.announced[addr] = node
            changes.append(resource(addr, node))
        return changes

    def _is_to_be(self, addr: Addr, own: Collection[Addr]) -> bool:
        """The pool that was created first decides about what several have."""
        if addr not in self._users or addr in own:
            return False
        value = number(addr)
        having = (pool for pool in self._pools.values() if pool.has(value))
        first = min(having, key=lambda pool: (pool.created, pool.key), default=None)
        return first is not None and first.announce

    def _is_local(self, addr: Addr) -> bool:
        return any(self._services[key].external_local for key in self._users[addr])

    def _candidates(self, addr: Addr) -> Collection[str]:
        able: Collection[str] = self._ready
        if not able:
            able = {name: None for name, node in self._nodes.items() if node.balances}
        users = self._users[addr]
        local = [self._with_endpoints(key) for key in users if self._services[key].external_local]
        if not local:
            return able
        # Who shares an address should have the same endpoints; else any is better than none.
        common = reduce(set.intersection, local) or set().union(*local)
        return [name for name in common if name in able]

    def _with_endpoints(self, service: Key) -> set[str]:
        """Nodes with a ready endpoint; if there are none, with one that serves while it ends."""
        ready: set[str] = set()
        ending: set[str] = set()
        for key in self._slices_of.get(service, ()):
            for endpoint in self._slices[key].endpoints:
                if endpoint.ready:
                    ready.add(endpoint.node)
                elif endpoint.serving and endpoint.terminating:
                    ending.add(endpoint.node)
        return ready or ending


def _content(pool: Pool | None) -> object:
    """What matters here: counts in its status change all the time."""
    return (pool.created, pool.blocks, pool.announce) if pool else None


def resource(addr: Addr, node: str) -> Change:
    """No node: nobody announces it."""
    name = f"announced/{addr.hex()}"
    if not node:
        return Change(name, None)
    message = pb.Announced(address=addr, node=node)
    return Change(name, pb.Resource(name=name, announced=message))
