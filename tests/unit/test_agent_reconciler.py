# SPDX-License-Identifier: Apache-2.0
"""The reconciler against tables in memory that fail by script."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from support.tables import FakeTable
from support.worlds import Pod, Policy, Rule, World, address, difference, endpoint

from weir.agent import numbering, resources
from weir.agent.errors import Rejected
from weir.agent.reconciler import GROUPS, Pace, Reconciler
from weir.agent.resources import (
    Action,
    Class,
    Node,
    Prefix,
    Resource,
    Selector,
    ServicePort,
    Slice,
    Tier,
    WireClass,
    WireSelector,
)
from weir.agent.routes import RouteFacts
from weir.agent.tables import Projection
from weir.agent.troubles import troubles
from weir.api.address import Addr, parse, parse_cidr
from weir.datapath import records
from weir.datapath.errors import DatapathError

FAULT = DatapathError("update", "policy", 12)
VIP = parse("10.96.0.1")


class Runtime:
    def __init__(self) -> None:
        self.value = 0
        self.features: list[int] = []

    def set_features(self, features: int) -> None:
        self.features.append(features)

    def bump(self) -> int:
        self.value += 1
        return self.value


class Bench:
    """A reconciler whose time is the test's."""

    def __init__(self, **max_entries: int) -> None:
        self.projection = Projection()
        self.tables: dict[str, FakeTable[Any, Any]] = {
            name: FakeTable(name, max_entries.get(name, 1 << 20))
            for names in GROUPS.values()
            for name in names
        }
        self.runtime = Runtime()
        self.now = 0.0
        self.reconciler = Reconciler(
            self.projection,
            self.tables,
            self.runtime,
            Pace(resync=1000.0),
            lambda: self.now,
        )

    async def round(self, after: float = 0.0) -> None:
        self.now += after
        await self.reconciler.round()

    def right(self) -> bool:
        """The kernel holds exactly the desired rows."""
        return all(
            table.rows == dict(self.projection.table(name).rows)
            for name, table in self.tables.items()
        )

    def clear_logs(self) -> None:
        for table in self.tables.values():
            table.log.clear()

    @property
    def written(self) -> list[str]:
        return [name for name, table in self.tables.items() if table.log]


def world(**policies: Policy) -> World:
    return World({1: Pod(frozenset("a")), 4: Pod(frozenset("b"))}, policies)


ISOLATED = world(p=Policy("a", True, False, (Rule(False, frozenset("b")),)))


def service(name: str, *backends: str, vip: Addr = VIP) -> dict[str, Resource | None]:
    port = ServicePort("p", 6, 80)
    ready = b"".join(parse(text) for text in backends)
    return {
        f"service/ns/{name}": resources.Service("ns", name, (vip,), (port,)),
        f"slice/ns/{name}": Slice("ns", name, (ServicePort("p", 6, 8080),), ready, b""),
    }


async def ready(bench: Bench, state: World = ISOLATED) -> None:
    bench.projection.apply(state.resources())
    bench.projection.set_endpoint(endpoint(1))
    await bench.round()
    assert bench.right()
    bench.clear_logs()


async def test_nothing_is_written_before_the_state_is_complete() -> None:
    bench = Bench()
    stale = records.Address(99, 0)
    bench.tables["addresses"].rows[address(9)] = stale
    task = asyncio.create_task(bench.reconciler.run())
    await asyncio.sleep(0.05)
    assert bench.tables["addresses"].rows == {address(9): stale}
    bench.reconciler.release()
    await asyncio.wait_for(bench.reconciler.first_done.wait(), 5)
    assert bench.right()
    task.cancel()


async def test_a_second_round_writes_nothing() -> None:
    bench = Bench()
    await ready(bench)
    await bench.round()
    assert bench.written == []


async def test_a_failed_group_is_retried_from_what_is_there_and_others_go_on() -> None:
    bench = Bench()
    await ready(bench, World(ISOLATED.pods))
    bench.projection.apply(difference(World(ISOLATED.pods).resources(), ISOLATED.resources()))
    bench.projection.apply(service("web", "10.0.0.4"))
    bench.tables["policy"].fail_at(1, FAULT)
    await bench.round()
    assert "policy" in bench.reconciler.health["policy"].error
    assert bench.tables["services"].rows  # the other group was written
    assert not bench.tables["policy"].rows
    assert bench.tables["endpoints"].rows[address(1)].ingress.rule_set == 0  # nor its later steps
    bench.clear_logs()
    await bench.round(after=0.01)
    assert bench.written == [], "backoff"
    await bench.round(after=1.0)
    assert bench.right()
    assert not bench.reconciler.health["policy"].error
    assert bench.written == ["policy", "addresses", "endpoints"]


