# SPDX-License-Identifier: Apache-2.0
"""What nodes have no room for becomes an Event on the policy, however many of them say so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from support.apiserver import FakeApi

from weir.api.v1 import weir_pb2 as pb
from weir.operator import troubles
from weir.operator.api import Api
from weir.operator.kubeconfig import Access
from weir.operator.objects import Problem
from weir.operator.troubles import MOST_OF_NODE, Troubles
from weir.operator.writes import Reference, Writer

EVENTS = "/api/v1/namespaces/ns/events/"
POLICY = "/apis/networking.k8s.io/v1/namespaces/ns/networkpolicies/web"
CLUSTER_POLICY = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies/web"


def no_room(name: str = "web", namespace: str = "ns", message: str = "full") -> pb.PolicyTrouble:
    return pb.PolicyTrouble(namespace=namespace, name=name, message=message)


def stored(fake: FakeApi, *paths: str) -> None:
    for path in paths:
        meta = {"name": path.rpartition("/")[2], "uid": f"uid of {path}", "generation": 4}
        fake.stored[path] = {"metadata": {**meta, "resourceVersion": "7"}}


def events(fake: FakeApi) -> list[dict[str, Any]]:
    return [thing for path, thing in fake.stored.items() if "/events/" in path]


@asynccontextmanager
async def running(*tasks: Callable[[], Any]) -> AsyncIterator[None]:
    started = [asyncio.create_task(task()) for task in tasks]
    try:
        yield
    finally:
        for task in started:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
            await asyncio.sleep(0.005)


class Replica:
    """Troubles and what they told."""

    def __init__(self, api: Api) -> None:
        self.told: list[tuple[Reference, tuple[Problem, ...]]] = []
        self.troubles = Troubles(api, lambda r, p: self.told.append((r, p)), 0.01, 0.01)

    def heard(self, node: str, said: Iterable[pb.PolicyTrouble]) -> None:
        self.troubles.heard(node, said)

    def texts(self) -> list[str]:
        return [problem.message for _, problems in self.told for problem in problems]


@asynccontextmanager
async def replica(*known: str) -> AsyncIterator[tuple[FakeApi, Replica]]:
    fake = FakeApi()
    stored(fake, *known)
    async with fake.serve() as server, Api(Access((server,))) as api:
        made = Replica(api)
        async with running(made.troubles.run):
            yield fake, made


async def test_a_thousand_nodes_and_two_replicas_make_one_event() -> None:
    fake = FakeApi()
    stored(fake, POLICY)
    async with fake.serve() as server, Api(Access((server,))) as api:
        writers = [Writer(api, f"replica{i}", event_seconds=0) for i in range(2)]
        both = [Troubles(api, writer.report, 1.0, 0.01) for writer in writers]
        async with running(*(one.run for one in (*both, *writers))):
            for i in range(1000):
                both[i % 2].heard(f"node{i:03}", [no_room(message=f"{i} rows too many")])
                if i % 100 == 0:
                    await asyncio.sleep(0.01)  # they come one after the other
            assert fake.requests == []  # it waits for all
            await until(lambda: len([r for r in fake.requests if r.method == "POST"]) == 2)
            await until(lambda: not any(writer.waiting for writer in writers))
        (event,) = events(fake)
    assert event["reason"] == "NoRoom"
    assert event["message"] in {
        f"not all of it is enforced as written on node node00{i} and 499 more: {i} rows too many"
        for i in range(2)
    }
    assert event["involvedObject"]["kind"] == "NetworkPolicy"
    assert event["involvedObject"]["uid"] == f"uid of {POLICY}"


async def test_it_is_about_the_policy_that_is_named() -> None:
    async with replica(POLICY, CLUSTER_POLICY) as (_, world):
        world.heard("n1", [no_room(), no_room(namespace="", message="raise maps.policy")])
        await until(lambda: len(world.told) == 2)
        kinds = {(about.kind, about.namespace, about.generation) for about, _ in world.told}
        assert kinds == {("NetworkPolicy", "ns", 4), ("ClusterNetworkPolicy", "", 4)}
        assert world.texts()[1].endswith("on node n1: raise maps.policy")
        assert len(world.troubles) == 2


async def test_it_is_told_once_while_some_node_says_it() -> None:
    async with replica(POLICY) as (fake, world):
        world.heard("n1", [no_room()])
        await until(lambda: world.told)
        world.heard("n2", [no_room()])
        world.heard("n1", [])
        assert len(world.troubles) == 1
        world.heard("n2", [])
        assert len(world.troubles) == 0
        assert len(world.told) == 1
        world.heard("n2", [no_room()])
        await until(lambda: len(world.told) == 2)
        assert len(fake.requests) == 2


async def test_what_is_over_before_it_is_told_is_not_told() -> None:
    async with replica(POLICY, POLICY.replace("web", "more")) as (fake, world):
        world.heard("n1", [no_room(), no_room("gone")])
        world.heard("n1", [no_room("gone")])
        await until(lambda: fake.requests)  # there is no such policy any more
        world.heard("n1", [no_room("gone"), no_room()])
        await until(lambda: world.told)
        world.heard("n1", [no_room("gone"), no_room(), no_room("more")])
        await until(lambda: len(world.told) == 2)
        assert [about.name for about, _ in world.told] == ["web", "more"]
        assert sum(request.path.endswith("gone") for request in fake.requests) == 1


async def test_the_api_server_may_be_away() -> None:
    async with replica(POLICY) as (fake, world):
        fake.tokens = {"another"}
        world.heard("n1", [no_room()])
        await until(lambda: len(fake.requests) > 2)
        assert world.told == []
        fake.tokens = None
        await until(lambda: world.told)


async def test_what_agents_name_is_not_trusted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with replica() as (fake, world):
        names = ["../../secrets", "", "A", "a b", "a" * 300, "a/b"]
        world.heard("n1", [no_room(name) for name in names])
        world.heard("n2", [no_room(namespace="kube-system/secrets")])
        assert len(world.troubles) == 0
        assert fake.requests == []
        world.heard("n3", [no_room(f"p{i}") for i in range(MOST_OF_NODE + 5)])
        assert len(world.troubles) == MOST_OF_NODE
    assert sum("refused" in r.getMessage() for r in caplog.records) == len(names) + 1


async def test_of_very_many_policies_some_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(troubles, "MOST_TOLD", 3)
    paths = [POLICY.replace("web", f"p{i}") for i in range(5)]
    async with replica(*paths) as (_, world):
        world.heard("n1", [no_room(f"p{i}") for i in range(5)])
        await until(lambda: caplog.records)
        assert [about.name for about, _ in world.told] == ["p0", "p1", "p2"]
        assert "for 2 more policies" in caplog.text
        world.heard("n1", [no_room(f"p{i}") for i in range(2, 5)])
        await until(lambda: len(world.told) == 5)
