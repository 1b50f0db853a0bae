# SPDX-License-Identifier: Apache-2.0
"""BlockLists: what is in force, what is refused and how the object says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import msgspec
import pytest
from support.apiserver import FakeApi

from weir.api.address import parse, parse_cidr, text
from weir.operator import kinds
from weir.operator.api import Api
from weir.operator.blocklists import PATH, BlockLists
from weir.operator.conditions import Condition, Conditions
from weir.operator.kubeconfig import Access
from weir.operator.objects import Endpoint, EndpointSlice, Key, Node, Port, Problem
from weir.operator.writes import Reference

NODE = Node(
    Key("", "n1"),
    (parse("192.0.2.1"), parse("2001:db8::1")),
    (parse_cidr("10.244.1.0/24"), parse_cidr("fd00:244:1::/64")),
)


class Lists:
    """BlockLists with a node, and what it told."""

    def __init__(self) -> None:
        self.told: list[tuple[Reference, tuple[Problem, ...]]] = []
        self.conditions = Conditions(asyncio.Event())
        self.lists = BlockLists(lambda r, p: self.told.append((r, p)), self.conditions)
        self.lists.node(NODE.key, NODE)

    def put(self, name: str, *cidrs: str, **meta: Any) -> None:
        raw = {
            "metadata": {"name": name, "uid": f"uid-{name}", "generation": 1, **meta},
            "spec": {"cidrs": list(cidrs)},
        }
        value = kinds.BLOCK_LIST.read(msgspec.Raw(msgspec.json.encode(raw))).value
        self.lists.change(Key("", name), value)

    def settle(self) -> dict[str, list[str] | None]:
        """Blocked prefixes by resource, None: it is gone."""
        return {
            change.name: None
            if change.resource is None
            else [
                f"{text(c.address)}/{c.bits - 96 if c.address[:12] == b'%s' % V4 else c.bits}"
                for c in change.resource.blocked.cidrs
            ]
            for change in self.lists.settle()
        }

    def wanted(self, name: str) -> Condition:
        return self.conditions._wanted[f"{PATH}/{name}/status"][0]


V4 = b"\0" * 10 + b"\xff\xff"


def test_prefixes_of_both_families_are_in_force() -> None:
    world = Lists()
    world.put("a", "198.51.100.0/24", "2001:db8:f::/48", "203.0.113.7", "198.51.100.9/24")
    assert world.settle() == {"blocked/a": ["198.51.100.0/24", "203.0.113.7/32", "2001:db8:f::/48"]}
    assert world.told == []
    condition = world.wanted("a")
    assert (condition.type, condition.status) == ("Accepted", "True")
    assert condition.message == "3 prefixes are blocked"
    assert world.settle() == {}
    world.lists.change(Key("", "a"), None)
    assert world.settle() == {"blocked/a": None}
    assert world.conditions.waiting == 0


@pytest.mark.parametrize(
    "bad", ["", "nonsense", "10.0.0.0/33", "10.0.0/8", "fe80::/129", "1.2.3.4/"]
)
def test_a_bad_prefix_is_named_and_the_others_are_blocked(bad: str) -> None:
    world = Lists()
    world.put("a", "198.51.100.0/24", bad, "203.0.113.0/24")
    assert world.settle() == {"blocked/a": ["198.51.100.0/24", "203.0.113.0/24"]}
    [(about, [problem])] = world.told
    assert (about.kind, about.name, about.api_version) == ("BlockList", "a", "weir.dev/v1alpha1")
    assert problem.field == "spec.cidrs[1]"
    condition = world.wanted("a")
    assert (condition.status, condition.reason) == ("False", "Invalid")
    assert "spec.cidrs[1]" in condition.message
    assert condition.message.endswith("2 prefixes are blocked")


@pytest.mark.parametrize(
    ("prefix", "refused"),
    [
        pytest.param("0.0.0.0/0", True, id="everything"),
        pytest.param("::/0", True, id="everything of both families"),
        pytest.param("192.0.2.0/24", True, id="a node's segment"),
        pytest.param("192.0.2.1/32", True, id="a node"),
        pytest.param("192.0.2.2/32", False, id="beside the node"),
        pytest.param("10.244.0.0/16", True, id="around a pod CIDR"),
        pytest.param("10.244.1.7/32", True, id="in a pod CIDR"),
        pytest.param("10.244.2.0/24", False, id="beside the pod CIDR"),
        pytest.param("2001:db8::/64", True, id="IPv6 node"),
        pytest.param("fd00:244:1::5/128", True, id="IPv6 pod"),
        pytest.param("2001:db8:1::/48", False, id="IPv6 beside"),
        pytest.param("172.30.0.9/32", True, id="an API server that is no node"),
    ],
)
def test_what_would_cut_the_cluster_itself_is_refused(prefix: str, refused: bool) -> None:
    world = Lists()
    key = Key("default", "kubernetes")
    server = Endpoint(parse("172.30.0.9"), True, True, False, "", "")
    slice_ = EndpointSlice(key, "kubernetes", (Port("https", 6, 6443),), (server,))
    world.lists.slice(key, slice_)
    world.put("a", "198.51.100.0/24", prefix)
    [blocked] = world.settle().values()
    assert blocked is not None
    assert len(blocked) == (1 if refused else 2)
    assert bool(world.told) is refused
    assert world.wanted("a").status == ("False" if refused else "True")


def test_judged_again_when_nodes_change() -> None:
    """A new node's address is taken out of a list that is there; it comes back after the node."""
    world = Lists()
    world.put("a", "198.51.100.0/24", "203.0.113.0/24")
    assert world.settle() == {"blocked/a": ["198.51.100.0/24", "203.0.113.0/24"]}
    other = Node(Key("", "n2"), (parse("203.0.113.9"),), ())
    world.lists.node(other.key, other)
    assert world.settle() == {"blocked/a": ["198.51.100.0/24"]}
    assert len(world.told) == 1
    world.lists.node(other.key, other)
    assert world.settle() == {}
    world.lists.node(other.key, None)
    assert world.settle() == {"blocked/a": ["198.51.100.0/24", "203.0.113.0/24"]}
    assert world.told[-1][1] == ()


