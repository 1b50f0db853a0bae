# SPDX-License-Identifier: Apache-2.0
"""Flows for people: `weir ct list` and `weir ct flush`.

A table has up to millions of flows, so they pass through batch by batch: rows are filtered and
encoded in a thread; in between the event loop names what is new of pods and Services, each once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from weir.agent.explain import Party
from weir.agent.sweep import Place
from weir.agent.tables import Projection
from weir.agent.verdict import PROTOCOLS
from weir.agent.walks import AnyBatch, Walks
from weir.api.address import Addr, parse, text
from weir.datapath.datapath import Tables
from weir.datapath.records import CtEntry, CtFlag, CtKey, ServiceKey, ServiceScope
from weir.datapath.view import View

CONNECTIONS = (6, 132)  # TCP and SCTP say when a flow opens and closes
REMEMBERED = 1 << 14
OF_KEY = ("low", "high", "low_port", "high_port", "protocol")
OF_VALUE = ("expires", "generation", "flags", "nat_address", "nat_port")
NUMBERS = {name.lower(): number for number, name in PROTOCOLS.items()}


class BadFilter(ValueError):
    """The user's mistake, in words for the user."""


class Flow(NamedTuple):
    """An entry of ct, its opener first."""

    at: int
    protocol: int
    source: Place
    destination: Place
    flags: int
    nat: Place
    expires: int
    generation: int

    @property
    def frontend(self) -> Place | None:
        """The Service's, where there is one."""
        if self.flags & CtFlag.SERVICE:
            return self.destination
        return self.nat if self.flags & CtFlag.REV_NAT else None


class FlowView(msgspec.Struct, frozen=True):
    """direction: seen from this node's pods. translation: to a backend, or of its replies.
    seconds_left: without another packet; negative where it has expired. judged: whether policy
    decides on the flow."""

    protocol: str
    source: Party
    destination: Party
    direction: str
    state: str
    translation: str
    translated: str
    service: str
    generation: int
    judged: bool
    seconds_left: int


@dataclass(frozen=True, slots=True)
class Filter:
    """All that is given must hold. address, port: of either end, or of the translation."""

    pod: str = ""
    service: str = ""
    address: Addr | None = None
    port: int | None = None
    protocol: int | None = None

    def __bool__(self) -> bool:
        return self != Filter()

    def admits(self, flow: Flow) -> bool:
        """As far as a row alone can tell."""
        if self.protocol is not None and flow.protocol != self.protocol:
            return False
        places = [flow.source, flow.destination]
        if flow.frontend is not None:
            places.append(flow.nat)
        if self.address is not None and self.address not in [address for address, _ in places]:
            return False
        return self.port is None or self.port in [port for _, port in places]


def parse_filter(query: Mapping[str, str]) -> Filter:
    """Raises BadFilter."""
    address, port, protocol = (query.get(name, "") for name in ("address", "port", "protocol"))
    for name in ("pod", "service"):
        if query.get(name) and "/" not in query[name]:
            raise BadFilter(f"{name} {query[name]!r} is not namespace/name")
    if port and not (port.isdecimal() and int(port) < 1 << 16):
        raise BadFilter(f"port {port!r} is not a number up to 65535")
    number = NUMBERS.get(protocol.lower(), -1) if not protocol.isdecimal() else int(protocol)
    if protocol and not 0 <= number < 1 << 8:
        raise BadFilter(f"protocol {protocol!r} is none of {', '.join(NUMBERS)}, nor a number")
    try:
        found = parse(address) if address else None
    except ValueError as error:
        raise BadFilter(str(error)) from error
    return Filter(
        pod=query.get("pod", ""),
        service=query.get("service", ""),
        address=found,
        port=int(port) if port else None,
        protocol=number if protocol else None,
    )


class Conntrack:
    """`pod_name`: namespace/name of an address, or a word for what else it is, or nothing."""

    def __init__(
        self, projection: Projection, pod_name: Callable[[Addr], str], walks: Walks
    ) -> None:
        self._projection = projection
        self._pod_name = pod_name
        self._walks = walks

    async def lines(self, wanted: Filter) -> AsyncIterator[bytes]:
        """Lines of JSON (`FlowView`), many at a time."""
        names = _Names(self._projection, self._pod_name)
        async for _, flows in self._matching(wanted, names):
            if flows:
                yield await asyncio.to_thread(_lines, flows, names, int(time.monotonic()))

    async def flush(self, wanted: Filter) -> int:
        """Forgets the flows: the next packet of each decides anew. Returns how many."""
        tables = self._walks.tables
        names = _Names(self._projection, self._pod_name)
        gone = 0
        async for batch, flows in self._matching(wanted, names):
            gone += await self._walks.delete(tables, batch, [flow.at for flow in flows])
        return gone

    async def _matching(
        self, wanted: Filter, names: _Names
    ) -> AsyncIterator[tuple[AnyBatch, list[Flow]]]:
        walk = self._walks.each(
            _view, lambda batch: [flow for flow in _flows(batch) if wanted.admits(flow)]
        )
        async for batch, flows in walk:
            names.learn(flows)
            yield batch, [flow for flow in flows if names.admit(flow, wanted)]


