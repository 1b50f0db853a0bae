# SPDX-License-Identifier: Apache-2.0
"""What the leader writes to LoadBalancer Services and pools, and that replicas do not quarrel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from support.apiserver import Json
from support.live_api import NAMESPACES, NODES, POOLS, SERVICES, LiveApi
from support.load_balancers import Nobody

from weir.api.address import text
from weir.operator import assignments as assignments_module
from weir.operator import kinds
from weir.operator.api import Api, ApiError
from weir.operator.assignments import Assignments
from weir.operator.kubeconfig import Access
from weir.operator.objects import Problem
from weir.operator.reflector import Reflector, Timing
from weir.operator.surroundings import Surroundings
from weir.operator.writes import Reference

QUICK = Timing(retry=0.01, retry_most=0.05)


@dataclass
class Replica:
    assignments: Assignments
    told: dict[str, tuple[Problem, ...]] = field(default_factory=dict)

    def lead(self, leads: bool = True) -> None:
        now, before = self.assignments.leading, self.assignments.following
        if not leads:
            now, before = before, now
        now.set()
        before.clear()

    def report(self, about: Reference, problems: tuple[Problem, ...]) -> None:
        self.told[about.name] = problems


@asynccontextmanager
async def replica(url: str, **settings: float) -> AsyncIterator[Replica]:
    async with Api(Access((url,))) as api, asyncio.TaskGroup() as group:
        around = Surroundings(Nobody())
        made = Replica(None)  # type: ignore[arg-type]  # set at once
        made.assignments = Assignments(
            api, around, made.report, asyncio.Event(), asyncio.Event(),
            "weir.dev/load-balancer", True, QUICK, retry_seconds=0.02, **settings,
        )  # fmt: skip
        reflected = (kinds.LOAD_BALANCER_POOL, kinds.NODE, kinds.NAMESPACE)
        tasks = [
            group.create_task(Reflector(api, kind, around, QUICK).run())  # type: ignore[arg-type]
            for kind in reflected
        ]
        tasks.append(group.create_task(made.assignments.run()))
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()


async def until(what: Callable[[], object], wanted: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while (last := what()) != wanted:
        assert time.monotonic() < deadline, f"{last!r} and not {wanted!r}"
        await asyncio.sleep(0.01)


async def quiet(api: LiveApi, seconds: float = 0.3, most: float = 30.0) -> None:
    """Nothing is written any more."""
    deadline = time.monotonic() + most
    count = -1
    while count != len(api.written):
        last = api.written[-4:]
        assert time.monotonic() < deadline, f"{len(api.written)} writes, and no end: {last}"
        count = len(api.written)
        await asyncio.sleep(seconds)


def decided(who: Replica) -> dict[str, str]:
    """By the name of the Service, without what has been written of it."""
    term = who.assignments._term
    outcomes = term.allocator.outcomes if term else {}
    return {key.name: " ".join(map(text, one.addresses or ())) for key, one in outcomes.items()}


def condition(of: Json) -> tuple[str, str, str]:
    (found,) = of["status"]["conditions"]
    return found["status"], found["reason"], found["message"]


async def test_address_status_condition_and_counts() -> None:
    api = LiveApi()
    api.pool("a", "192.0.2.0/30")
    api.service("web")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: api.ingress("web"), ["192.0.2.0"])
        await quiet(api)
        service = api.collection(SERVICES).objects["shop/web"]
        assert service["status"]["loadBalancer"] == {
            "ingress": [{"ip": "192.0.2.0", "ipMode": "VIP"}]
        }
        assert condition(service) == ("True", "Assigned", "192.0.2.0")
        status = api.collection(POOLS).objects["/a"]["status"]
        assert (status["ipv4"], status["ipv6"]) == ({"used": 1, "free": 3}, {"used": 0, "free": 0})
        assert condition(api.collection(POOLS).objects["/a"])[:2] == ("True", "Accepted")
        assert [path.split("/")[-2] for path, _ in api.written] in (
            ["web", "a"], ["web", "a", "a"], ["a", "web", "a"],
        )  # fmt: skip
        api.delete(SERVICES, "shop/web")
        objects = api.collection(POOLS).objects
        await until(lambda: objects["/a"]["status"]["ipv4"], {"used": 0, "free": 4})
        assert one.told == {}
    selected = [r.query.get("fieldSelector") for r in api.requests if r.path == SERVICES]
    assert set(selected) == {"spec.type=LoadBalancer"}


async def test_only_the_leader_writes() -> None:
    api = LiveApi()
    api.pool("a", "192.0.2.0/30")
    api.service("web")
    async with api.serve() as url, replica(url) as one:
        await quiet(api)
        assert api.written == []
        one.lead()
        await until(lambda: api.ingress("web"), ["192.0.2.0"])
        await quiet(api)
        one.lead(False)
        api.service("late")
        before = len(api.written)
        await quiet(api)
        assert len(api.written) == before
        one.lead()
        await until(lambda: api.ingress("late"), ["192.0.2.1"])


async def test_says_what_it_cannot_do_and_does_it_when_it_can() -> None:
    api = LiveApi()
    api.service("web", loadBalancerIP="192.0.2.9")
    api.pool("a", "198.51.100.0/30")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        objects = api.collection(SERVICES).objects
        await until(lambda: len(objects["shop/web"]["status"].get("conditions", [])), 1)
        status, reason, message = condition(objects["shop/web"])
        assert (status, reason) == ("False", "AddressNotAvailable")
        assert "192.0.2.9 is in no usable block" in message
        assert [p.reason for p in one.told["web"]] == ["AddressNotAvailable"]
        api.pool("b", "192.0.2.0/24")
        await until(lambda: api.ingress("web"), ["192.0.2.9"])
        await until(lambda: one.told["web"], ())
        assert condition(objects["shop/web"]) == ("True", "Assigned", "192.0.2.9")


async def test_pool_that_overlaps_the_cluster_is_told_on_it() -> None:
    api = LiveApi()
    node = {"metadata": {"name": "n1"}, "spec": {"podCIDR": "10.0.0.0/24"}}
    api.put(
        NODES, node | {"status": {"addresses": [{"type": "InternalIP", "address": "10.9.9.1"}]}}
    )
    api.collection("/apis/networking.k8s.io/v1/servicecidrs")
    api.put("/apis/networking.k8s.io/v1/servicecidrs",
            {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}})  # fmt: skip
    api.pool("a", "10.0.0.0/28", "10.96.1.0/24", "10.9.9.0/30")
    api.service("web")
    api.service("web2")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: api.ingress("web") + api.ingress("web2"), ["10.9.9.0", "10.9.9.2"])
        await until(lambda: [p.reason for p in one.told["a"]], ["Overlap"] * 3)
        await quiet(api)
        status, reason, message = condition(api.collection(POOLS).objects["/a"])
        assert (status, reason) == ("False", "Overlap")
        for words in ("pod CIDR of node n1", "the Service CIDR 10.96.0.0/16", "10.9.9.1 (n1)"):
            assert words in message


async def test_namespace_labels_decide() -> None:
    api = LiveApi()
    api.put(NAMESPACES, {"metadata": {"name": "shop", "labels": {}}})
    api.pool("a", "192.0.2.0/30", namespaceSelector={"matchLabels": {"team": "x"}})
    api.service("web")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: "web" in one.told, True)
        api.put(NAMESPACES, {"metadata": {"name": "shop", "labels": {"team": "x"}}})
        await until(lambda: api.ingress("web"), ["192.0.2.0"])


async def test_released_with_the_type_and_taken_by_who_waits() -> None:
    api = LiveApi()
    api.pool("a", "192.0.2.0/32")
    api.service("web")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: api.ingress("web"), ["192.0.2.0"])
        api.service("other")
        await until(lambda: "other" in one.told, True)
        api.service("web", type="ClusterIP")
        await until(lambda: api.ingress("other"), ["192.0.2.0"])
        objects = api.collection(SERVICES).objects
        await until(lambda: objects["shop/web"]["status"]["conditions"], [])


async def test_who_changes_the_service_meanwhile_is_not_overwritten() -> None:
    """409: the newer Service is decided on anew."""
    api = LiveApi()
    api.pool("a", "192.0.2.0/30")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await quiet(api)
        api.service("web")
        api.version += 1
        # The watch has not told of this version when the write comes.
        known = api.collection(SERVICES).objects["shop/web"]
        known["metadata"]["resourceVersion"] = str(api.version)
        await asyncio.sleep(0.3)
        assert api.ingress("web") == []
        api.service("web", loadBalancerIP="192.0.2.3")
        await until(lambda: api.ingress("web"), ["192.0.2.3"])


@pytest.mark.parametrize("fault", [500, 403])
async def test_a_write_that_fails_is_tried_again(fault: int) -> None:
    api = LiveApi()
    api.faults.writes.extend([fault, fault, fault])
    api.pool("a", "192.0.2.0/30")
    api.service("web")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: api.ingress("web"), ["192.0.2.0"])


async def test_what_somebody_takes_away_comes_back() -> None:
    api = LiveApi()
    api.pool("a", "192.0.2.0/30")
    api.service("first")
    api.service("web")
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: api.ingress("web"), ["192.0.2.1"])
        stripped = {**api.collection(SERVICES).objects["shop/web"], "status": {}}
        api.put(SERVICES, stripped)
        await until(lambda: api.ingress("web"), ["192.0.2.1"])


async def test_failover_changes_nothing_and_gives_nothing_twice() -> None:
    api = LiveApi()
    api.pool("a", "192.0.2.0/28")
    for i in range(8):
        api.service(f"s{i}")
    async with api.serve() as url, replica(url) as one, replica(url) as two:
        one.lead()
        await until(lambda: sum(len(api.ingress(f"s{i}")) for i in range(8)), 8)
        await quiet(api)
        before = {f"s{i}": api.ingress(f"s{i}") for i in range(8)}
        written = len(api.written)
        one.lead(False)
        two.lead()
        await quiet(api)
        assert len(api.written) == written
        api.service("late")
        await until(lambda: api.ingress("late"), ["192.0.2.8"])
        assert {f"s{i}": api.ingress(f"s{i}") for i in range(8)} == before


async def test_two_who_think_that_they_lead_end_with_no_address_twice() -> None:
    api = LiveApi()
    api.pool("a", "192.0.2.0/27")
    async with api.serve() as url, replica(url) as one, replica(url) as two:
        one.lead()
        two.lead()
        await quiet(api, 0.1)
        for i in range(20):
            api.service(f"s{i}")
            if i % 3 == 0:
                await asyncio.sleep(0.01)

        def given() -> int:
            return len({tuple(api.ingress(f"s{i}")) for i in range(20)} - {()})

        await until(given, 20)
        await quiet(api)
        assert given() == 20
        before = {i: api.ingress(f"s{i}") for i in range(20)}
        await quiet(api)
        assert {i: api.ingress(f"s{i}") for i in range(20)} == before


async def test_two_who_decided_otherwise_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has decided to give what the other gives to the other Service before either writes."""
    api = LiveApi()
    api.pool("a", "192.0.2.0/27")
    fail, write = asyncio.Event(), asyncio.Event()
    patch = Api.patch

    async def late(self: Api, path: str, body: object, content_type: str) -> bytes:
        if "/services/" in path:
            if not fail.is_set():
                await fail.wait()
                raise ApiError(f"PATCH {path}", 500, "scripted")
            await write.wait()
        return await patch(self, path, body, content_type)

    monkeypatch.setattr(Api, "patch", late)
    async with api.serve() as url, replica(url) as one, replica(url) as two:
        one.lead()
        api.service("younger")
        await until(lambda: decided(one), {"younger": "192.0.2.0"})
        api.service("older")  # by name, as both are of one second
        fail.set()
        await until(lambda: decided(one), {"younger": "192.0.2.0", "older": "192.0.2.1"})
        two.lead()
        await until(lambda: decided(two), {"older": "192.0.2.0", "younger": "192.0.2.1"})
        write.set()
        await until(lambda: bool(api.ingress("older") and api.ingress("younger")), True)
        await quiet(api)
        written = {name: " ".join(api.ingress(name)) for name in ("older", "younger")}
        assert decided(one) == decided(two) == written
        assert len(set(written.values())) == 2


async def test_a_write_without_an_answer_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The next leader may begin then."""
    monkeypatch.setattr(assignments_module, "WRITE_SECONDS", 0.05)
    api = LiveApi()
    api.pool("a", "192.0.2.0/30")
    api.service("web")
    hanging = 0
    patch = Api.patch

    async def slow(self: Api, path: str, body: object, content_type: str) -> bytes:
        nonlocal hanging
        if hanging < 2 and "services" in path:
            hanging += 1
            await asyncio.sleep(60)
        return await patch(self, path, body, content_type)

    monkeypatch.setattr(Api, "patch", slow)
    async with api.serve() as url, replica(url) as one:
        one.lead()
        await until(lambda: api.ingress("web"), ["192.0.2.0"])
        assert hanging == 2
