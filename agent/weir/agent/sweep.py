# SPDX-License-Identifier: Apache-2.0
"""What the programs remember of Services that have changed: which of it is stale, pure.

TCP and SCTP notice when a backend is gone. Datagrams do not: flows (`ct`), sockets (`sock_nat`) and
clients with affinity stay on their backend until somebody takes their rows away. As kube-proxy
does: UDP flows through a frontend that is none any more, or to a backend that no longer serves, and
flows that went to an address itself before a Service got it. A backend that drains keeps its flows
until it stops serving, but new ones, with affinity or without, go elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from weir.agent.backends import split
from weir.agent.rows import Change
from weir.api.address import Addr, is_ipv4, parse
from weir.datapath.records import CtFlag, Service, ServiceKey, ServiceScope
from weir.datapath.view import Row

UDP = 17
SCOPES = tuple(ServiceScope)
LOOPBACK_IPV4, LOOPBACK_IPV6 = parse("127.0.0.0")[:13], parse("::1")

Place = tuple[Addr, int]
"""An address and port."""


class Flow(NamedTuple):
    """What a flow of ct leads to. backend: None where it goes to the frontend's address itself."""

    frontend: Place
    backend: Place | None


@dataclass(slots=True)
class Due:
    """What a sweep has to look at. gone: frontends that are none any more."""

    flows: bool = False
    affinity: bool = False
    gone: set[Place] = field(default_factory=set)

    def __bool__(self) -> bool:
        return self.flows or self.affinity

    def add(self, other: Due) -> None:
        self.flows |= other.flows
        self.affinity |= other.affinity
        self.gone |= other.gone


class Watch:
    """Follows the rows of `services` that datagrams and affinity go by; tells when a sweep is due.

    The cost follows what changed: a change that takes no backend from a UDP frontend or one with
    affinity makes nothing due.
    """

    def __init__(
        self,
        serving: Callable[[ServiceKey], set[bytes] | None],
        packed_backends: Callable[[int], bytes],
        own: Callable[[], Iterable[Addr]],
    ) -> None:
        self._serving = serving
        self._packed_backends = packed_backends
        self._own = own
        self._rows: dict[ServiceKey, tuple[Service, bytes]] = {}
        self._sticky: dict[int, dict[ServiceKey, tuple[Service, bytes]]] = {}
        self._leaving: dict[ServiceKey, set[bytes]] = {}
        self._before: set[ServiceKey] | None = set()
        self.due = Due()

    def adopt(self, keys: Iterable[ServiceKey]) -> None:
        """Frontends in the kernel at start: those that the first `note` does not bring are gone."""
        self._before = {key for key in keys if key.protocol == UDP}

    @property
    def begun(self) -> bool:
        """Whether all rows were noted: before that, everything would look stale."""
        return self._before is None

    def note(self, changes: Mapping[ServiceKey, Change[Service]]) -> None:
        """Changed rows as the projection gives them; the first time, all rows."""
        for key, change in changes.items():
            self._note(key, change.new)
        if self._before is not None:
            gone = self._before - self._rows.keys()
            self.due.add(Due(flows=True, affinity=True, gone=set(map(place_of, gone))))
            self._before = None
        for key, lost in list(self._leaving.items()):
            draining = lost & (self._serving(key) or set())
            self.due.flows |= draining != lost
            if draining:
                self._leaving[key] = draining
            else:
                del self._leaving[key]

    def _note(self, key: ServiceKey, row: Service | None) -> None:
        before = self._rows.pop(key, None)
        if before is not None and before[0].affinity_seconds:
            self._sticky[before[0].identity].pop(key)
            if not self._sticky[before[0].identity]:
                del self._sticky[before[0].identity]
        udp = key.protocol == UDP
        if row is not None and (udp or row.affinity_seconds):
            packed = self._packed_backends(row.id)
            self._rows[key] = row, packed
            if row.affinity_seconds:
                self._sticky.setdefault(row.identity, {})[key] = row, packed
        after = self._rows.get(key)
        lost = _lost(before, after)
        if before is not None and before[0].affinity_seconds:
            self.due.affinity |= bool(lost) or after is None or not after[0].affinity_seconds
        if not udp:
            return
        if after is None:
            self._leaving.pop(key, None)
            if before is not None:
                self.due.add(Due(flows=True, gone={place_of(key)}))
        elif before is None:
            self.due.flows = True
        elif lost or key in self._leaving:
            back = set(split(after[1]))
            self._leaving[key] = (self._leaving.get(key, set()) | lost) - back

    # ---- what a sweep goes by

    def frontends(self) -> frozenset[Place]:
        """Of UDP."""
        return frozenset(place_of(key) for key in self._rows if key.protocol == UDP)

    def serving(self, frontend: Place) -> set[bytes] | None:
        """Backends, packed, that flows through it may keep. None: it is no frontend of UDP."""
        address, port = frontend
        found = self._serving_at(address, port)
        if found is None and is_loopback(address):
            # A node port, as the host's own processes may name it.
            same = [own for own in self._own() if is_ipv4(own) == is_ipv4(address)]
            at_own = [self._serving_at(own, port) for own in same]
            known = [backends for backends in at_own if backends is not None]
            return set().union(*known) if known else None
        return found

    def _serving_at(self, address: Addr, port: int) -> set[bytes] | None:
        found = None
        for scope in SCOPES:
            key = ServiceKey(address, port, UDP, scope)
            if key in self._rows:
                found = (found or set()) | (self._serving(key) or set())
        return found

    def sticking(self, identity: int) -> tuple[int, frozenset[bytes]] | None:
        """Seconds of affinity, and the backends that new connections may go to."""
        rows = self._sticky.get(identity)
        if not rows:
            return None
        seconds = max(row.affinity_seconds for row, _ in rows.values())
        return seconds, frozenset(
            slot for packed in {packed for _, packed in rows.values()} for slot in split(packed)
        )


