# SPDX-License-Identifier: Apache-2.0
"""Aging over real maps: what goes, what stays, and what it tells of how full they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from node.conftest import Installation

from weir.agent import aging
from weir.agent.aging import GRACE_SECONDS, Aging
from weir.agent.gate import Gate
from weir.agent.rows import Change
from weir.agent.sweep import Watch
from weir.agent.walks import Exchanged, Walks
from weir.api.address import Addr, parse
from weir.datapath.datapath import Datapath
from weir.datapath.libbpf import possible_cpus
from weir.datapath.records import (
    Affinity,
    AffinityKey,
    CtEntry,
    CtKey,
    Service,
    ServiceKey,
    SnatEntry,
    SnatKey,
    SockNat,
    SockNatKey,
)
from weir.datapath.settings import Sizes

NOW = 100_000
HERE, THERE, VIP = (parse(text) for text in ("10.0.0.1", "2001:db8::7", "10.96.0.1"))
# A full LRU keeps up to 128 slots free for each CPU (LOCAL_FREE_TARGET, bpf_lru_list.h), whichever
# CPUs filled it: of this size that is 5 %.
SIZE = 20 * 128 * possible_cpus()
LIMIT = NOW - GRACE_SECONDS
# When they expired: what must go, and what must stay.
GONE = (0, LIMIT - 1)
STAY = (LIMIT, NOW, NOW + 1)


@dataclass
class Bench:
    datapath: Datapath
    watch: Watch
    aging: Aging

    def rows(self, table: str) -> dict[Any, Any]:
        return dict(getattr(self.datapath.tables, table).items())


@pytest.fixture
def bench(installation: Installation, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(aging, "PAUSE_SECONDS", 0.0)
    sizes = Sizes(ct=SIZE, snat=SIZE, sock_nat=SIZE, affinity=SIZE)
    opened = installation.open(sizes=sizes)
    watch = Watch(lambda _: set(), lambda _: HERE + (80).to_bytes(2), lambda: ())
    walks = Walks(Gate(), lambda: opened.tables)
    return Bench(opened, watch, Aging(watch, walks, lambda: float(NOW)))


def ct(expires: int) -> tuple[CtKey, CtEntry]:
    return CtKey(HERE, THERE, expires & 0xFFFF, 80, 6), CtEntry(expires, 0, 0, 0, HERE, 0)


def snat(expires: int) -> tuple[SnatKey, SnatEntry]:
    key = SnatKey(THERE, HERE, 80, expires & 0xFFFF, 6, 0)
    return key, SnatEntry(HERE, 1, 0, expires)


@pytest.mark.parametrize(("table", "make"), [("ct", ct), ("snat", snat)])
async def test_only_what_expired_for_good_goes(
    bench: Bench, table: str, make: Callable[[int], tuple[Any, Any]]
) -> None:
    getattr(bench.datapath.tables, table).update(dict(map(make, GONE + STAY)))
    await bench.aging.round()
    assert bench.rows(table) == dict(map(make, STAY))
    fill = bench.aging.fills[table]
    assert (fill.entries, fill.expired, fill.max_entries) == (len(STAY), len(GONE), SIZE)
    await bench.aging.round()
    assert fill.expired == len(GONE)


async def test_a_flow_that_wakes_up_stays(bench: Bench) -> None:
    """It is renewed after the walk has read it, and before it would go."""
    key, entry = ct(0)
    table = bench.datapath.tables.ct
    table.update({key: entry})
    alive = CtEntry(NOW + 60, 0, 0, 0, HERE, 0)
    look = aging.expired

    def wakes(*arguments: Any) -> list[int]:
        table.update({key: alive})
        return look(*arguments)

    aging.expired = wakes
    try:
        await bench.aging.round()
    finally:
        aging.expired = look
    assert table.get(key) == alive
    assert bench.aging.fills["ct"].expired == 0


async def test_affinity_lasts_as_long_as_its_service_says(bench: Bench) -> None:
    def client(identity: int, last_used: int) -> tuple[AffinityKey, Affinity]:
        address = Addr(HERE[:12] + last_used.to_bytes(4))
        return AffinityKey(identity, address), Affinity(HERE, 80, last_used)

    stay = dict([client(1, LIMIT - 60), client(2, LIMIT - 600)])
    gone = dict([client(1, LIMIT - 61), client(2, LIMIT - 601), client(3, NOW)])
    bench.datapath.tables.affinity.update(stay | gone)
    await bench.aging.round()
    assert bench.rows("affinity") == stay | gone, "Services are not known yet"
    rows = {1: Service(1, 1, 0, 60, 1), 2: Service(2, 1, 0, 600, 2)}
    bench.watch.note({ServiceKey(VIP, port, 6, 0): Change(None, row) for port, row in rows.items()})
    await bench.aging.round()
    assert bench.rows("affinity") == stay


async def test_a_table_under_pressure_is_named_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def live(number: int) -> tuple[CtKey, CtEntry]:
        key = CtKey(HERE, THERE, number & 0xFFFF, number >> 16, 6)
        return key, CtEntry(NOW + 60, 0, 0, 0, HERE, 0)

    def closed(cookie: int) -> tuple[SockNatKey, SockNat]:
        return SockNatKey(cookie, HERE, 80, 6), SockNat(VIP, 80, 1)

    table = bench.datapath.tables.ct
    table.update(dict(map(live, range(SIZE // 2))))
    bench.datapath.tables.sock_nat.update(dict(map(closed, range(2 * SIZE))))
    await bench.aging.round()
    assert bench.aging.fills["sock_nat"].ratio > 0.9
    assert bench.aging.warnings() == [], "closed sockets are no pressure"
    table.update(dict(map(live, range(2 * SIZE))))
    for _ in range(2):
        await bench.aging.round()
    fill = bench.aging.fills["ct"]
    (said,) = bench.aging.warnings()
    assert said.startswith(f"map ct has {fill.entries} of {SIZE} entries")
    assert said.endswith("raise maps.conntrack")
    assert [record.getMessage() for record in caplog.records] == [said]
    assert 0.9 <= fill.ratio <= 1


async def test_a_walk_ends_when_the_datapath_is_exchanged(installation: Installation) -> None:
    tables = installation.open(sizes=Sizes(ct=16384)).tables
    tables.ct.update(dict(map(ct, range(10_000))))
    current = [tables]
    walk = Walks(Gate(), lambda: current[0]).each(lambda t: t.ct.view((), ("expires",)), len)
    batch, seen = await anext(walk)
    assert 0 < len(batch) == seen < 10_000
    current[0] = installation.open(sizes=Sizes(ct=16384)).tables
    with pytest.raises(Exchanged):
        await anext(walk)
