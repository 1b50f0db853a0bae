# SPDX-License-Identifier: Apache-2.0
"""Which endpoints of a Service a node uses: kube-proxy's rules (pkg/proxy/topology.go), pure.

Cluster traffic policy: ready endpoints, of these the hinted ones where every ready endpoint has a
hint and one of them is for this node, else for its zone; without any ready one, those that
terminate and still serve. Local: ready endpoints on this node, else serving-terminating ones there.

Backends are packed (weir.agent.backends): the endpoint's address and the port.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from weir.agent.resources import NO_HINTS, Hints, ServicePort, Slice
from weir.api.address import Addr, is_ipv4

ADDRESS_BYTES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """The node that chooses."""

    node: str = ""
    zone: str = ""


NOWHERE = Place()


@dataclass(frozen=True, slots=True)
class Choice:
    """anywhere: some node has an endpoint for it, be it no use to this one."""

    cluster: list[bytes] = field(default_factory=list)
    local: list[bytes] = field(default_factory=list)
    anywhere: bool = False


def choose(slices: Iterable[Slice], port: ServicePort, place: Place, *, ipv4: bool) -> Choice:
    """The backends of one port, of one family: what the other has ready is no use to it."""
    ready: dict[bytes, Hints] = {}
    draining: dict[bytes, None] = {}
    local_ready: dict[bytes, None] = {}
    local_draining: dict[bytes, None] = {}
    for item in of_family(slices, ipv4=ipv4):
        for slice_port in item.ports:
            if slice_port.name != port.name or slice_port.protocol != port.protocol:
                continue
            suffix = slice_port.port.to_bytes(2)
            up = [addr + suffix for addr in split(item.ready)]
            down = [addr + suffix for addr in split(item.draining)]
            ready.update(zip(up, item.hints) if item.hints else dict.fromkeys(up, NO_HINTS))  # noqa: B905  hints are of the ready
            draining.update(dict.fromkeys(down))
            if place.node in item.nodes:
                here = [node == place.node for node in item.nodes]
                local_ready.update(dict.fromkeys(_those(up, here)))
                local_draining.update(dict.fromkeys(_those(down, here[len(up) :])))
    return Choice(
        cluster=_hinted(ready, place) or list(draining),
        local=list(local_ready or local_draining),
        anywhere=bool(ready or draining),
    )


def serving(slices: Iterable[Slice], port: ServicePort) -> set[bytes]:
    """All backends that may have flows: ready ones anywhere and those that drain."""
    return _backends(slices, port, lambda item: item.ready + item.draining)


def terminating(slices: Iterable[Slice], port: ServicePort) -> set[bytes]:
    """Backends that drain: they serve what they have, and the rest while nobody else does."""
    return _backends(slices, port, lambda item: item.draining)


def _backends(
    slices: Iterable[Slice], port: ServicePort, of: Callable[[Slice], bytes]
) -> set[bytes]:
    return {
        addr + slice_port.port.to_bytes(2)
        for item in slices
        for slice_port in item.ports
        if slice_port.name == port.name and slice_port.protocol == port.protocol
        for addr in split(of(item))
    }


def local_ready(slices: Iterable[Slice], node: str, *, ipv4: bool) -> int:
    """Addresses of ready endpoints on the node, whatever their ports."""
    found: set[bytes] = set()
    for item in of_family(slices, ipv4=ipv4):
        if node in item.nodes:
            found.update(_those(split(item.ready), [name == node for name in item.nodes]))
    return len(found)


def of_family(slices: Iterable[Slice], *, ipv4: bool) -> Iterator[Slice]:
    for item in slices:
        first = item.ready[:ADDRESS_BYTES] or item.draining[:ADDRESS_BYTES]
        if first and is_ipv4(Addr(first)) == ipv4:
            yield item


def split(packed: bytes) -> list[bytes]:
    """Addresses, which slices keep back to back."""
    return [packed[at : at + ADDRESS_BYTES] for at in range(0, len(packed), ADDRESS_BYTES)]


def _hinted(ready: dict[bytes, Hints], place: Place) -> list[bytes]:
    hints = ready.values()
    if ready and all(hint.nodes for hint in hints):
        near = [backend for backend, hint in ready.items() if place.node in hint.nodes]
        if near:
            return near
    if ready and all(hint.zones for hint in hints):
        near = [backend for backend, hint in ready.items() if place.zone in hint.zones]
        if near:
            return near
    return list(ready)


def _those(items: list[bytes], wanted: list[bool]) -> list[bytes]:
    return [item for item, here in zip(items, wanted, strict=False) if here]