def _lost(before: tuple[Service, bytes] | None, after: tuple[Service, bytes] | None) -> set[bytes]:
    if before is None or (after is not None and before[1] == after[1]):
        return set()
    return set(split(before[1])) - set(split(after[1] if after is not None else b""))


def place_of(key: ServiceKey) -> Place:
    return key.address, key.port


def is_loopback(address: Addr) -> bool:
    return address.startswith(LOOPBACK_IPV4) or address == LOOPBACK_IPV6


def packed(place: Place) -> bytes:
    return place[0] + place[1].to_bytes(2)


# ---- decisions -----------------------------------------------------------------------

FLOW_OF_KEY = ("low", "high", "low_port", "high_port", "protocol")
FLOW_OF_VALUE = ("flags", "nat_address", "nat_port")
SOCKET_OF_KEY = ("cookie", "address", "port", "protocol")
SOCKET_OF_VALUE = ("address", "port")
AFFINITY_OF_KEY = ("identity",)
AFFINITY_OF_VALUE = ("address", "port", "last_used")


def udp_flows(rows: Iterable[Row], frontends: frozenset[Place]) -> dict[Flow, list[int]]:
    """The entries of ct that a Service could be concerned with, by what they lead to. Most lead to
    one of few, so that what follows costs little."""
    found: dict[Flow, list[int]] = {}
    for at, row in enumerate(rows):
        low, high, low_port, high_port, protocol, flags, nat_address, nat_port = row
        if protocol != UDP:
            continue
        target = (high, high_port) if flags & CtFlag.ORIGIN_IS_LOW else (low, low_port)
        if flags & CtFlag.SERVICE:
            found.setdefault(Flow(target, (nat_address, nat_port)), []).append(at)
        elif target in frontends and not flags & CtFlag.REV_NAT:
            found.setdefault(Flow(target, None), []).append(at)
    return found


def flow_is_stale(flow: Flow, serving: Callable[[Place], set[bytes] | None]) -> bool:
    backends = serving(flow.frontend)
    if flow.backend is None:
        return backends is not None
    return backends is None or packed(flow.backend) not in backends


class Pair(NamedTuple):
    """The two places of a row of sock_nat: one is the frontend, the other the backend."""

    key: Place
    value: Place


def udp_sockets(rows: Iterable[Row]) -> dict[Pair, list[tuple[int, int]]]:
    """Entries of sock_nat for datagrams as (number in the batch, cookie)."""
    found: dict[Pair, list[tuple[int, int]]] = {}
    for at, (cookie, address, port, protocol, other, other_port) in enumerate(rows):
        if protocol == UDP:
            found.setdefault(Pair((address, port), (other, other_port)), []).append((at, cookie))
    return found


def pair_is_stale(pair: Pair, serving: Callable[[Place], set[bytes] | None]) -> bool:
    for frontend, backend in (pair, pair[::-1]):
        backends = serving(frontend)
        if backends is not None and packed(backend) in backends:
            return False
    return True


def names_backend(
    pair: Pair, gone: set[Place], serving: Callable[[Place], set[bytes] | None]
) -> bool:
    """Whether a stale pair is (backend → frontend): the one that a connected socket has."""

    def was_frontend(place: Place) -> bool:
        return place in gone or serving(place) is not None

    return was_frontend(pair.value) and not was_frontend(pair.key)


def stale_affinity(
    rows: Iterable[Row], sticking: Callable[[int], tuple[int, frozenset[bytes]] | None]
) -> list[int]:
    """Clients of a backend that is not there for new ones, or of a Service without affinity."""
    found = []
    for at, (identity, address, port, _) in enumerate(rows):
        known = sticking(identity)
        if known is None or packed((address, port)) not in known[1]:
            found.append(at)
    return found


def lapsed_affinity(
    rows: Iterable[Row],
    limit: int,
    sticking: Callable[[int], tuple[int, frozenset[bytes]] | None],
) -> list[int]:
    """Clients that did not connect for so long that the programs ignore their row. `limit`: the
    seconds before which a row must have ended."""
    found = []
    for at, (identity, _, _, last_used) in enumerate(rows):
        known = sticking(identity)
        if known is None or last_used + known[0] < limit:
            found.append(at)
    return found
