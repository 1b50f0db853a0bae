# SPDX-License-Identifier: Apache-2.0
"""Who may use a frontend by its source ranges, and which backend Maglev's tables say."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from random import Random

import pytest
from scapy.layers.inet import TCP
from support.datapaths import Datapaths
from support.packet_node import Book, Node, World
from support.packets import TC_ACT_REDIRECT, TC_ACT_SHOT
from support.timing import SCALE

from weir.api.address import parse
from weir.datapath.records import (
    MAGLEV_BLOCK,
    DropReason,
    MaglevBlock,
    MaglevKey,
    ServiceFlag,
    SourceRangeKey,
)
from weir.datapath.settings import Settings

TABLE_SIZE = 1021
SLOTS = 7


def range_key(identity: int, text: str, bits: int, family: int) -> SourceRangeKey:
    return SourceRangeKey(32 + bits + (96 if family == 4 else 0), identity, parse(text))


def test_source_ranges(node: Node, net: Book) -> None:
    """Of the service's own identity, for clients from everywhere; silent, and told as an event."""
    node.service(6, 80, (net.b, 8080), flags=ServiceFlag.SOURCE_RANGES, identity=5)
    wide = 24 if net.family == 4 else 64
    node.tables.source_ranges.update({
        range_key(5, net.world, wide, net.family): 1,
        range_key(6, net.world2, wide, net.family): 1,
    })  # fmt: skip

    def asks(source: str) -> tuple[int, dict[DropReason, int]]:
        sent = net.ip(source, net.vip) / TCP(sport=1, dport=80, flags="S")
        out = node.from_pod("a", sent) if source == net.a else node.arrives(sent)
        return out.code, out.drops

    assert asks(net.world) == (TC_ACT_REDIRECT, {})
    for refused in (net.world2, net.a):
        assert asks(refused) == (TC_ACT_SHOT, {DropReason.SOURCE_RANGE: 1})
    events = [event for event in node.reader.drain() if event.reason]
    assert [event.reason for event in events] == [DropReason.SOURCE_RANGE] * 2
    everybody = parse("::ffff:0.0.0.0") if net.family == 4 else parse("::")
    node.tables.source_ranges.update(
        {SourceRangeKey(32 + (96 if net.family == 4 else 0), 5, everybody): 1}
    )
    assert asks(net.a) == (TC_ACT_REDIRECT, {})


def test_source_ranges_come_before_having_no_backend(node: Node, net: Book) -> None:
    node.service(6, 80, flags=ServiceFlag.SOURCE_RANGES)
    out = node.arrives(net.ip(net.world, net.vip) / TCP(sport=1, dport=80, flags="S"))
    assert out.drops == {DropReason.SOURCE_RANGE: 1}


@pytest.fixture
def maglev(
    datapaths: Datapaths, settings: Settings, world: World, net: Book
) -> Iterator[tuple[Node, list[int]]]:
    """A node, and the table of its service 1 as written: any numbers do for the programs."""
    chosen = dataclasses.replace(settings, maglev_table_size=TABLE_SIZE)
    node = Node(datapaths.get(chosen), world, net)
    rng = Random(1)
    table = [rng.randrange(SLOTS) for _ in range(TABLE_SIZE)]
    write(node, 1, table)
    node.service(6, 80, *[(net.b, 8000 + slot) for slot in range(SLOTS)], flags=ServiceFlag.MAGLEV)
    yield node, table
    node.reader.close()


def write(node: Node, number: int, table: list[int]) -> None:
    node.tables.maglev.update({
        MaglevKey(number, block): MaglevBlock.of(
            table[block * MAGLEV_BLOCK : (block + 1) * MAGLEV_BLOCK]
        )
        for block in range(-(-len(table) // MAGLEV_BLOCK))
    })  # fmt: skip


def ask(node: Node, net: Book, sport: int) -> int:
    sent = net.ip(net.world, net.vip) / TCP(sport=sport, dport=80, flags="S")
    return int(node.arrives(sent).frame.dport) - 8000


def test_maglev_is_the_same_again(maglev: tuple[Node, list[int]], net: Book) -> None:
    """A flow that was forgotten, as another node never knew it, finds its backend again."""
    node, _ = maglev
    first = [ask(node, net, sport) for sport in range(1, 200)]
    node.tables.ct.delete([key for key, _ in node.tables.ct.items()])
    assert [ask(node, net, sport) for sport in range(1, 200)] == first
    counts = Counter(first)
    assert len(counts) == SLOTS
    assert max(counts.values()) < 3 * min(counts.values())


def test_maglev_reads_every_slot(maglev: tuple[Node, list[int]], net: Book) -> None:
    """Flows cover the table: with one entry changed, only its flows move."""
    node, table = maglev
    ports = range(1, 400 if SCALE == 1 else 100)
    first = [ask(node, net, sport) for sport in ports]
    node.tables.ct.delete([key for key, _ in node.tables.ct.items()])
    half = [(slot + 1) % SLOTS if at < TABLE_SIZE // 2 else slot for at, slot in enumerate(table)]
    write(node, 1, half)
    moved = sum(before != ask(node, net, sport) for before, sport in zip(first, ports, strict=True))
    assert 3 / 8 < moved / len(ports) < 5 / 8


def test_without_a_table_any_backend_will_do(maglev: tuple[Node, list[int]], net: Book) -> None:
    node, _ = maglev
    node.service(
        6, 80, *[(net.b, 8000 + slot) for slot in range(3)], number=2, flags=ServiceFlag.MAGLEV
    )
    assert {ask(node, net, sport) for sport in range(1, 60)} == {0, 1, 2}


def test_maglev_is_for_the_uplink_alone(maglev: tuple[Node, list[int]], net: Book) -> None:
    node, _ = maglev
    write(node, 1, [0] * TABLE_SIZE)
    assert ask(node, net, 1) == 0
    seen = {
        node.from_pod("a", net.ip(net.a, net.vip) / TCP(sport=n, dport=80, flags="S")).frame.dport
        for n in range(1, 60)
    }
    assert len(seen) > 1