async def test_the_delay_doubles_up_to_its_limit() -> None:
    bench = Bench()
    await ready(bench, World(ISOLATED.pods))
    bench.projection.apply(difference(World(ISOLATED.pods).resources(), ISOLATED.resources()))
    delays = []
    for _ in range(12):
        bench.tables["policy"].fail_at(1, FAULT)
        health = bench.reconciler.health["policy"]
        await bench.round(after=max(0.0, health.retry_at - bench.now))
        delays.append(round(health.retry_at - bench.now, 3))
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == 30.0


async def test_what_somebody_else_changed_is_put_right_at_the_resync() -> None:
    bench = Bench()
    await ready(bench)
    bench.tables["addresses"].rows.pop(address(4))
    bench.tables["policy"].rows.clear()
    bench.tables["routes"].rows["junk"] = 1
    await bench.round()
    assert not bench.right()
    await bench.round(after=1001.0)
    assert bench.right()
    assert bench.reconciler.statistics.repaired == 3


async def test_restrictions_raise_the_generation_after_they_took_effect() -> None:
    bench = Bench()
    await ready(bench, World(ISOLATED.pods))
    before = bench.runtime.value
    bench.projection.apply(difference(World(ISOLATED.pods).resources(), ISOLATED.resources()))
    await bench.round()
    assert bench.runtime.value == before + 1
    await bench.round()
    assert bench.runtime.value == before + 1


async def test_a_killed_agent_owes_a_generation() -> None:
    """The maps were right already, but not all flows judged by them."""
    bench = Bench()
    await ready(bench)
    before = bench.runtime.value
    bench.reconciler = Reconciler(bench.projection, bench.tables, bench.runtime)
    await bench.round()
    assert bench.runtime.value == before + 1
    await bench.round()
    assert bench.runtime.value == before + 1


async def test_pods_that_do_not_fit_are_refused_and_the_others_live() -> None:
    bench = Bench(endpoints=1)
    await ready(bench)
    bench.projection.set_endpoint(endpoint(2))
    await bench.round()
    keys = {"endpoints": {address(2)}}
    with pytest.raises(Rejected, match="no room in endpoints"):
        bench.reconciler.require_written("pod ns/p2", keys)
    assert address(1) in bench.tables["endpoints"].rows
    assert bench.reconciler.rejected_owners() == {"endpoints": ["pod ns/p2"]}
    bench.projection.remove_endpoint("c1")
    await bench.round()
    await bench.round()
    assert bench.right(), "room was made"
    bench.reconciler.require_written("pod ns/p2", keys)


async def test_a_service_gets_the_backends_that_fit_and_is_named() -> None:
    bench = Bench(backends=3)
    await ready(bench)
    bench.projection.apply(service("one", "10.0.0.1", "10.0.0.2"))
    await bench.round()
    other = parse("10.96.0.2")
    bench.projection.apply(service("two", "10.0.0.3", "10.0.0.4", vip=other))
    await bench.round()
    counts = {key.address: row.count for key, row in bench.tables["services"].rows.items()}
    assert counts == {VIP: 2, other: 1}
    assert bench.reconciler.rejected_owners()["backends"] == ["service ns/two"]
    bench.projection.apply({"service/ns/one": None, "slice/ns/one": None})
    await bench.round()
    await bench.round()
    assert bench.right()


async def test_a_policy_row_that_does_not_fit_lets_nothing_more_through() -> None:
    bench = Bench(policy=0)
    await ready_full(bench)
    row = bench.tables["endpoints"].rows[address(1)]
    assert row.ingress.rule_set
    assert not bench.tables["policy"].rows
    assert bench.reconciler.rejected_owners() == {"policy": ["policy ns/p"]}


async def ready_full(bench: Bench) -> None:
    bench.projection.apply(ISOLATED.resources())
    bench.projection.set_endpoint(endpoint(1))
    await bench.round()