def test_a_condition_that_is_there_is_not_written_again() -> None:
    world = Lists()
    said = {
        "type": "Accepted", "status": "True", "reason": "Accepted", "observedGeneration": 1,
        "message": "1 prefix is blocked", "lastTransitionTime": "2030-01-01T00:00:00Z",
    }  # fmt: skip
    raw = {
        "metadata": {"name": "a", "uid": "u", "generation": 1},
        "spec": {"cidrs": ["198.51.100.0/24"]},
        "status": {"conditions": [said]},
    }
    for generation, waiting in ((1, 0), (2, 1)):
        raw["metadata"]["generation"] = generation  # type: ignore[index]
        value = kinds.BLOCK_LIST.read(msgspec.Raw(msgspec.json.encode(raw))).value
        world.lists.change(Key("", "a"), value)
        world.settle()
        assert world.conditions.waiting == waiting


@asynccontextmanager
async def written(api: FakeApi, conditions: Conditions) -> AsyncIterator[None]:
    async with api.serve() as server, Api(Access((server,))) as client:
        task = asyncio.create_task(conditions.run(client))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(true: Any) -> None:
    deadline = asyncio.get_running_loop().time() + 5
    while not true():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)


async def test_the_leader_writes_conditions_until_it_is_done() -> None:
    """Not before it leads; again after a failure; what is gone is given up."""
    api = FakeApi()
    api.stored[f"{PATH}/a"] = {"metadata": {"name": "a", "resourceVersion": "1"}}
    leading = asyncio.Event()
    conditions = Conditions(leading, retry_seconds=0.01)
    async with written(api, conditions):
        wanted = Condition("Accepted", "True", "Accepted", "1 prefix is blocked", 3)
        conditions.want(f"{PATH}/a/status", wanted, None)
        conditions.want(f"{PATH}/gone/status", wanted, None)
        await asyncio.sleep(0.05)
        assert api.requests == []
        api.faults.writes.extend([500, 500])
        leading.set()
        await until(lambda: conditions.waiting == 0)
        [said] = api.stored[f"{PATH}/a"]["status"]["conditions"]
        since = said.pop("lastTransitionTime")
        assert since.endswith("Z")
        assert said == {
            "type": "Accepted", "status": "True", "reason": "Accepted",
            "message": "1 prefix is blocked", "observedGeneration": 3,
        }  # fmt: skip
        # The time stays with the status, whatever else is new.
        now = Condition("Accepted", "True", "Accepted", "1 prefix is blocked", 3, "2030-01-01")
        newer = Condition("Accepted", "True", "Accepted", "2 prefixes are blocked", 4)
        conditions.want(f"{PATH}/a/status", newer, now)
        await until(lambda: conditions.waiting == 0)
        [said] = api.stored[f"{PATH}/a"]["status"]["conditions"]
        assert (said["lastTransitionTime"], said["observedGeneration"]) == ("2030-01-01", 4)


async def test_who_leads_no_more_writes_no_more() -> None:
    """Not the rest of what was to be written either: another one leads by now."""
    leading = asyncio.Event()
    conditions = Conditions(leading, retry_seconds=0.01)
    for name in "abc":
        conditions.want(f"{PATH}/{name}/status", Condition("Accepted", "True"), None)

    class LosesTheLease:
        async def patch(self, path: str, body: object, content_type: str) -> bytes:
            leading.clear()
            return b""

    task = asyncio.create_task(conditions.run(cast("Api", LosesTheLease())))
    try:
        for left in (2, 1, 0):
            leading.set()
            await until(lambda left=left: conditions.waiting <= left)
            await asyncio.sleep(0.02)
            assert conditions.waiting == left
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_many_prefixes_are_read_quickly() -> None:
    """An object of the most that etcd takes does not hold up the loop."""
    world = Lists()
    cidrs = [f"{1 + i // 65536}.{i // 256 % 256}.{i % 256}.0/24" for i in range(50_000)]
    started = asyncio.get_running_loop().time()
    world.put("a", *cidrs)
    [blocked] = world.settle().values()
    assert blocked is not None
    assert len(blocked) == 50_000
    spent = asyncio.get_running_loop().time() - started
    print(f"50,000 prefixes: {spent * 1000:.0f} ms")
    assert spent < 5