class _Names:
    """Names of pods and Services, most of them looked up once: clients can be hundreds of
    thousands, so names of addresses are forgotten now and then."""

    def __init__(self, projection: Projection, pod_name: Callable[[Addr], str]) -> None:
        self._services = projection.services
        self._ask = pod_name
        self._pods: dict[Addr, str] = {}
        self._frontends: dict[tuple[Place, int], str] = {}
        self._local = {
            addr for endpoint in projection.placement.local.values() for addr in endpoint.addresses
        }

    def learn(self, flows: list[Flow]) -> None:
        """Before a batch is filtered and encoded."""
        if len(self._pods) > REMEMBERED:
            self._pods.clear()
        for flow in flows:
            for address, _ in (flow.source, flow.destination):
                if address not in self._pods:
                    self._pods[address] = self._ask(address)
            frontend = flow.frontend
            if frontend is not None and (frontend, flow.protocol) not in self._frontends:
                key = ServiceKey(*frontend, flow.protocol, ServiceScope.INTERNAL)
                owner = self._services.owner(key)
                self._frontends[frontend, flow.protocol] = "/".join(owner or ())

    def admit(self, flow: Flow, wanted: Filter) -> bool:
        ends = (self._pods[flow.source[0]], self._pods[flow.destination[0]])
        if wanted.pod and wanted.pod not in ends:
            return False
        return not wanted.service or self.service(flow) == wanted.service

    def service(self, flow: Flow) -> str:
        frontend = flow.frontend
        return self._frontends[frontend, flow.protocol] if frontend is not None else ""

    def party(self, place: Place) -> Party:
        address, port = place
        return Party(text(address), port, self._pods[address])

    def direction(self, flow: Flow) -> str:
        out, into = (place[0] in self._local for place in (flow.source, flow.destination))
        if out and into:
            return "local"
        return "egress" if out else "ingress" if into else "node"


def _view(tables: Tables) -> View[CtKey, CtEntry]:
    return tables.ct.view(OF_KEY, OF_VALUE)


def _flows(batch: AnyBatch) -> list[Flow]:
    flows = []
    for at, row in enumerate(batch.rows()):
        low, high, low_port, high_port, protocol, expires, generation, flags, *nat = row
        ends = ((low, low_port), (high, high_port))
        source, destination = ends if flags & CtFlag.ORIGIN_IS_LOW else ends[::-1]
        place = (nat[0], nat[1])
        flows.append(Flow(at, protocol, source, destination, flags, place, expires, generation))
    return flows


def _lines(flows: list[Flow], names: _Names, now: int) -> bytes:
    encoder = msgspec.json.Encoder()
    return b"".join([encoder.encode(view(flow, names, now)) + b"\n" for flow in flows])


def view(flow: Flow, names: _Names, now: int) -> FlowView:
    address, port = flow.nat
    shown = text(address) if flow.frontend is not None else ""
    host = f"[{shown}]" if ":" in shown else shown
    return FlowView(
        protocol=PROTOCOLS.get(flow.protocol, str(flow.protocol)),
        source=names.party(flow.source),
        destination=names.party(flow.destination),
        direction=names.direction(flow),
        state="expired" if flow.expires < now else state(flow.protocol, flow.flags),
        translation=translation(flow.flags),
        translated=f"{host}:{port}" if shown else "",
        service=names.service(flow),
        generation=flow.generation,
        judged=not flow.flags & (CtFlag.UNJUDGED | CtFlag.SERVICE),
        seconds_left=flow.expires - now,
    )


def translation(flags: int) -> str:
    if flags & CtFlag.SERVICE:
        return "to backend, as node" if flags & CtFlag.SNAT else "to backend"
    return "replies from" if flags & CtFlag.REV_NAT else ""


def state(protocol: int, flags: int) -> str:
    """In the words of a connection, or of datagrams."""
    if protocol not in CONNECTIONS:
        return "replied" if flags & CtFlag.REPLIED else "unreplied"
    closing = flags & (CtFlag.FIN_ORIGIN | CtFlag.FIN_REPLY)
    if flags & CtFlag.RESET:
        return "reset"
    if closing == CtFlag.FIN_ORIGIN | CtFlag.FIN_REPLY:
        return "closed"
    if closing:
        return "half-closed"
    return "established" if flags & CtFlag.REPLIED else "opening"