async def test_a_missing_inner_prefix_takes_the_outer_one_away() -> None:
    """10.0.0.0/8 except 10.1.0.0/16: the /16 does not fit, so the /8 must not cover it."""
    bench = Bench(prefixes=1)
    outer, inner = parse_cidr("10.0.0.0/8"), parse_cidr("10.1.0.0/16")
    items: dict[str, Resource | None] = {
        "selector/1": Selector(WireSelector(1), "ipblock 10.0.0.0/8 except 10.1.0.0/16"),
        "class/1": Class(WireClass(1), (WireSelector(1),), ()),
        "class/2": Class(WireClass(2), (), ()),
        "o": Prefix(outer, WireClass(1)),
    }
    bench.projection.apply(items)
    await bench.round()
    assert len(bench.tables["prefixes"].rows) == 1
    bench.projection.apply({"i": Prefix(inner, WireClass(2))})
    await bench.round()
    assert bench.tables["prefixes"].rows == {}


async def test_backends_change_under_a_new_id_and_survivors_stay() -> None:
    bench = Bench()
    await ready(bench)
    bench.projection.apply(service("web", "10.0.0.1", "10.0.0.2", "10.0.0.3"))
    await bench.round()
    (before,) = bench.tables["services"].rows.values()
    bench.clear_logs()
    bench.projection.apply(service("web", "10.0.0.3", "10.0.0.4", "10.0.0.1"))
    await bench.round()
    (after,) = bench.tables["services"].rows.values()
    assert after.id != before.id
    slots = [
        bench.tables["backends"].rows[records.BackendKey(after.id, slot)].address
        for slot in range(after.count)
    ]
    assert slots == [parse("10.0.0.1"), parse("10.0.0.4"), parse("10.0.0.3")]
    assert len(bench.tables["backends"].rows) == 3


async def test_a_restart_adopts_services_and_moves_nothing() -> None:
    bench = Bench()
    await ready(bench)
    bench.projection.apply(service("web", "10.0.0.1", "10.0.0.2"))
    await bench.round()
    again = Bench()
    for name, table in bench.tables.items():
        again.tables[name].rows.update(table.rows)
    numbering.restore(again.projection, numbering.dump(bench.projection))
    again.projection.services.adopt(again.tables["services"].rows, again.tables["backends"].rows)
    again.projection.apply(ISOLATED.resources())
    again.projection.apply(service("web", "10.0.0.2", "10.0.0.1"))
    again.projection.set_endpoint(endpoint(1))
    await again.round()
    assert again.right()
    assert again.written == []


async def test_a_service_without_ready_endpoints_uses_draining_ones_then_refuses() -> None:
    bench = Bench()
    await ready(bench)
    port = (ServicePort("p", 6, 8080),)
    bench.projection.apply(service("web"))
    for draining, count in ((b"", 0), (parse("10.0.0.1"), 1)):
        bench.projection.apply({"slice/ns/web": Slice("ns", "web", port, b"", draining)})
        await bench.round()
        (row,) = bench.tables["services"].rows.values()
        assert row.count == count


# ---- ordered rule sets that do not fit

DENIES = Policy("a", True, False, (Rule(False, frozenset("b"), action=Action.DENY),), Tier.ADMIN)
ORDERED = World({1: Pod(frozenset("a")), 4: Pod(frozenset("b"))}, {"cnp": DENIES})
IN_BLOCK = "ipblock 10.9.0.0/16"
OTHER = Policy("z", True, False, (Rule(False, frozenset("c")),))
SHUT = records.IsolationFlag.SHUT


async def test_an_ordered_rule_set_without_its_deny_row_lets_nothing_through() -> None:
    bench = Bench(policy=0)
    bench.projection.apply(ORDERED.resources())
    bench.projection.set_endpoint(endpoint(1))
    bench.reconciler.release()
    await bench.round()
    assert bench.tables["endpoints"].rows[address(1)].ingress.levels & SHUT
    assert bench.reconciler.rejected_owners() == {"policy": ["policy ClusterNetworkPolicy cnp"]}
    told = troubles(bench.reconciler)
    assert told.keys() == {("", "cnp")}
    assert "no room for 1 of its rows: pods that it selects get nothing through" in told["", "cnp"]
    # Another pod comes to the rule set.
    bench.projection.apply(pod_two())
    bench.projection.set_endpoint(endpoint(2))
    await bench.round()
    assert bench.tables["endpoints"].rows[address(2)].ingress.levels & SHUT
    # There is room: no row of it stays shut.
    bench.tables["policy"].max_entries = 10
    await bench.round(after=10.0)
    await bench.round()
    assert bench.right()
    assert troubles(bench.reconciler) == {}
    assert bench.reconciler.statistics.repaired == 0  # nobody else wrote that


def pod_two() -> dict[str, Resource]:
    both = World({**ORDERED.pods, 2: Pod(frozenset("a"))}, ORDERED.policies).resources()
    return {name: both[name] for name in ("pod/u2", f"address/{address(2).hex()}")}


