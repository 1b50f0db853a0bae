# SPDX-License-Identifier: Apache-2.0
"""What is written to objects: Events about bad ones, and taints of nodes that became ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from support.apiserver import FakeApi

from weir.operator import handlers, kinds
from weir.operator.api import Api
from weir.operator.claims import Claims
from weir.operator.compiler import Compiler
from weir.operator.handlers import KopfThread, judge, policy_problems, service_problems
from weir.operator.kubeconfig import Access
from weir.operator.objects import Problem
from weir.operator.services import Service
from weir.operator.writes import EVENTS_AN_OBJECT, TAINT, Reference, Writer

NODE = "/api/v1/nodes/n1"
EVENTS = "/api/v1/namespaces/ns/events/"


@asynccontextmanager
async def writer(fake: FakeApi, seconds: float = 0.0) -> AsyncIterator[Writer]:
    async with fake.serve() as server, Api(Access((server,))) as api:
        made = Writer(api, "me", event_seconds=seconds, retry_seconds=0.02)
        task = asyncio.create_task(made.run())
        try:
            yield made
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until(wanted: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 5
    while not wanted():
        assert asyncio.get_running_loop().time() < deadline, what()
        await asyncio.sleep(0.005)


def about(name: str = "p", generation: int = 1, namespace: str = "ns") -> Reference:
    return Reference("networking.k8s.io/v1", "NetworkPolicy", namespace, name, "u", "7", generation)


def events(fake: FakeApi) -> list[dict[str, Any]]:
    return [content for path, content in fake.stored.items() if path.startswith(EVENTS)]


def node(*taints: str, network: str = "True") -> dict[str, Any]:
    return {
        "metadata": {"name": "n1", "resourceVersion": "1"},
        "spec": {"taints": [{"key": key, "effect": "NoSchedule"} for key in taints]},
        "status": {"conditions": [{"type": "NetworkUnavailable", "status": network}]},
    }


async def test_an_event_once_a_problem_and_generation() -> None:
    fake = FakeApi()
    async with writer(fake) as w:
        for generation in (1, 1, 2):
            w.report(about(generation=generation), (Problem("spec", "odd"), Problem("", "very")))
            await until(lambda: not w.waiting, lambda: fake.stored)
        await until(lambda: len(events(fake)) == 4, lambda: fake.stored)
        one = events(fake)[0]
        assert one["involvedObject"]["uid"] == "u"
        assert (one["type"], one["message"]) == ("Warning", "spec: odd")


async def test_an_event_on_what_has_no_namespace_is_in_default() -> None:
    fake = FakeApi()
    async with writer(fake) as w:
        w.report(about(namespace=""), (Problem("", "odd"),))
        await until(lambda: fake.stored, lambda: "nothing stored")
        (path,) = fake.stored
        assert path.startswith("/api/v1/namespaces/default/events/p.")


async def test_the_first_few_problems_of_an_object_are_told() -> None:
    fake = FakeApi()
    async with writer(fake) as w:
        w.report(about(), tuple(Problem(f"f{i}", "odd") for i in range(1000)))
        await until(lambda: len(events(fake)) == EVENTS_AN_OBJECT + 1, lambda: fake.stored)
        await asyncio.sleep(0.05)
        messages = [event["message"] for event in events(fake)]
        assert messages[-1] == f"and {1000 - EVENTS_AN_OBJECT} more problems"


async def test_ten_thousand_bad_objects_are_told_slowly_and_nodes_do_not_wait() -> None:
    fake = FakeApi()
    fake.stored[NODE] = node(TAINT)
    async with writer(fake, seconds=0.05) as w:
        began = time.monotonic()
        for generation in (1, 2):
            for i in range(10_000):
                w.report(about(f"p{i}", generation), (Problem("", "odd"),))
        assert w.waiting == 10_000  # not one of each generation
        w.mark_ready("n1")
        await until(lambda: not fake.stored[NODE]["spec"]["taints"], lambda: fake.stored[NODE])
        assert len(events(fake)) <= 2 + (time.monotonic() - began) / 0.05


async def test_an_event_is_tried_again_until_refused_for_good() -> None:
    fake = FakeApi()
    fake.faults.writes.extend([500, 429, None, 403])
    async with writer(fake) as w:
        w.report(about("a"), (Problem("", "odd"),))
        await until(lambda: events(fake), lambda: fake.stored)
        w.report(about("b"), (Problem("", "odd"),))
        w.report(about("c"), (Problem("", "odd"),))
        await until(lambda: len(events(fake)) == 2 and not w.waiting, lambda: fake.stored)
        assert [event["involvedObject"]["name"] for event in events(fake)] == ["a", "c"]


async def test_only_our_taint_goes_and_the_network_is_available() -> None:
    fake = FakeApi()
    fake.stored[NODE] = node("other", TAINT)
    fake.faults.writes.extend([None, 409])  # somebody else changed the node meanwhile
    async with writer(fake) as w:
        w.mark_ready("n1")
        w.mark_ready("gone")
        await until(lambda: not w.waiting, lambda: fake.stored)
        await until(lambda: len(fake.stored[NODE]["spec"]["taints"]) == 1, lambda: fake.stored)
        assert fake.stored[NODE]["spec"]["taints"][0]["key"] == "other"
        (condition,) = fake.stored[NODE]["status"]["conditions"]
        assert condition["status"] == "False"


async def test_a_node_is_never_given_up_for_an_outage() -> None:
    fake = FakeApi()
    fake.stored[NODE] = node(TAINT, network="False")
    fake.faults.writes.extend([503] * 8)
    async with writer(fake) as w:
        w.mark_ready("n1")
        w.retry_seconds = 0.001
        await until(lambda: not fake.stored[NODE]["spec"]["taints"], lambda: fake.stored[NODE])


META = {"name": "x", "namespace": "ns", "uid": "u", "resourceVersion": "3"}


@pytest.mark.parametrize(
    ("kind", "spec", "problems_of", "words"),
    [
        pytest.param(
            "Service",
            {"clusterIP": "10.96.0.1"},
            service_problems,
            "spec.ports: a Service with a cluster IP needs a port",
            id="Service without ports",
        ),
        pytest.param(
            "Service",
            {
                "clusterIP": "10.96.0.1",
                "ports": [{"port": 80}],
                "loadBalancerSourceRanges": ["10.0.0.0/8", "10.0.0.0/99"],
            },
            service_problems,
            "spec.loadBalancerSourceRanges[1]: '10.0.0.0/99' is not a CIDR: "
            "write it like 192.0.2.0/24 or 2001:db8::/64",
            id="Service with a source range that does not parse",
        ),
        pytest.param(
            "NetworkPolicy",
            {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}},
            policy_problems,
            "spec.podSelector.matchExpressions[0].operator: unknown operator 'Like'",
            id="unknown selector operator",
        ),
        pytest.param(
            "NetworkPolicy",
            {"podSelector": 7},
            policy_problems,
            ": cannot be read: Expected `object | null`, got `int` - at `$.spec.podSelector`",
            id="unreadable",
        ),
    ],
)
def test_what_is_said_of_a_bad_object(kind: str, spec: Any, problems_of: Any, words: str) -> None:
    told: list[tuple[Reference, tuple[Problem, ...]]] = []
    body = {"metadata": META, "spec": spec}
    judge("v1", kind, body, problems_of, lambda *report: told.append(report))
    ((reference, problems),) = told
    assert (reference.kind, reference.namespace, reference.name) == (kind, "ns", "x")
    assert [f"{p.field}: {p.message}" for p in problems] == [words]


def test_nothing_is_said_of_good_objects_or_of_what_has_no_name() -> None:
    told: list[object] = []
    good = {"metadata": META, "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}}
    for body in (good, {"metadata": 7}, {}):
        judge("v1", "Service", body, service_problems, lambda *report: told.append(report))
    assert not told


async def test_replicas_tell_a_conflict_once_and_again_when_it_is_another() -> None:
    fake = FakeApi()

    def parsed(name: str, second: int, port: int) -> Service:
        body = {
            "metadata": {
                "namespace": "ns",
                "name": name,
                "uid": f"uid-{name}",
                "creationTimestamp": f"2030-01-01T00:00:0{second}Z",
            },
            "spec": {
                "clusterIP": f"10.96.0.{second}",
                "externalIPs": ["192.0.2.1"],
                "ports": [{"port": port}],
            },
        }
        value = kinds.SERVICE.read(msgspec.Raw(msgspec.json.encode(body))).value
        assert value is not None
        return value

    async with writer(fake) as one, writer(fake) as two:
        claims = [Claims(Compiler(), w.report) for w in (one, two)]

        async def tell(*services: Service) -> list[dict[str, Any]]:
            for replica in claims:
                for service in services:
                    replica.service(service.key, service)
                replica.settle()
            await until(lambda: not one.waiting and not two.waiting, lambda: fake.stored)
            await asyncio.sleep(0.05)
            return events(fake)

        (event,) = await tell(parsed("younger", 2, 80), parsed("older", 1, 80))
        assert event["involvedObject"]["name"] == "younger"
        assert (event["involvedObject"]["kind"], event["involvedObject"]["uid"]) == (
            "Service",
            "uid-younger",
        )
        assert "80/TCP of 192.0.2.1 is Service ns/older's" in event["message"]
        assert len(await tell(parsed("younger", 2, 81))) == 1
        assert len(await tell(parsed("older", 1, 81))) == 2


async def test_kopf_is_started_again_whatever_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    async def operate(self: KopfThread) -> None:
        runs.append(1)
        if len(runs) == 1:
            raise asyncio.CancelledError
        if len(runs) == 2:
            raise ValueError("odd")

    monkeypatch.setattr(KopfThread, "_operate", operate)
    monkeypatch.setattr(handlers, "RETRY_SECONDS", 0.01)
    registry = handlers.node_handlers(lambda _: None)
    thread = KopfThread("test", Access(("http://127.0.0.1:9",)), registry, lambda: "x")
    thread.start()
    await until(lambda: len(runs) > 3, lambda: runs)
    await thread.stop()


async def test_a_dead_kopf_thread_does_not_go_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KopfThread, "_run", lambda _: None)
    monkeypatch.setattr(handlers, "LOOK_SECONDS", 0.01)
    registry = handlers.node_handlers(lambda _: None)
    thread = KopfThread("test", Access(("http://127.0.0.1:9",)), registry, lambda: "x")
    thread.start()
    with pytest.raises(RuntimeError, match="its thread is dead"):
        await asyncio.wait_for(thread.watch(), 5)
