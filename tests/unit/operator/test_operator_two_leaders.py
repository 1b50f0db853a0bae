# SPDX-License-Identifier: Apache-2.0
"""Replicas that all think that they lead, in any order of events: they agree, and soon.

The API server is a table of statuses with versions. Each replica hears of each change in order,
as late as chance has it, decides, and writes what it decided on the version that it knows.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations

import pytest
from support.load_balancers import OUR_CLASS, pool, service

from weir.api.address import Addr, text
from weir.operator.allocator import Allocator
from weir.operator.balancers import Shown, Wish, share
from weir.operator.conditions import Condition
from weir.operator.objects import Key
from weir.operator.pools import Cluster, judge

OURS = Condition("weir.dev/AddressesAssigned", "True", "Assigned")
ENOUGH = 4000  # steps; three replicas and a dozen Services need some hundreds


@dataclass(frozen=True)
class Row:
    """One Service as the API server has it. `words` stand for our condition."""

    wish: Wish
    version: int = 0
    addresses: tuple[Addr, ...] = ()
    words: tuple[str, ...] | None = None


@dataclass
class Leader:
    allocator: Allocator = field(default_factory=Allocator)
    rows: dict[Key, Row] = field(default_factory=dict)
    news: deque[Row] = field(default_factory=deque)
    blocks: list[str] | None = None

    def hear(self, count: int) -> None:
        for _ in range(min(count, len(self.news))):
            row = self.news.popleft()
            self.rows[row.wish.key] = row
            shown = Shown(row.addresses, condition=OURS if row.words is not None else None)
            self.allocator.service(row.wish.key, row.wish, shown)

    def hear_of_pools(self, blocks: list[str]) -> None:
        if self.blocks != blocks:
            self.blocks = blocks
            self.allocator.pools(judge([pool("a", *blocks)], Cluster()).values())

    def unwritten(self) -> list[Row]:
        """What it would write, each with the version that it knows."""
        self.allocator.settle()
        found = []
        for key, row in sorted(self.rows.items()):
            outcome = self.allocator.outcomes[key]
            words = tuple(problem.message for problem in outcome.problems)
            wanted = Row(row.wish, row.version, outcome.addresses or (), words)
            if outcome.addresses is not None and wanted != row:
                found.append(wanted)
        return found


@dataclass
class World:
    leaders: list[Leader]
    blocks: list[str]
    rows: dict[Key, Row] = field(default_factory=dict)
    writes: int = 0

    def put(self, row: Row) -> None:
        self.rows[row.wish.key] = row
        for leader in self.leaders:
            leader.news.append(row)

    def change(self, wish: Wish) -> None:
        known = self.rows.get(wish.key, Row(wish))
        self.put(Row(wish, known.version + 1, known.addresses, known.words))

    def write(self, row: Row) -> None:
        if row.version == self.rows[row.wish.key].version:
            self.writes += 1
            self.put(Row(row.wish, row.version + 1, row.addresses, row.words))

    def step(self, chance: random.Random) -> None:
        leader = chance.choice(self.leaders)
        what = chance.random()
        if what < 0.1:
            leader.hear_of_pools(self.blocks)
        elif what < 0.5:
            leader.hear(chance.randint(1, 4))
        else:
            wanted = leader.unwritten()
            for row in chance.sample(wanted, min(len(wanted), chance.randint(1, 8))):
                self.write(row)

    @property
    def quiet(self) -> bool:
        leaders = self.leaders
        known = all(one.blocks == self.blocks and not one.news for one in leaders)
        return known and not any(one.unwritten() for one in leaders)

    def until_quiet(self, step: Callable[[], object], about: object) -> None:
        steps = 0
        while not self.quiet:
            step()
            steps += 1
            if steps == ENOUGH:
                wanted = [
                    (row.wish.key.name, *map(text, row.addresses), row.words)
                    for one in self.leaders
                    for row in one.unwritten()
                ]
                pytest.fail(f"{about}: {self.writes} writes, and still: {wanted}")
        self.nothing_is_given_twice()

    def nothing_is_given_twice(self) -> None:
        holders: dict[Addr, list[Wish]] = {}
        for row in self.rows.values():
            for addr in row.addresses:
                holders.setdefault(addr, []).append(row.wish)
        for wishes in holders.values():
            for i, one in enumerate(wishes):
                assert not any(share(one, other) for other in wishes[i + 1 :])


def wish(chance: random.Random, name: str, created: int) -> Wish:
    """Of all that there is to quarrel about: asked for, shared, or just the next one."""
    fields: dict[str, object] = {}
    if chance.random() < 0.5:
        fields["loadBalancerClass"] = OUR_CLASS
    if chance.random() < 0.3:
        asked = chance.sample([f"192.0.2.{i}" for i in range(8)], chance.randint(1, 2))
        fields["ips"] = ",".join(asked)
    if chance.random() < 0.4:
        fields["sharing_key"] = chance.choice("km")
        fields["ports"] = [chance.choice(["80/TCP", "443/TCP", "80/UDP"])]
    if chance.random() < 0.3:
        fields["families"] = ["IPv4", "IPv6"]
    return service(name, created=created, **fields)


@pytest.mark.parametrize("blocks", [["192.0.2.0/27", "2001:db8::/64"], ["192.0.2.0/29"]])
@pytest.mark.parametrize("plain", [True, False])
def test_all_agree_whatever_comes_first(blocks: list[str], plain: bool) -> None:
    for seed in range(100):
        chance = random.Random(seed)
        world = World([Leader() for _ in range(chance.choice([2, 2, 3]))], blocks)
        for leader in world.leaders:
            leader.hear_of_pools(blocks)
        for i in range(12):
            name, created = f"s{chance.randint(0, 9)}{i}", chance.randint(0, 5)
            world.change(service(name, created=created) if plain else wish(chance, name, created))
            for _ in range(chance.randint(0, 4)):
                world.step(chance)
        if not plain:
            for key in chance.sample(sorted(world.rows), 4):
                world.blocks = chance.choice([blocks, ["192.0.2.4/30"]])
                world.change(wish(chance, key.name, int(world.rows[key].wish.created[17:19])))
                world.step(chance)
        world.until_quiet(partial(world.step, chance), f"seed {seed}")


ORDERS = list(permutations("abc"))


@pytest.mark.parametrize("order", ORDERS, ids="".join)
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_in_lockstep(order: tuple[str, ...], backwards: bool, at_once: int) -> None:
    """No chance lets them out: one decided on each Service as it came, the other on all."""
    world = World([Leader(), Leader()], ["192.0.2.0/27"])
    one, two = world.leaders
    for leader in world.leaders:
        leader.hear_of_pools(world.blocks)
    for name in order:
        world.change(service(name))
        one.hear(1)
        one.unwritten()
    two.hear(3)
    two.unwritten()

    def step() -> None:
        for leader in world.leaders:
            leader.hear(1)
            wanted = leader.unwritten()
            for row in (wanted[::-1] if backwards else wanted)[:at_once]:
                world.write(row)

    world.until_quiet(step, "in lockstep")
