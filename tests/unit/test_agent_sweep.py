# SPDX-License-Identifier: Apache-2.0
"""What is stale after Services have changed, and when anything has to be looked at."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from weir.agent import sweep
from weir.agent.backends import pack
from weir.agent.rows import Change
from weir.agent.sweep import Due, Flow, Pair, Watch
from weir.api.address import Addr, parse
from weir.datapath.records import Backend, CtFlag, Service, ServiceKey

POD, NODE, VIP, OTHER = map(parse, ("10.244.1.9", "192.0.2.1", "10.96.0.10", "10.96.0.11"))
A, B, C = (Backend(parse(f"10.244.1.{number}"), 5300) for number in (1, 2, 3))
UDP, TCP, SCTP = 17, 6, 132
LOCALHOST = parse("127.0.0.1")
LOW_OPENS = int(CtFlag.ORIGIN_IS_LOW)


def key(address: Addr = VIP, port: int = 53, protocol: int = UDP, scope: int = 0) -> ServiceKey:
    return ServiceKey(address, port, protocol, scope)


@dataclass
class World:
    """Services as the projection has them: rows, sets of backends, backends that drain."""

    rows: dict[ServiceKey, Service] = field(default_factory=dict)
    sets: dict[int, tuple[Backend, ...]] = field(default_factory=dict)
    draining: dict[ServiceKey, set[Backend]] = field(default_factory=dict)
    own: frozenset[Addr] = frozenset({NODE})
    changes: dict[ServiceKey, Change[Service]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.watch = Watch(self.serving, lambda number: pack(self.sets[number]), lambda: self.own)

    def serving(self, found: ServiceKey) -> set[bytes] | None:
        row = self.rows.get(found)
        if row is None:
            return None
        return {pack([b]) for b in (*self.sets[row.id], *self.draining.get(found, ()))}

    def put(self, found: ServiceKey, *backends: Backend, affinity: int = 0, name: int = 7) -> None:
        number = len(self.sets) + 1
        self.sets[number] = backends
        self._change(found, Service(number, len(backends), 0, affinity, name))

    def drop(self, found: ServiceKey) -> None:
        self._change(found, None)

    def _change(self, found: ServiceKey, row: Service | None) -> None:
        old = self.rows.pop(found, None)
        if row is not None:
            self.rows[found] = row
        self.changes[found] = Change(old, row)

    def note(self) -> Due:
        """What is due after the changes since the last time."""
        changes, self.changes = self.changes, {}
        self.watch.note(changes)
        due, self.watch.due = self.watch.due, Due()
        return due


@pytest.fixture
def world() -> World:
    made = World()
    made.put(key(), A, B)
    made.put(key(port=80, protocol=TCP), A, B)
    made.put(key(port=443, protocol=TCP), A, B, affinity=60, name=9)
    made.put(key(NODE, 30053), A, B)
    made.note()
    return made


# ---- when


def test_all_is_due_at_the_start() -> None:
    world = World()
    world.watch.adopt([key(), key(OTHER), key(OTHER, 80, TCP)])
    assert not world.watch.begun
    world.put(key(), A)
    due = world.note()
    assert (due.flows, due.affinity, due.gone) == (True, True, {(OTHER, 53)})
    assert world.watch.begun


def test_nothing_is_due_without_a_change(world: World) -> None:
    assert not world.note()


@pytest.mark.parametrize("protocol", [TCP, SCTP])
def test_connections_notice_themselves(world: World, protocol: int) -> None:
    world.put(key(port=80, protocol=protocol), A)
    world.note()
    world.put(key(port=80, protocol=protocol))
    assert not world.note()
    world.drop(key(port=80, protocol=protocol))
    assert not world.note()


def test_a_backend_that_comes_moves_nobody(world: World) -> None:
    world.put(key(), A, B, C)
    world.put(key(port=443, protocol=TCP), A, B, C, affinity=60, name=9)
    assert not world.note()


def test_a_backend_that_goes_makes_flows_due(world: World) -> None:
    world.put(key(), A)
    due = world.note()
    assert (due.flows, due.affinity) == (True, False)


def test_a_backend_that_drains_keeps_its_flows_until_it_is_gone(world: World) -> None:
    world.draining[key()] = {B}
    world.put(key(), A)
    assert not world.note()
    assert not world.note()
    world.draining.clear()
    assert world.note().flows, "no row of services changed"
    assert not world.note(), "once is enough"


def test_a_backend_that_comes_back_while_it_drains(world: World) -> None:
    world.draining[key()] = {B}
    world.put(key(), A)
    world.note()
    world.draining.clear()
    world.put(key(), A, B)
    assert not world.note()


def test_a_frontend_that_goes_or_comes_makes_flows_due(world: World) -> None:
    world.drop(key())
    assert world.note() == Due(flows=True, gone={(VIP, 53)})
    world.put(key(OTHER), A)
    assert world.note() == Due(flows=True)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: w.put(key(port=443, protocol=TCP), A, affinity=60, name=9), id="-1"),
        pytest.param(lambda w: w.put(key(port=443, protocol=TCP), A, B, name=9), id="affinity off"),
        pytest.param(lambda w: w.drop(key(port=443, protocol=TCP)), id="service gone"),
    ],
)
def test_affinity_is_due(world: World, change: object) -> None:
    assert callable(change)
    change(world)
    assert world.note() == Due(affinity=True)


# ---- what

FLOWS = {
    "to a backend that serves": (Flow((VIP, 53), (A.address, 5300)), False),
    "to one that drains": (Flow((VIP, 53), (C.address, 5300)), False),
    "to one that is gone": (Flow((OTHER, 53), (C.address, 5300)), True),
    "to another port of one that serves": (Flow((VIP, 53), (A.address, 5301)), True),
    "through a node port": (Flow((NODE, 30053), (B.address, 5300)), False),
    "through the loopback's": (Flow((LOCALHOST, 30053), (B.address, 5300)), False),
    "through a host port of the loopback": (Flow((LOCALHOST, 99), (B.address, 5300)), False),
    "through another's": (Flow((LOCALHOST, 99), (A.address, 5300)), True),
    "through a frontend that is none": (Flow((VIP, 54), (A.address, 5300)), True),
    "through a frontend of TCP alone": (Flow((VIP, 80), (A.address, 5300)), True),
    "to what is a frontend now": (Flow((VIP, 53), None), True),
    "to what is none": (Flow((VIP, 54), None), False),
}


@pytest.mark.parametrize(("flow", "stale"), FLOWS.values(), ids=FLOWS)
def test_flows(world: World, flow: Flow, stale: bool) -> None:
    world.put(key(OTHER), A, B)
    world.put(key(NODE, 99), A)
    world.put(key(LOCALHOST, 99), B)
    world.draining[key()] = {C}
    world.note()
    assert sweep.flow_is_stale(flow, world.watch.serving) is stale


def test_both_scopes_of_a_frontend_count(world: World) -> None:
    world.put(key(scope=1), C)
    world.note()
    for backend in (A, B, C):
        flow = Flow((VIP, 53), (backend.address, 5300))
        assert not sweep.flow_is_stale(flow, world.watch.serving)


@pytest.mark.parametrize("client", [parse("10.0.0.1"), parse("10.255.0.1")])
def test_flows_are_read_from_either_side(client: Addr) -> None:
    """The client is the lower or the higher end; it opened the flow."""
    low, high = sorted([(client, 4000), (VIP, 53)])
    opens = LOW_OPENS if low[0] == client else 0

    def row(flags: int, protocol: int = UDP) -> tuple[object, ...]:
        return (low[0], high[0], low[1], high[1], protocol, flags | opens, A.address, 5300)

    rows = [
        row(int(CtFlag.SERVICE)),
        row(int(CtFlag.SERVICE), TCP),
        row(0),
        row(int(CtFlag.REV_NAT)),
        row(int(CtFlag.SERVICE | CtFlag.REPLIED)),
        row(0, SCTP),
    ]
    found = sweep.udp_flows(rows, frozenset({(VIP, 53)}))
    assert found == {Flow((VIP, 53), (A.address, 5300)): [0, 4], Flow((VIP, 53), None): [2]}
    assert Flow((VIP, 53), None) not in sweep.udp_flows(rows, frozenset())


SOCKETS = {
    "keeps its backend": (Pair((VIP, 53), (A.address, 5300)), False, False),
    "names what answers": (Pair((A.address, 5300), (VIP, 53)), False, False),
    "names the loopback": (Pair((A.address, 5300), (LOCALHOST, 30053)), False, False),
    "keeps one that is gone": (Pair((VIP, 53), (C.address, 5300)), True, False),
    "connected to one that is gone": (Pair((C.address, 5300), (VIP, 53)), True, True),
    "keeps one of a Service that is gone": (Pair((OTHER, 53), (A.address, 5300)), True, False),
    "connected to one of a Service that is gone": (
        Pair((A.address, 5300), (OTHER, 53)),
        True,
        True,
    ),
    "connected to whatever": (Pair((A.address, 5300), (OTHER, 99)), True, False),
}


@pytest.mark.parametrize(("pair", "stale", "ended"), SOCKETS.values(), ids=SOCKETS)
def test_sockets(world: World, pair: Pair, stale: bool, ended: bool) -> None:
    serving = world.watch.serving
    assert sweep.pair_is_stale(pair, serving) is stale
    if stale:
        assert sweep.names_backend(pair, {(OTHER, 53)}, serving) is ended


def test_sockets_rows_by_what_they_say() -> None:
    rows = [
        (1, VIP, 53, UDP, A.address, 5300),
        (2, VIP, 53, TCP, A.address, 5300),
        (3, VIP, 53, UDP, A.address, 5300),
        (1, A.address, 5300, UDP, VIP, 53),
    ]
    assert sweep.udp_sockets(rows) == {
        Pair((VIP, 53), (A.address, 5300)): [(0, 1), (2, 3)],
        Pair((A.address, 5300), (VIP, 53)): [(3, 1)],
    }


def test_clients_with_affinity(world: World) -> None:
    world.put(key(OTHER, 443, TCP), A, B, C, affinity=60, name=9)
    world.note()
    rows = [
        (9, A.address, 5300, 100),
        (9, C.address, 5300, 100),
        (9, POD, 5300, 100),
        (7, A.address, 5300, 100),
        (99, A.address, 5300, 100),
    ]
    sticking = world.watch.sticking
    assert sweep.stale_affinity(rows, sticking) == [2, 3, 4]
    assert sweep.lapsed_affinity(rows[:3], 160, sticking) == []
    assert sweep.lapsed_affinity(rows[:3], 161, sticking) == [0, 1, 2]
    world.drop(key(OTHER, 443, TCP))
    assert world.note().affinity
    assert sweep.stale_affinity(rows[:2], sticking) == [1]
