# SPDX-License-Identifier: Apache-2.0
"""BlockLists in the agent: rows of `blocked`, and whose they are."""

from __future__ import annotations

import itertools
import random

import pytest
from support.tables import FakeTable

from weir.agent import resources
from weir.agent.apply import apply_group
from weir.agent.blocks import BlockTable, number_of
from weir.agent.explain import Explainer
from weir.agent.plan import plan
from weir.agent.tables import Projection
from weir.api.address import Cidr, parse, parse_cidr
from weir.api.v1 import weir_pb2 as pb
from weir.datapath.records import Blocked, DropReason, Event, EventKind, PrefixKey

WIDE, NARROW, SIX = "198.51.100.0/24", "198.51.100.7/32", "2001:db8:f::/48"


def resource(name: str, *cidrs: str) -> bytes:
    message = pb.Blocked(name=name)
    for text in cidrs:
        cidr = parse_cidr(text)
        message.cidrs.add(address=cidr.address, bits=cidr.bits)
    return pb.Resource(name=f"blocked/{name}", blocked=message).SerializeToString()


def key(text: str) -> PrefixKey:
    cidr = parse_cidr(text)
    return PrefixKey(cidr.bits, cidr.address)


def rows(*lists: tuple[str, tuple[str, ...]]) -> dict[PrefixKey, Blocked]:
    return {key(text): Blocked(number_of(name)) for name, texts in lists for text in texts}


def test_from_the_wire_to_the_table() -> None:
    """Came, changed, went: the kernel's rows follow, each written once."""
    projection = Projection()
    table: FakeTable[PrefixKey, Blocked] = FakeTable("blocked")
    steps: list[tuple[bytes | None, dict[PrefixKey, Blocked]]] = [
        (resource("a", WIDE, SIX), rows(("a", (WIDE, SIX)))),
        (resource("a", NARROW, SIX), rows(("a", (NARROW, SIX)))),
        (resource("a"), {}),
        (resource("a", WIDE), rows(("a", (WIDE,)))),
        (None, {}),
    ]
    for encoded, wanted in steps:
        item = resources.parse(encoded)[1] if encoded is not None else None
        projection.apply({"blocked/a": item})
        delta = projection.take()
        made = plan(delta, projection.class_numbers, projection.policy, {})
        outcome = apply_group(made.blocked, {"blocked": table})
        assert outcome.failed is None
        assert dict(table.items()) == wanted == dict(projection.table("blocked").rows)


@pytest.mark.parametrize("name", ["blocked/b", "pod/a"])
def test_a_name_that_is_not_its_own(name: str) -> None:
    encoded = pb.Resource(name=name, blocked=pb.Blocked(name="a")).SerializeToString()
    with pytest.raises(resources.BadResource):
        resources.parse(encoded)


def test_lists_that_overlap() -> None:
    """A prefix stays blocked as long as one list has it, in whatever order they change: compared
    with the plain union after each of many random changes."""
    rng = random.Random(7)
    texts = [WIDE, NARROW, SIX, "203.0.113.0/24", "203.0.113.128/25"]
    pool = [parse_cidr(text) for text in texts]
    lists: dict[str, set[Cidr]] = {}
    table = BlockTable()
    for _ in range(500):
        name = rng.choice("abc")
        if rng.random() < 0.3:
            lists.pop(name, None)
            table.remove_list(name)
        else:
            lists[name] = set(rng.sample(pool, rng.randrange(len(pool) + 1)))
            table.set_list(name, lists[name])
        found = {PrefixKey(c.bits, c.address) for c in itertools.chain(*lists.values())}
        assert table.rows.rows.keys() == found
        for row_key, row in table.rows.rows.items():
            [owner] = table.names(row.rule)
            assert Cidr(row_key.address, row_key.bits) in lists[owner]


def test_a_restart_moves_no_row() -> None:
    one, other = BlockTable(), BlockTable()
    one.set_list("x", [parse_cidr(SIX)])
    for name in ("b", "a"):
        one.set_list(name, [parse_cidr(WIDE)])
        other.set_list(name, [parse_cidr(WIDE)])
    other.set_list("x", [parse_cidr(SIX)])
    assert dict(one.rows.rows) == dict(other.rows.rows)


def test_a_drop_names_the_list() -> None:
    projection = Projection()
    projection.apply({"blocked/a": resources.parse(resource("a", WIDE))[1]})
    zero = dict.fromkeys(Event.__slots__, 0)
    event = Event(
        **{
            **zero,
            "source": parse("198.51.100.9"),
            "destination": parse("192.0.2.1"),
            "kind": EventKind.DROP,
            "direction": 1,
            "reason": DropReason.BLOCKED,
            "rule": number_of("a"),
        }  # type: ignore[arg-type]
    )
    explained = Explainer(projection, {}).explain(event)
    assert (explained.reason, explained.policies) == ("blocked", ("BlockList a",))
    assert projection.owner("blocked", key(WIDE)) == "BlockList a"
