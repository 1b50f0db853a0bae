# SPDX-License-Identifier: Apache-2.0
"""Services on their way into the maps: whatever the programs read meanwhile, it fits together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
from support.tables import FakeTable

from weir.agent.reconciler import GROUPS, Pace, Reconciler
from weir.agent.resources import External, Resource, Service, ServicePort, Slice
from weir.agent.routes import RouteFacts
from weir.agent.tables import Projection, ServiceSettings
from weir.api.address import parse, parse_cidr
from weir.datapath import records
from weir.datapath.errors import DatapathError
from weir.datapath.records import RuntimeFeature, ServiceFlag

FAULT = DatapathError("update", "services", 12)
TABLE_SIZE, BLOCKS = 257, 2
NODE = parse("192.0.2.1")
PORT = ServicePort("p", 6, 80)
RANGES = tuple(map(parse_cidr, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")))


class Kernel:
    """Tables and runtime, looked at after every single write."""

    def __init__(self, **max_entries: int) -> None:
        self.tables: dict[str, Watched] = {
            name: Watched(name, max_entries.get(name, 1 << 20), self.check)
            for names in GROUPS.values()
            for name in names
        }
        self.features = 0
        self.checks = 0

    def bump(self) -> int:
        return 1

    def set_features(self, features: int) -> None:
        self.features = features
        self.check()

    def check(self) -> None:
        self.checks += 1
        rows = {name: table.rows for name, table in self.tables.items()}
        ranged = {key.identity for key in rows["source_ranges"]}
        for key, row in rows["services"].items():
            slots = [rows["backends"].get(records.BackendKey(row.id, n)) for n in range(row.count)]
            assert None not in slots, f"{key}: slots are missing"
            if row.flags & ServiceFlag.MAGLEV:
                for block in range(BLOCKS):
                    found = rows["maglev"].get(records.MaglevKey(row.id, block))
                    assert found is not None, f"{key}: a block is missing"
                    assert max(found.slots) < row.count, f"{key}: another set's table"
            if row.flags & ServiceFlag.SOURCE_RANGES:
                assert row.identity in ranged, f"{key}: nobody would get through"
            if any(slot and slot.address == NODE for slot in slots):
                assert self.features & RuntimeFeature.HOST_BACKENDS, f"{key}: replies get lost"


class Watched(FakeTable[Any, Any]):
    """Rows become visible one by one, as in the kernel."""

    def __init__(self, name: str, max_entries: int, check: Callable[[], None]) -> None:
        super().__init__(name, max_entries)
        self._check = check

    def update(self, rows: Mapping[Any, Any]) -> None:
        for key, row in rows.items():
            super().update({key: row})
            self._check()

    def delete(self, keys: Iterable[Any]) -> None:
        for key in keys:
            super().delete([key])
            self._check()


class Bench:
    def __init__(self, **max_entries: int) -> None:
        self.kernel = Kernel(**max_entries)
        self.projection = Projection(ServiceSettings(maglev_table_size=TABLE_SIZE))
        self.projection.set_facts(RouteFacts("node1", (NODE,), (NODE,)))
        self.now = 0.0
        self.reconciler = Reconciler(
            self.projection,
            self.kernel.tables,
            self.kernel,
            Pace(resync=1e9),
            lambda: self.now,
        )

    async def round(self) -> None:
        self.now += 100.0
        await self.reconciler.round()

    def right(self) -> bool:
        return self.kernel.features == self.projection.features and all(
            table.rows == dict(self.projection.table(name).rows)
            for name, table in self.kernel.tables.items()
        )


def service(number: int, external: External, *backends: str) -> dict[str, Resource | None]:
    name = f"s{number}"
    vip = parse(f"10.96.0.{number}")
    ready = b"".join(map(parse, backends))
    nodes = tuple("node1" if int(text.rpartition(".")[2]) % 2 else "node2" for text in backends)
    return {
        f"service/ns/{name}": Service("ns", name, (vip,), (PORT,), external=external),
        f"slice/ns/{name}": Slice("ns", name, (ServicePort("p", 6, 8080),), ready, b"", nodes),
    }


def some(rng: random.Random, number: int) -> dict[str, Resource | None]:
    if rng.random() < 0.15:
        return {f"service/ns/s{number}": None, f"slice/ns/s{number}": None}
    external = External(
        node_ports=rng.choice([(), (30000 + number,)]),
        load_balancer_ips=rng.choice([(), (parse(f"203.0.113.{number}"),)]),
        local=rng.random() < 0.4,
        source_ranges=tuple(rng.sample(RANGES, rng.choice([0, 0, 1, 2]))),
    )
    backends = [f"10.0.0.{n}" for n in rng.sample(range(1, 9), rng.randrange(6))]
    if rng.random() < 0.2:
        backends.append("192.0.2.1")
    return service(number, external, *backends)


@pytest.mark.parametrize("seed", range(12))
async def test_nothing_is_published_before_it_is_whole(seed: int) -> None:
    rng = random.Random(seed)
    bench = Bench()
    for _ in range(25):
        for number in rng.sample(range(1, 6), rng.choice([1, 1, 3])):
            bench.projection.apply(some(rng, number))
        if rng.random() < 0.3:
            table = bench.kernel.tables[rng.choice(GROUPS["services"])]
            table.fail_at(rng.randrange(1, 6), FAULT)
        await bench.round()
    await bench.round()
    await bench.round()
    assert bench.right()
    assert bench.kernel.checks > 100


NODE_PORT = External(node_ports=(30080,))
SIX = [f"10.0.0.{n}" for n in range(1, 7)]


async def test_without_room_for_its_table_a_service_chooses_at_random() -> None:
    bench = Bench(maglev=BLOCKS)
    bench.projection.apply(service(1, NODE_PORT, *SIX))
    await bench.round()
    other = External(node_ports=(30081,))
    bench.projection.apply(service(2, other, *SIX))
    await bench.round()
    flags = {
        key.port: bool(row.flags & ServiceFlag.MAGLEV)
        for key, row in bench.kernel.tables["services"].rows.items()
        if key.port != 80
    }
    assert flags == {30080: True, 30081: False}
    assert bench.reconciler.rejected_owners()["maglev"] == ["service ns/s2"]
    bench.projection.apply({"service/ns/s1": None, "slice/ns/s1": None})
    await bench.round()
    await bench.round()
    assert bench.right(), "room was made"


async def test_a_range_without_room_lets_nobody_more_through() -> None:
    bench = Bench(source_ranges=1)
    external = External(load_balancer_ips=(parse("203.0.113.1"),), source_ranges=RANGES)
    bench.projection.apply(service(1, external, *SIX))
    await bench.round()
    flags = {key.address: row.flags for key, row in bench.kernel.tables["services"].rows.items()}
    assert flags[parse("203.0.113.1")] & ServiceFlag.SOURCE_RANGES
    assert bench.reconciler.rejected_owners() == {"source_ranges": ["service ns/s1"]}


async def test_slots_without_room_take_the_table_with_them() -> None:
    bench = Bench(backends=4)
    bench.projection.apply(service(1, NODE_PORT, *SIX))
    await bench.round()
    for row in bench.kernel.tables["services"].rows.values():
        assert (row.count, row.flags) == (4, 0)
