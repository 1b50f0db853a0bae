# SPDX-License-Identifier: Apache-2.0
"""The reflector against a scripted API server: what it reports must always add up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from blockbuster import blockbuster_ctx
from support.apiserver import FakeApi

from weir.operator import kinds
from weir.operator.api import Api
from weir.operator.kubeconfig import Access
from weir.operator.objects import Key, Problem
from weir.operator.policy import NetworkPolicy
from weir.operator.reflector import Kind, Reflector, Timing

PATH = kinds.NAMESPACE.path
QUICK = Timing(silence=0.5, retry=0.01, retry_most=0.05, page=2)


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx():
        yield


@dataclass
class Seen:
    """Applies what is reported, and checks that `old` is what it had."""

    objects: dict[str, Any] = field(default_factory=dict)
    reports: list[tuple[str, bool, bool]] = field(default_factory=list)
    trouble: dict[str, tuple[Problem, ...]] = field(default_factory=dict)
    lists: int = 0
    told: int = 0

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        assert self.objects.get(str(key)) == old
        self.reports.append((str(key), old is not None, new is not None))
        if new is None:
            del self.objects[str(key)]
        else:
            self.objects[str(key)] = new

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        self.trouble[str(key)] = problems
        self.told += 1

    def synced(self, kind: str) -> None:
        self.lists += 1


@dataclass
class World:
    api: FakeApi
    seen: Seen
    reflector: Reflector[Any]

    async def until(self, wanted: Callable[[], object], what: str = "") -> None:
        deadline = asyncio.get_running_loop().time() + 5
        while not wanted():
            assert asyncio.get_running_loop().time() < deadline, (what, self.seen)
            await asyncio.sleep(0.005)

    async def names(self, *names: str) -> None:
        await self.until(lambda: set(self.seen.objects) == set(names), f"names {names}")

    async def watching(self) -> None:
        await self.until(lambda: self.api.watching(self.reflector.kind.path), "watching")


@asynccontextmanager
async def world(
    api: FakeApi,
    kind: Kind[Any] = kinds.NAMESPACE,
    more_servers: tuple[str, ...] = (),
    token_file: Path | None = None,
) -> AsyncIterator[World]:
    seen = Seen()
    api.collection(kind.path)
    async with api.serve() as server:
        access = Access((*more_servers, server), token_file=token_file)
        async with Api(access) as client:
            reflector = Reflector(client, kind, seen, QUICK)
            task = asyncio.create_task(reflector.run())
            try:
                yield World(api, seen, reflector)
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}}


def filled(*names: str) -> FakeApi:
    api = FakeApi()
    for name in names:
        api.put(PATH, namespace(name))
    return api


async def test_pages_then_events() -> None:
    async with world(filled("a", "b", "c", "d", "e")) as w:
        await w.names("a", "b", "c", "d", "e")
        await w.watching()
        w.api.put(PATH, namespace("f"))
        w.api.put(PATH, namespace("a", team="x"))
        w.api.delete(PATH, "/b")
        await w.names("a", "c", "d", "e", "f")
        await w.until(lambda: w.seen.objects["a"].labels == (("team", "x"),))
        assert w.seen.lists == 1


async def test_a_dropped_watch_goes_on_where_it_was() -> None:
    async with world(filled("a")) as w:
        for name in "bcd":
            await w.watching()
            await w.until(lambda: len(w.seen.reports) == "abcd".index(name))  # noqa: B023
            w.api.drop_watches()
            w.api.put(PATH, namespace(name))
        await w.names("a", "b", "c", "d")
        assert w.seen.lists == 1
        assert len(w.seen.reports) == 4  # none of them twice


async def test_410_lists_again_and_tells_what_vanished() -> None:
    async with world(filled("a", "b", "c")) as w:
        await w.names("a", "b", "c")
        await w.watching()
        w.api.drop_watches()
        w.api.collection(PATH).objects.pop("/b")
        w.api.put(PATH, namespace("c", new="label"))
        w.api.forget()
        await w.names("a", "c")
        await w.until(lambda: w.seen.objects["c"].labels)
        assert w.seen.lists >= 2
        assert ("a", True, True) not in w.seen.reports  # it did not change


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b'{"type":"ERROR","object":{"code":410,"reason":"Expired"}}\n', id="expired"),
        pytest.param(b'{"type":"ERROR","object":{"code":500,"reason":"Odd"}}\n', id="unknown"),
        pytest.param(b'{"type":"ERROR","object":"what?"}\n', id="error of no known form"),
        pytest.param(b'{"type":"NEW","object":{}}\n', id="unknown type"),
        pytest.param(b"not json\n", id="not json"),
    ],
)
async def test_an_event_of_error_lists_again(line: bytes) -> None:
    async with world(filled("a")) as w:
        await w.names("a")
        await w.watching()
        w.api.send(PATH, line)
        await w.until(lambda: w.seen.lists == 2)
        await w.watching()
        w.api.put(PATH, namespace("b"))
        await w.names("a", "b")


async def test_bookmarks_move_the_version_on() -> None:
    async with world(filled("a")) as w:
        await w.watching()
        w.api.bookmark(PATH)
        mark = str(w.api.version)
        await w.until(lambda: w.reflector._version == mark)
        w.api.drop_watches()
        await w.until(lambda: w.api.requests[-1].query.get("resourceVersion") == mark)


async def test_silence_without_bookmarks_is_a_lost_watch() -> None:
    async with world(filled("a")) as w:
        await w.watching()
        first = len(w.api.requests)
        await w.until(lambda: len(w.api.requests) > first)
        w.api.put(PATH, namespace("b"))
        await w.names("a", "b")
        assert w.reflector.failures >= 1


async def test_a_failed_page_starts_over_and_takes_nothing_away() -> None:
    api = filled("a", "b", "c", "d", "e")
    api.faults.lists.extend([None, 500, None, None, 410, None, 503])
    async with world(api) as w:
        await w.names("a", "b", "c", "d", "e")
        await w.until(lambda: w.seen.lists == 1)
        assert len(w.seen.reports) == 5


async def test_watch_refused_for_a_while() -> None:
    api = filled("a")
    api.faults.watches.extend([500, 503, 429])
    async with world(api) as w:
        await w.watching()
        assert w.seen.lists == 1


async def test_slow_pages_are_waited_for() -> None:
    api = filled("a", "b", "c")
    api.faults.page_seconds = 0.05
    async with world(api) as w:
        await w.names("a", "b", "c")


async def test_another_address_is_tried() -> None:
    async with world(filled("a"), more_servers=("http://127.0.0.1:9",)) as w:
        await w.names("a")


async def test_the_token_is_read_again(tmp_path: Path) -> None:
    token = tmp_path / "token"
    await asyncio.to_thread(token.write_text, "old\n")
    api = filled("a")
    api.tokens = {"old"}
    async with world(api, token_file=token) as w:
        await w.names("a")
        await w.watching()
        api.tokens = {"new"}
        w.api.drop_watches()
        await w.until(lambda: w.reflector.failures)
        await asyncio.to_thread(token.write_text, "new\n")
        await w.watching()


async def test_a_bad_object_is_named_and_the_rest_goes_on() -> None:
    api = filled("a")
    api.collection(PATH).objects["/bad"] = {"metadata": {"name": "bad", "labels": ["no"]}}
    api.collection(PATH).objects["/worse"] = {"metadata": "nothing"}
    api.put(PATH, namespace("z"))
    async with world(api) as w:
        await w.names("a", "z")


async def test_an_unreadable_policy_isolates_its_namespace() -> None:
    api = FakeApi()
    path = kinds.POLICY.path
    bad = {"metadata": {"name": "p", "namespace": "ns"}, "spec": {"podSelector": "all"}}
    good = {"metadata": {"name": "q", "namespace": "ns"}, "spec": {"podSelector": {}}}
    api.put(path, bad)
    api.put(path, good)
    async with world(api, kinds.POLICY) as w:
        await w.names("ns/p", "ns/q")
        policy = w.seen.objects["ns/p"]
        assert isinstance(policy, NetworkPolicy)
        assert policy.ingress
        assert policy.egress
        assert not policy.rules
        assert "cannot be read" in w.seen.trouble["ns/p"][0].message
        await w.watching()
        w.api.put(path, {**good, "metadata": dict(bad["metadata"])})
        await w.until(lambda: w.seen.trouble["ns/p"] == ())


async def test_a_server_that_lost_its_history_is_listed_again() -> None:
    """Restored from a backup: it takes watches from the future, and says nothing on them."""
    async with world(filled("a", "b")) as w:
        await w.names("a", "b")
        await w.watching()
        w.api.collection(PATH).objects.pop("/b")  # no event will ever tell
        await w.names("a")
        assert w.reflector.failures >= Timing().barren


async def test_a_problem_is_told_once_not_at_every_relist() -> None:
    api = FakeApi()
    bad = {"metadata": {"name": "p", "namespace": "ns"}, "spec": {"podSelector": "all"}}
    api.put(kinds.POLICY.path, bad)
    async with world(api, kinds.POLICY) as w:
        for lists in (1, 2, 3):
            await w.until(lambda: w.seen.lists == lists)  # noqa: B023
            await w.watching()
            assert w.seen.told == 1
            w.api.send(kinds.POLICY.path, b"not json\n")


async def test_a_policy_with_odd_metadata_still_isolates() -> None:
    api = FakeApi()
    meta = {"name": "p", "namespace": "ns", "labels": ["no"], "uid": 7}
    api.put(kinds.POLICY.path, {"metadata": meta, "spec": {"podSelector": {}}})
    async with world(api, kinds.POLICY) as w:
        await w.names("ns/p")
        assert not w.seen.objects["ns/p"].rules


async def test_a_token_file_that_is_away_ends_nothing(tmp_path: Path) -> None:
    token = tmp_path / "token"
    async with world(filled("a"), token_file=token) as w:
        await w.until(lambda: w.reflector.failures)
        await asyncio.to_thread(token.write_text, "t\n")
        await w.names("a")


async def test_a_server_that_fails_is_left_for_one_that_was_learned() -> None:
    second = filled("a", "b")
    async with second.serve() as other, world(filled("a")) as w:
        await w.names("a")
        await w.watching()
        w.reflector.api.learn(other)
        w.api.faults.watches.extend([500])
        w.api.drop_watches()
        await w.until(lambda: w.reflector.failures)
        assert w.reflector.api.server == other
        await w.names("a", "b")


async def test_a_kind_that_the_cluster_has_not_is_an_empty_one() -> None:
    """404 for an optional kind is no failure; its objects are seen once it is there, and gone
    with it."""
    optional = Kind("Namespace", PATH, kinds.NAMESPACE.read, optional=True)
    api = filled("a")
    api.faults.lists.extend([404, 404])
    async with world(api, optional) as w:
        await w.until(lambda: w.seen.lists == 1)
        assert w.reflector.failures == 0
        await w.names("a")
        await w.watching()
        w.api.faults.watches.append(404)
        w.api.faults.lists.append(404)
        w.api.drop_watches()
        await w.until(lambda: not w.seen.objects)
        await w.names("a")


async def test_objects_outlive_one_answer_that_their_kind_is_not_there() -> None:
    optional = Kind("Namespace", PATH, kinds.NAMESPACE.read, optional=True)
    async with world(filled("a"), optional) as w:
        await w.names("a")
        await w.watching()
        told = len(w.seen.reports)
        w.api.faults.watches.append(404)
        w.api.drop_watches()
        await w.until(lambda: w.seen.lists == 2)
        assert len(w.seen.reports) == told
