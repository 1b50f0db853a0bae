# SPDX-License-Identifier: Apache-2.0
"""Who cleans up behind changed Services hears of them, and then that they are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from support.tables import FakeTable

from weir.agent.reconciler import GROUPS, Pace, Reconciler
from weir.agent.resources import Service, ServicePort, Slice
from weir.agent.rows import Change
from weir.agent.sweep import UDP, Due, Watch
from weir.agent.tables import Projection
from weir.api.address import parse
from weir.datapath import records
from weir.datapath.errors import DatapathError

VIP = parse("10.96.0.10")
KEY = records.ServiceKey(VIP, 53, UDP, 0)
PORTS = (ServicePort("p", UDP, 53),)
TARGETS = (ServicePort("p", UDP, 5300),)


class Runtime:
    def bump(self) -> int:
        return 1

    def set_features(self, features: int) -> None:
        pass


class Follower:
    """The real watch, and what the tables held when it was told of them."""

    def __init__(self, projection: Projection, services: FakeTable[Any, Any]) -> None:
        tables = projection.services
        self.watch = Watch(tables.serving, tables.backends.packed, lambda: tables.facts.own)
        self.told: list[tuple[str, int]] = []
        self._services = services

    def note(self, changes: Mapping[records.ServiceKey, Change[records.Service]]) -> None:
        self.watch.note(changes)
        self.told.append(("note", len(changes)))

    def published(self) -> None:
        row = self._services.rows.get(KEY)
        self.told.append(("published", row.count if row else 0))


class Bench:
    def __init__(self) -> None:
        self.projection = Projection()
        self.tables: dict[str, FakeTable[Any, Any]] = {
            name: FakeTable(name) for names in GROUPS.values() for name in names
        }
        self.follower = Follower(self.projection, self.tables["services"])
        self.now = 0.0
        self.reconciler = Reconciler(
            self.projection,
            self.tables,
            Runtime(),
            Pace(resync=1000.0),
            lambda: self.now,
            follower=self.follower,
        )

    def service(self, ready: str, draining: str = "") -> None:
        addresses, drained = (
            b"".join(parse(f"10.244.1.{number}") for number in numbers)
            for numbers in (ready, draining)
        )
        self.projection.apply(
            {
                "service/ns/dns": Service("ns", "dns", (VIP,), PORTS),
                "slice/ns/dns": Slice("ns", "dns", TARGETS, addresses, drained),
            }
        )

    async def round(self) -> Due:
        self.now += 1
        self.follower.told.clear()
        await self.reconciler.round()
        due, self.follower.watch.due = self.follower.watch.due, Due()
        return due


async def test_noted_before_and_told_when_published() -> None:
    bench = Bench()
    bench.service("12")
    assert (await bench.round()).flows
    assert bench.follower.told == [("note", 1), ("published", 2)]
    bench.service("123")
    assert not await bench.round()
    bench.service("13")
    assert (await bench.round()).flows
    assert bench.follower.told == [("note", 1), ("published", 2)]


async def test_a_drain_that_ends_is_noticed_without_a_changed_row() -> None:
    bench = Bench()
    bench.service("12")
    await bench.round()
    bench.service("1", draining="2")
    assert not await bench.round()
    bench.service("1")
    assert (await bench.round()).flows
    assert bench.follower.told == [("note", 0), ("published", 1)]


async def test_not_told_while_rows_cannot_be_written() -> None:
    bench = Bench()
    bench.service("12")
    await bench.round()
    bench.tables["services"].fail_at(1, DatapathError("update", "services", 12))
    bench.service("1")
    due = await bench.round()
    assert due.flows
    assert bench.follower.told == [("note", 1)]
    bench.now += 10
    await bench.round()
    assert bench.follower.told == [("note", 0), ("published", 1)]
