# SPDX-License-Identifier: Apache-2.0
"""Tables over real maps: every type, full ones, large ones, and the event ring."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from node.conftest import Installation
from support.timing import SCALE

from weir.api import address
from weir.datapath import libbpf
from weir.datapath.datapath import RECORDS, Datapath
from weir.datapath.errors import TableFull
from weir.datapath.events import DRAIN
from weir.datapath.records import (
    Address,
    Affinity,
    AffinityKey,
    Announced,
    Backend,
    BackendKey,
    Blocked,
    CtEntry,
    CtKey,
    Denial,
    DenialKey,
    DropReason,
    Endpoint,
    EventKind,
    Isolation,
    MaglevBlock,
    MaglevKey,
    NetnsAddresses,
    PolicyKey,
    PolicyVerdict,
    Prefix,
    PrefixKey,
    Route,
    Runtime,
    Service,
    ServiceKey,
    SnatEntry,
    SnatKey,
    SockNat,
    SockNatKey,
    SourceRangeKey,
)
from weir.datapath.settings import Sizes

pytestmark = pytest.mark.core

MANY = 100_000
PACKET = bytes(12) + b"\x08\x00" + bytes(50)
EVENTS = 1 << EventKind.ALLOW


def addr(number: int) -> address.Addr:
    return address.Addr(address.parse("2001:db8::")[:12] + number.to_bytes(4, "big"))


ROWS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "services": lambda n: (ServiceKey(addr(n), 80, 6, n & 1), Service(n, 2, 0, 60, n)),
    "backends": lambda n: (BackendKey(n, 1), Backend(addr(n), n & 0xFFFF)),
    "maglev": lambda n: (MaglevKey(n, 1), MaglevBlock.of([n, n + 1])),
    "affinity": lambda n: (AffinityKey(n, addr(n)), Affinity(addr(n), 8080, n)),
    "netns_addresses": lambda n: (n << 32, NetnsAddresses(addr(n), addr(n + 1))),
    "source_ranges": lambda n: (SourceRangeKey(160, n, addr(n)), 1),
    "announced": lambda n: (addr(n), Announced(b"\2\0\0\0\0\1")),
    "blocked": lambda n: (PrefixKey(128, addr(n)), Blocked(n)),
    "endpoints": lambda n: (
        addr(n),
        Endpoint(n, 16, Isolation(n, 1), Isolation(0, 0), b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"),
    ),
    "addresses": lambda n: (addr(n), Address(n, 1)),
    "prefixes": lambda n: (PrefixKey(128, addr(n)), Prefix(n)),
    "routes": lambda n: (PrefixKey(128, addr(n)), Route(addr(n), 4)),
    "policy": lambda n: (PolicyKey(n, 0, 80, 6, 16), PolicyVerdict(n, 0x8000, 1)),
    "denials": lambda n: (DenialKey(addr(n), addr(n + 1), 80, 6, 1), Denial(n, 1, n, n, 5, 0)),
    "ct": lambda n: (CtKey(addr(n), addr(n + 1), 1, 2, 6), CtEntry(n, 1, 32, 1, addr(n), 80)),
    "snat": lambda n: (SnatKey(addr(n), addr(0), 1, 2, 17, 1), SnatEntry(addr(n), 61000, 1, n)),
    "sock_nat": lambda n: (SockNatKey(n, addr(n), 80, 6), SockNat(addr(n), 8080, n)),
}


def rows(table: str, count: int) -> dict[Any, Any]:
    return dict(ROWS[table](number) for number in range(count))


@pytest.mark.parametrize("name", ROWS)
def test_rows_go_in_and_out(installation: Installation, name: str) -> None:
    table = getattr(installation.open().tables, name)
    some = rows(name, 100)
    table.update(some)
    assert dict(table.items()) == some
    keys = list(some)
    assert table.get(keys[0]) == some[keys[0]]
    # Absent keys among present ones, at both ends.
    absent = [ROWS[name](number)[0] for number in (200, 201)]
    table.delete([absent[0], *keys[:50], absent[1]])
    assert dict(table.items()) == {key: some[key] for key in keys[50:]}
    assert table.get(keys[0]) is None
    table.delete(keys)
    assert list(table.items()) == []


def test_every_table_has_rows_here() -> None:
    assert ROWS.keys() == RECORDS.keys() - {"runtime", "metrics"}


def test_a_full_table_is_named(installation: Installation) -> None:
    for name in ("services", "policy", "prefixes"):
        datapath = installation.open(sizes=Sizes(services=64, policy=64, prefixes=64))
        table = getattr(datapath.tables, name)
        with pytest.raises(TableFull) as caught:
            table.update(rows(name, 5000))
        assert (caught.value.table, caught.value.max_entries) == (name, 64)
        # What fits is in: the caller sees what is really there.
        assert len(list(table.items())) == 64


def test_runtime_values_do_not_disturb_each_other(installation: Installation) -> None:
    datapath = installation.open()
    assert datapath.bump() == 1
    datapath.set_event_mask(6)
    assert datapath.bump() == 2
    assert datapath.tables.runtime.get(0) == Runtime(2, 6)
    datapath.tables.runtime.update({0: Runtime(0xFFFF_FFFF, 6)})
    assert datapath.bump() == 0
    assert datapath.runtime() == Runtime(0, 6)


def tell(datapath: Datapath, count: int, mark: int) -> None:
    libbpf.run_program(datapath.programs["from_pod"], PACKET, repeat=count, mark=mark)


def test_events_are_drained_in_parts(installation: Installation) -> None:
    datapath = installation.open(sizes=Sizes(events=1 << 20), VARIANT=int(DropReason.NO_ROUTE))
    reader = datapath.events()
    tell(datapath, 10, 1)
    assert reader.drain() == []
    datapath.set_event_mask(EVENTS)
    # The mark outlives a repeated run, so all events of a run have it.
    tell(datapath, DRAIN + 1, 7)
    first = reader.drain()
    assert len(first) == DRAIN
    tell(datapath, 1, 8)
    rest = reader.drain()
    assert [event.rule for event in rest] == [7, 8]
    event = rest[-1]
    assert (event.kind, event.reason, event.source_port) == (
        EventKind.ALLOW,
        DropReason.NO_ROUTE,
        1234,
    )
    assert event.length == len(PACKET)
    assert first[0].time_ns < event.time_ns
    assert reader.malformed == 0
    assert reader.drain() == []
    reader.close()


async def test_events_wake_a_loop(installation: Installation) -> None:
    datapath = installation.open()
    datapath.set_event_mask(EVENTS)
    reader = datapath.events()
    loop = asyncio.get_running_loop()
    for mark in (1, 2):
        woken = asyncio.Event()
        loop.add_reader(reader.fd, woken.set)
        tell(datapath, 1, mark)
        await asyncio.wait_for(woken.wait(), 5 * SCALE)
        loop.remove_reader(reader.fd)
        assert [event.rule for event in reader.drain()] == [mark]
    reader.close()


@pytest.mark.parametrize("name", ["backends", "prefixes"])
def test_speed_of_a_large_table(installation: Installation, name: str) -> None:
    """Prints; asserts only what a cold start of 250,000 entries in 5 s needs, with room."""
    table = getattr(installation.open().tables, name)
    many = rows(name, int(MANY / SCALE))

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / len(many) * 1e9

    figures = {
        "write": timed(lambda: table.update(many)),
        "read": timed(lambda: sum(1 for _ in table.items())),
        "compare": timed(lambda: dict(table.items()) == many),
        "delete": timed(lambda: table.delete(many)),
    }
    print(f"{name}, {len(many)} entries, ns an entry:", {k: round(v) for k, v in figures.items()})
    assert list(table.items()) == []
    assert figures["write"] < 20_000 * SCALE
    assert figures["read"] < 20_000 * SCALE
