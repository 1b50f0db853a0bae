# SPDX-License-Identifier: Apache-2.0
"""Maglev tables: how evenly they spread, and how little moves when a backend comes or goes."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weir.agent import maglev
from weir.agent.config import MAGLEV_TABLE_SIZE
from weir.datapath.records import MAGLEV_BLOCK, MaglevBlock

members = st.lists(st.binary(min_size=18, max_size=18), min_size=2, max_size=60, unique=True)


@given(members)
@settings(deadline=None)
def test_every_member_has_as_many_entries_as_the_others_give_or_take_one(
    found: list[bytes],
) -> None:
    shares = Counter(maglev.assign(found, 251))
    assert sum(shares.values()) == 251
    assert set(shares) == set(range(len(found)))
    assert max(shares.values()) - min(shares.values()) <= 1


@given(members, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_nodes_that_heard_in_another_order_make_the_same_table(
    found: list[bytes], rng: random.Random
) -> None:
    shuffled = found.copy()
    rng.shuffle(shuffled)
    first = [found[number] for number in maglev.assign(found, 251)]
    assert [shuffled[number] for number in maglev.assign(shuffled, 251)] == first


@pytest.mark.parametrize("count", [3, 10, 50, 100])
def test_few_clients_of_the_others_move_when_a_backend_goes(count: int) -> None:
    """The paper finds that well below 5 % move at 100 entries a backend; docs/architecture.md has
    our figures."""
    rng = random.Random(count)
    found = [rng.randbytes(18) for _ in range(count)]
    table = [found[number] for number in maglev.assign(found, MAGLEV_TABLE_SIZE)]
    for gone in rng.sample(found, 3):
        left = [member for member in found if member != gone]
        after = [left[number] for number in maglev.assign(left, MAGLEV_TABLE_SIZE)]
        stayed = [(a, b) for a, b in zip(table, after, strict=True) if a != gone]
        moved = sum(a != b for a, b in stayed) / len(stayed)
        assert moved < 0.045


def test_a_table_needs_two_members_and_an_entry_for_each() -> None:
    assert [maglev.fits(count, 251) for count in (0, 1, 2, 251, 252)] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_primes() -> None:
    primes = [number for number in range(30) if maglev.is_prime(number)]
    assert primes == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    assert maglev.is_prime(MAGLEV_TABLE_SIZE)


def test_packed_as_whole_blocks() -> None:
    entries = list(range(300))
    packed = maglev.pack(entries, 2 * MAGLEV_BLOCK)
    assert len(packed) == 2 * 2 * MAGLEV_BLOCK
    blocks = [MaglevBlock(packed[at : at + 512]) for at in (0, 512)]
    assert blocks == [MaglevBlock.of(entries[:256]), MaglevBlock.of(entries[256:])]
