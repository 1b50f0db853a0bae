# SPDX-License-Identifier: Apache-2.0
"""Nested prefixes that come, go and change: each address has only classes of its own."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import FakeTable

from weir.agent.apply import apply_group
from weir.agent.classes import NOTHING, ClassContent, Numbers
from weir.agent.plan import AnyOp, Op, plan
from weir.agent.policy import PolicyTables
from weir.agent.rows import Change
from weir.agent.rule_sets import FIRST_RULE_SET
from weir.agent.tables import Delta
from weir.api.address import Addr, cidr
from weir.datapath import records

Rows = dict[records.PrefixKey, records.Prefix]
Tables = dict[tuple[int, int], frozenset[str]]

ADDRESSES = [Addr(bytes(15) + bytes([n])) for n in range(8)]
# (bits, address) of nested prefixes among eight addresses; contents of their classes.
tables = st.dictionaries(
    st.tuples(st.integers(125, 128), st.integers(0, 7)),
    st.frozensets(st.sampled_from("abc")),
    max_size=6,
)


def rows(table: Tables, numbers: Numbers[ClassContent]) -> Rows:
    found = {}
    for (bits, last), selectors in table.items():
        number = numbers.acquire(ClassContent(selectors, frozenset()))
        address = cidr(ADDRESSES[last], bits).address
        found[records.PrefixKey(bits, address)] = records.Prefix(number)
    return found


def contents(table: Rows, numbers: Numbers[ClassContent]) -> list[ClassContent]:
    """Of each address, by its longest prefix."""
    found = []
    for address in ADDRESSES:
        keys = [records.PrefixKey(bits, cidr(address, bits).address) for bits in range(129)]
        row = next((table[key] for key in reversed(keys) if key in table), None)
        found.append(numbers.key(row.class_) or NOTHING if row is not None else NOTHING)
    return found


@given(tables, tables)
@settings(max_examples=300, deadline=None)
def test_addresses_have_classes_of_their_own_only(before: Tables, after: Tables) -> None:
    numbers: Numbers[ClassContent] = Numbers(16)
    kernel, desired = rows(before, numbers), rows(after, numbers)
    changes = {
        key: Change(kernel.get(key), desired.get(key))
        for key in kernel.keys() | desired.keys()
        if kernel.get(key) != desired.get(key)
    }
    old, new = contents(kernel, numbers), contents(desired, numbers)
    allowed = [{a, b, a | b} for a, b in zip(old, new, strict=True)]
    made = plan(Delta(prefixes=changes), numbers, PolicyTables(Numbers(FIRST_RULE_SET)), desired)
    steps = [
        step
        for op in made.policy
        for step in [*op.upserts.items(), *((key, None) for key in op.deletes)]
    ]
    for key, row in steps:
        assert isinstance(key, records.PrefixKey)
        if row is None:
            kernel.pop(key, None)
        else:
            assert isinstance(row, records.Prefix)
            kernel[key] = row
        for content, fine in zip(contents(kernel, numbers), allowed, strict=True):
            assert content in fine, (key, row)
    assert kernel == desired


def test_a_prefix_taken_away_for_want_of_room_stays_out() -> None:
    """The /126 covers what the /128, which does not fit, keeps out of its class."""
    outer = records.PrefixKey(126, ADDRESSES[0])
    inner = records.PrefixKey(128, ADDRESSES[1])
    table: FakeTable[records.PrefixKey, records.Prefix] = FakeTable("prefixes", 1)
    table.update({outer: records.Prefix(16)})
    ops: list[AnyOp] = [
        Op("prefixes", {inner: records.Prefix(17), outer: records.Prefix(18)}),
        Op("prefixes", {outer: records.Prefix(19)}),
    ]
    outcome = apply_group(ops, {"prefixes": table})
    assert table.rows == {}
    assert outcome.rejected == {"prefixes": {outer, inner}}
