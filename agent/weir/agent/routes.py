# SPDX-License-Identifier: Apache-2.0
"""Rows of `routes` and the host routes that go with them, from nodes and settings.

Both follow from the same facts, so they are projected by one function: the map tells the
programs what is a pod address and which node to encapsulate to, the host routes tell the stack.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from weir.agent.placement import LOCAL_HOST, REMOTE_NODE, NodeAddress
from weir.agent.resources import Node
from weir.agent.rows import Rows
from weir.api.address import Addr, Cidr, is_ipv4
from weir.datapath import records

POD_CIDR = 1
LOCAL = 2
TUNNEL = 4
NO_MASQUERADE = 8
NOWHERE = Addr(b"\0" * 16)


@dataclass(frozen=True, slots=True)
class HostRoute:
    """A route of this node's stack to another node's pods. via None: through the overlay."""

    destination: Cidr
    via: Addr | None
    source: Addr | None


@dataclass(frozen=True, slots=True)
class RouteFacts:
    """What routing depends on besides the Node resources."""

    node: str
    addresses: tuple[Addr, ...] = ()  # this node's, for both families, the underlay's first
    local: tuple[Addr, ...] = ()  # every global address of this node
    tunnel: bool = True
    no_masquerade: tuple[Cidr, ...] = ()


class RouteTables:
    def __init__(self) -> None:
        self.rows: Rows[records.PrefixKey, records.Route] = Rows("routes")
        self._nodes: dict[str, Node] = {}
        self._facts = RouteFacts("")
        self._dirty = False
        self.host_routes: frozenset[HostRoute] = frozenset()

    def set_node(self, name: str, node: Node | None) -> None:
        if node is None:
            self._nodes.pop(name, None)
        else:
            self._nodes[name] = node
        self._dirty = True

    def set_facts(self, facts: RouteFacts) -> None:
        if facts != self._facts:
            self._facts = facts
            self._dirty = True

    @property
    def facts(self) -> RouteFacts:
        return self._facts

    @property
    def own_node(self) -> Node | None:
        return self._nodes.get(self._facts.node)

    @property
    def stays(self) -> bool:
        """Whether this node is known, and not about to be taken away."""
        own = self.own_node
        return own is not None and not own.leaving

    @property
    def nodes(self) -> Mapping[str, Node]:
        return self._nodes

    def project(self) -> Mapping[Addr, NodeAddress] | None:
        """Rows and host routes. Returns all nodes' addresses, None if nothing changed."""
        if not self._dirty:
            return None
        self._dirty = False
        wanted: dict[records.PrefixKey, records.Route] = {}
        host_routes: set[HostRoute] = set()
        found: dict[Addr, NodeAddress] = {}
        for node in self._nodes.values():
            if node.name != self._facts.node:
                self._remote(node, wanted, host_routes, found)
        own = self.own_node
        for pod_cidr in own.pod_cidrs if own else ():
            _add(wanted, pod_cidr, POD_CIDR | LOCAL, NOWHERE)
        for addr in (*self._facts.local, *self._facts.addresses):
            found[addr] = NodeAddress(LOCAL_HOST)
        for addr in own.addresses if own else ():
            found[addr] = NodeAddress(LOCAL_HOST, own.wire_class if own else None)
        for prefix in self._facts.no_masquerade:
            _add(wanted, prefix, NO_MASQUERADE, NOWHERE)
        for key in [key for key in self.rows.rows if key not in wanted]:
            self.rows.drop(key)
        for key, row in wanted.items():
            self.rows.put(key, row)
        self.host_routes = frozenset(host_routes)
        return found

    def _remote(
        self,
        node: Node,
        wanted: dict[records.PrefixKey, records.Route],
        host_routes: set[HostRoute],
        found: dict[Addr, NodeAddress],
    ) -> None:
        own = self._facts.addresses
        underlay = next((a for a in node.addresses if own and is_ipv4(a) == is_ipv4(own[0])), None)
        tunnel = TUNNEL if self._facts.tunnel and underlay is not None else 0
        target = underlay if tunnel and underlay is not None else NOWHERE
        for addr in node.addresses:
            found[addr] = NodeAddress(REMOTE_NODE, node.wire_class)
            extra = tunnel or NO_MASQUERADE
            _add(wanted, Cidr(addr, 128), extra, target)
        for pod_cidr in node.pod_cidrs:
            _add(wanted, pod_cidr, POD_CIDR | tunnel, target)
            source = _first(own, pod_cidr.is_ipv4)
            via = None if tunnel else _first(node.addresses, pod_cidr.is_ipv4)
            if tunnel or via is not None:
                host_routes.add(HostRoute(pod_cidr, via, source))


def _first(addresses: Iterable[Addr], ipv4: bool) -> Addr | None:
    return next((addr for addr in addresses if is_ipv4(addr) == ipv4), None)


def _add(
    wanted: dict[records.PrefixKey, records.Route], prefix: Cidr, flags: int, node: Addr
) -> None:
    key = records.PrefixKey(prefix.bits, prefix.address)
    old = wanted.get(key)
    if old is not None:
        flags |= old.flags
        node = old.node if node == NOWHERE else node
    wanted[key] = records.Route(node, flags)