async def test_a_deny_row_that_comes_later_shuts_pods_before_its_address_is_there() -> None:
    bench = Bench(policy=1)
    bench.projection.apply(ORDERED.resources())
    bench.projection.set_endpoint(endpoint(1))
    bench.reconciler.release()
    await bench.round()
    assert bench.right()
    before = bench.runtime.value
    log = bench.tables["endpoints"].log = bench.tables["addresses"].log = []
    wider = World({**ORDERED.pods, 5: Pod(frozenset("bc"))}, {**ORDERED.policies, "c": OTHER})
    bench.projection.apply(difference(ORDERED.resources(), wider.resources()))
    await bench.round()
    assert bench.tables["endpoints"].rows[address(1)].ingress.levels & SHUT
    assert bench.runtime.value == before + 1
    writes = [key for _, key in log]
    assert writes.index(address(1)) < writes.index(address(5))


async def test_an_allow_row_that_does_not_fit_shuts_nothing() -> None:
    allows = replace(DENIES, rules=(Rule(False, frozenset("b")),))
    bench = Bench(policy=0)
    bench.projection.apply(World(ORDERED.pods, {"cnp": allows}).resources())
    bench.projection.set_endpoint(endpoint(1))
    bench.reconciler.release()
    await bench.round()
    assert not bench.tables["endpoints"].rows[address(1)].ingress.levels & SHUT
    assert "what those allow is denied" in troubles(bench.reconciler)["", "cnp"]


async def test_a_node_that_does_not_fit_shuts_who_denies_it() -> None:
    """Its address would be anybody's outside the cluster, so no rule would deny it."""
    there = parse("192.0.2.7")
    denies = Policy("a", False, True, (Rule(True, frozenset({"nodes *"}), action=Action.DENY),),
                    Tier.ADMIN)  # fmt: skip
    items = World({1: Pod(frozenset("a"))}, {"cnp": denies}).resources()
    (number,) = (i.number for i in items.values() if isinstance(i, Selector) and i.key == "nodes *")
    items["class/90"] = Class(WireClass(90), (number,), ())
    bench = Bench(addresses=1)
    bench.projection.set_facts(RouteFacts("n1"))
    bench.projection.apply(items)
    bench.projection.set_endpoint(endpoint(1))
    bench.reconciler.release()
    await bench.round()
    assert bench.right()
    before = bench.runtime.value
    bench.projection.apply({"node/n2": Node("n2", (there,), (), wire_class=WireClass(90))})
    await bench.round()
    assert there not in bench.tables["addresses"].rows
    assert bench.tables["endpoints"].rows[address(1)].egress.levels & SHUT
    assert bench.runtime.value == before + 1
    assert "addresses has no room for all nodes" in troubles(bench.reconciler)["", "cnp"]
    bench.tables["addresses"].max_entries = 10
    await bench.round(after=10.0)
    await bench.round()
    assert bench.right()
    assert troubles(bench.reconciler) == {}


async def test_a_network_that_does_not_fit_shuts_who_denies_it() -> None:
    """Its addresses would be in no ipBlock, so no rule would deny them."""
    block = parse_cidr("10.9.0.0/16")
    denies = Policy("a", False, True, (Rule(True, frozenset({IN_BLOCK}), action=Action.DENY),),
                    Tier.ADMIN)  # fmt: skip
    items = World({1: Pod(frozenset("a"))}, {"cnp": denies}).resources()
    (number,) = (i.number for i in items.values() if isinstance(i, Selector) and i.key == IN_BLOCK)
    items["class/90"] = Class(WireClass(90), (number,), ())
    prefix: dict[str, Resource | None] = {"prefix/x": Prefix(block, WireClass(90))}
    bench = Bench(prefixes=0)
    bench.projection.apply(items)
    bench.projection.set_endpoint(endpoint(1))
    bench.reconciler.release()
    await bench.round()
    assert bench.right()
    before = bench.runtime.value
    bench.projection.apply(prefix)
    await bench.round()
    assert bench.tables["endpoints"].rows[address(1)].egress.levels & SHUT
    assert bench.runtime.value == before + 1
    assert "prefixes has no room" in troubles(bench.reconciler)["", "cnp"]
    bench.projection.apply({})
    bench.projection.set_endpoint(endpoint(1))
    await bench.round()
    assert bench.tables["endpoints"].rows[address(1)].egress.levels & SHUT
    bench.tables["prefixes"].max_entries = 10
    await bench.round(after=10.0)
    await bench.round()
    assert bench.right()
