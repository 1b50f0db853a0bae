# SPDX-License-Identifier: Apache-2.0
"""Walks over real maps that look at a few members, and deletions that spare what changed."""

from __future__ import annotations

import pytest
from node.conftest import Installation

from weir.api.address import parse
from weir.datapath.datapath import Datapath
from weir.datapath.errors import LayoutMismatch
from weir.datapath.records import CtEntry, CtFlag, CtKey
from weir.datapath.settings import Sizes

pytestmark = pytest.mark.core

CLIENT, VIP, BACKEND = (parse(text) for text in ("10.0.0.1", "10.96.0.1", "2001:db8::7"))
MEMBERS = ("low", "high", "low_port", "high_port", "protocol")


def flow(number: int) -> tuple[CtKey, CtEntry]:
    key = CtKey(CLIENT, VIP, 1024 + number, 53, 17)
    return key, CtEntry(1000 + number, 7, CtFlag.SERVICE, 9, BACKEND, 5353)


def open_with(installation: Installation, rows: int) -> Datapath:
    datapath = installation.open(sizes=Sizes(ct=2 * rows + 4096))
    datapath.tables.ct.update(dict(map(flow, range(rows))))
    return datapath


def test_members_of_both_byte_orders(installation: Installation) -> None:
    datapath = open_with(installation, 5000)
    view = datapath.tables.ct.view(MEMBERS, ("expires", "flags", "nat_address", "nat_port"))
    seen = {row for batch in view.batches() for row in batch.rows()}
    wanted = {
        (
            *(key.low, key.high, key.low_port, key.high_port, key.protocol),
            *(entry.expires, entry.flags, entry.nat_address, entry.nat_port),
        )
        for key, entry in map(flow, range(5000))
    }
    assert seen == wanted


def test_one_member_and_whole_records(installation: Installation) -> None:
    datapath = open_with(installation, 100)
    (batch,) = datapath.tables.ct.view(values=("expires",)).batches()
    assert len(batch) == 100
    rows = [expires for (expires,) in batch.rows()]
    records = list(batch.records())
    assert rows == [entry.expires for _, entry in records]
    assert dict(records) == dict(map(flow, range(100)))


def test_a_deletion_spares_what_changed_in_watched_members(installation: Installation) -> None:
    """Of five entries: two as read, one used since, one with another policy, one gone."""
    table = open_with(installation, 5).tables.ct
    (batch,) = table.view(values=("expires",), watched=("expires",)).batches()
    order = [key.low_port - 1024 for key, _ in batch.records()]
    flows = dict(map(flow, range(5)))
    keys = sorted(flows, key=lambda key: key.low_port)
    used = CtEntry(5000, 7, CtFlag.SERVICE, 9, BACKEND, 5353)
    judged = CtEntry(1003, 8, CtFlag.SERVICE, 9, BACKEND, 5353)
    table.update({keys[2]: used, keys[3]: judged})
    table.delete([keys[4]])
    assert batch.delete([order.index(number) for number in range(1, 5)]) == 2
    assert dict(table.items()) == {keys[0]: flows[keys[0]], keys[2]: used}


def test_members_must_be_the_struct_s(installation: Installation) -> None:
    table = open_with(installation, 1).tables.ct
    for members in (("flags", "expires"), ("expired",)):
        with pytest.raises(LayoutMismatch, match="expires, generation"):
            table.view(values=members)
