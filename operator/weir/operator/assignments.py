# SPDX-License-Identifier: Apache-2.0
"""Gives addresses to Services of type LoadBalancer: what the allocator decides, written to them.

Only while leading. A new leader begins with a list of its own of these Services, so it knows all
that the last one wrote, and an allocator that knows nothing but that. Each write carries the
version of the Service that it was decided on: who changed it meanwhile is not overwritten, and
the change brings the Service back here. A write that takes longer than the time between one
leader's end and the next one's beginning is given up.

Level-triggered: what a Service's status says is compared with what it is to be, whenever either
changes and every RESYNC_SECONDS.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from weir.api.address import parse_cidr, text
from weir.operator import wire
from weir.operator.allocator import Allocator, Outcome
from weir.operator.api import Api, ApiError
from weir.operator.balancers import (
    ASSIGNED,
    Balancer,
    WireBalancer,
    parse_balancer,
)
from weir.operator.conditions import Condition, condition_body
from weir.operator.objects import Key, Parsed, Problem, key_of
from weir.operator.pools import (
    API,
    KIND,
    PATH,
    Counts,
    Judged,
    Pool,
    Range,
    condition,
    judge,
    range_of,
)
from weir.operator.reflector import Kind, Reflector, Timing
from weir.operator.surroundings import Surroundings
from weir.operator.writes import Reference

logger = logging.getLogger(__name__)

SERVICES = "LoadBalancer Service"
SERVICE_CIDRS = "ServiceCIDR"
SETTLE_SECONDS = 0.01
RETRY_SECONDS = 1.0
RETRY_MOST_SECONDS = 30.0
RESYNC_SECONDS = 60.0
WRITE_SECONDS = 4.0  # less than a holder of the Lease has left when it steps down
WRITES_AT_ONCE = 8
STRATEGIC = "application/strategic-merge-patch+json"

Report = Callable[[Reference, tuple[Problem, ...]], None]


class _CidrSpec(wire.Struct):
    cidrs: list[str] | None = None


class _ServiceCidr(wire.Named):
    spec: _CidrSpec = msgspec.field(default_factory=_CidrSpec)


def _parse_service_cidr(raw: _ServiceCidr) -> Parsed[tuple[tuple[str, Range], ...]]:
    """With what to call each. The API server takes no others than such that parse."""
    found = []
    for words in raw.spec.cidrs or []:
        try:
            found.append((f"the Service CIDR {words}", range_of(parse_cidr(words))))
        except ValueError as error:
            logger.warning("ServiceCIDR %s: %s", key_of(raw.metadata), error)
    return Parsed(tuple(found))


@dataclass(slots=True)
class _Term:
    """What is known in one time of leading. Its reflectors' consumer."""

    news: asyncio.Event
    allocator: Allocator = field(default_factory=Allocator)
    balancers: dict[Key, Balancer] = field(default_factory=dict)
    judged: dict[Key, Judged] = field(default_factory=dict)
    generation: int = -1
    touched: set[Key] = field(default_factory=set)
    left: set[Key] = field(default_factory=set)  # no LoadBalancers any more, perhaps
    told: dict[Key, tuple[Problem, ...]] = field(default_factory=dict)
    told_pools: dict[Key, tuple[Problem, ...]] = field(default_factory=dict)
    cidrs: dict[Key, tuple[tuple[str, Range], ...]] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    complete: bool = False

    def changed(self, kind: str, key: Key, _old: object | None, new: object | None) -> None:
        if kind == SERVICE_CIDRS:
            self.cidrs.pop(key, None)
            if isinstance(new, tuple):
                self.cidrs[key] = new
            self.generation = -1
        else:
            self._balancer(key, new if isinstance(new, Balancer) else None)
        self.news.set()

    def _balancer(self, key: Key, new: Balancer | None) -> None:
        old = self.balancers.pop(key, None)
        if new is None or (old is not None and old.uid != new.uid):
            self.allocator.service(key, None)
            self.told.pop(key, None)
        if new is None and old is not None and old.shown.condition is not None:
            self.left.add(key)
        if new is not None:
            self.left.discard(key)
            self.balancers[key] = new
            self.allocator.service(key, new.wish, new.shown)
            self.touched.add(key)

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        """Those of Services are told with the outcome; these are what cannot even be read."""
        for problem in problems:
            logger.warning("%s %s: %s", kind, key, problem.message)

    def synced(self, kind: str) -> None:
        self.known.add(kind)
        self.complete = self.known >= {SERVICES, SERVICE_CIDRS}
        self.news.set()


@dataclass(slots=True)
class Assignments:
    """Runs until cancelled."""

    api: Api
    surroundings: Surroundings
    report: Report
    leading: asyncio.Event
    following: asyncio.Event
    our_class: str
    classless: bool
    timing: Timing = field(default_factory=Timing)
    retry_seconds: float = RETRY_SECONDS
    resync_seconds: float = RESYNC_SECONDS
    _term: _Term | None = None

    async def run(self) -> None:
        while True:
            await self.leading.wait()
            term = self._term = _Term(self.surroundings.news)
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(reflector.run(), name=f"reflector {reflector.kind.name}")
                        for reflector in self._reflectors(term)
                    ]
                    tasks.append(group.create_task(self._work(term), name="assignments"))
                    await self.following.wait()
                    for task in tasks:
                        task.cancel()
            finally:
                self._term = None

    def _reflectors(
        self, term: _Term
    ) -> tuple[Reflector[Balancer], Reflector[tuple[tuple[str, Range], ...]]]:
        balancer = msgspec.json.Decoder(WireBalancer)
        cidr = msgspec.json.Decoder(_ServiceCidr)
        services = Kind(
            SERVICES,
            "/api/v1/services",
            lambda raw: parse_balancer(balancer.decode(raw), self.our_class, self.classless),
            fields="spec.type=LoadBalancer",
        )
        cidrs = Kind(
            SERVICE_CIDRS,
            "/apis/networking.k8s.io/v1/servicecidrs",
            lambda raw: _parse_service_cidr(cidr.decode(raw)),
            optional=True,
        )
        return (
            Reflector(self.api, services, term, self.timing),
            Reflector(self.api, cidrs, term, self.timing),
        )

    # For metrics

    @property
    def counts(self) -> dict[Key, tuple[Counts, Counts]]:
        return self._term.allocator.counts() if self._term else {}

    @property
    def waiting(self) -> int:
        return self._term.allocator.waiting if self._term else 0

    # The work

    async def _work(self, term: _Term) -> None:
        self.surroundings.moved = set(self.surroundings.namespaces)
        delay = self.retry_seconds
        while True:
            try:
                async with asyncio.timeout(self.resync_seconds):
                    await term.news.wait()
            except TimeoutError:
                term.touched.update(term.balancers)
            term.news.clear()
            if not (term.complete and self.surroundings.complete):
                continue
            await asyncio.sleep(SETTLE_SECONDS)  # what comes together is decided together
            self._decide(term)
            touched, term.touched = term.touched, set()
            await self._clear(term)
            failed = await self._write(term, touched)
            failed |= await self._write_pools(term)
            if failed:
                asyncio.get_running_loop().call_later(delay, term.news.set)
            delay = min(delay * 2, RETRY_MOST_SECONDS) if failed else self.retry_seconds

    def _decide(self, term: _Term) -> None:
        around = self.surroundings
        moved, around.moved = around.moved, set()
        for name in moved:
            term.allocator.namespace(name, around.namespaces.get(name))
        if term.generation != around.generation:
            term.generation = around.generation
            cidrs = [cidr for found in term.cidrs.values() for cidr in found]
            judged = judge(around.pools.values(), around.cluster(cidrs))
            # Counts in the status of a pool come from here: they change nothing.
            if {k: _content(j) for k, j in judged.items()} != {
                k: _content(j) for k, j in term.judged.items()
            }:
                term.allocator.pools(judged.values())
            term.judged = judged
            self._tell_pools(term)
        term.touched |= term.allocator.settle()
        for key in term.touched & term.balancers.keys():
            self._tell(term, key)

    def _tell(self, term: _Term, key: Key) -> None:
        balancer, outcome = term.balancers[key], term.allocator.outcomes[key]
        if outcome.addresses is None:
            return
        problems = balancer.problems + outcome.problems
        if problems != term.told.get(key, ()):
            about = Reference("v1", "Service", key.namespace, key.name, balancer.uid, "", 0)
            self.report(about, problems)
            for problem in problems:
                logger.warning("Service %s: %s", key, problem.message)
        term.told[key] = problems

    def _tell_pools(self, term: _Term) -> None:
        for key, judged in term.judged.items():
            if judged.problems != term.told_pools.get(key, ()):
                pool = judged.pool
                about = Reference(API, KIND, "", key.name, pool.uid, "", pool.generation)
                self.report(about, judged.problems)
                for problem in judged.problems:
                    logger.warning("%s %s: %s: %s", KIND, key, problem.field, problem.message)
        term.told_pools = {key: judged.problems for key, judged in term.judged.items()}

    # Writes

    async def _write(self, term: _Term, keys: set[Key]) -> bool:
        """Whether some are to be tried again."""
        slots = asyncio.Semaphore(WRITES_AT_ONCE)

        async def one(key: Key) -> bool:
            async with slots:
                done = await self._write_service(term, key)
            if not done:
                term.touched.add(key)
            return done

        wanted = [key for key in sorted(keys) if _body_of(term, key) is not None]
        return not all(await asyncio.gather(*(one(key) for key in wanted)))

    async def _clear(self, term: _Term) -> None:
        """The API server takes the addresses of what is no LoadBalancer any more, and leaves our
        condition. Most are gone altogether."""
        while term.left:
            path = _status_path(term.left.pop())
            gone: dict[str, object] = {"conditions": [{"type": ASSIGNED, "$patch": "delete"}]}
            body: dict[str, object] = {"status": gone}
            await self._patch(path, body, STRATEGIC)

    async def _write_service(self, term: _Term, key: Key) -> bool:
        body = _body_of(term, key)
        if body is None:
            return True
        words = ", ".join(map(text, term.allocator.outcomes[key].addresses or ())) or "no address"
        logger.info("Service %s: %s", key, words)
        return await self._patch(_status_path(key), body, STRATEGIC)

    async def _write_pools(self, term: _Term) -> bool:
        failed = False
        counts = term.allocator.counts()
        for key in term.judged:
            pool = self.surroundings.pools.get(key)
            if pool is None:
                continue
            body = _pool_body(pool, term.judged[key], counts.get(key, (Counts(), Counts())))
            if body is not None:
                path = f"{PATH}/{key.name}/status"
                failed |= not await self._patch(path, body, "application/merge-patch+json")
        return failed

    async def _patch(self, path: str, body: dict[str, object], how: str) -> bool:
        """Whether that is done with."""
        if not self.leading.is_set():
            return True
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self.api.patch(path, body, how)
        except TimeoutError:
            logger.info("PATCH %s: no answer in time", path)
            return False
        except ApiError as error:
            if error.status in (404, 409):  # what happened to it is on its way here
                logger.debug("%s", error)
                return True
            logger.warning("%s", error)
            return False
        return True


def _status_path(key: Key) -> str:
    return f"/api/v1/namespaces/{key.namespace}/services/{key.name}/status"


def _content(judged: Judged) -> object:
    pool = judged.pool
    selectors = (pool.services, pool.namespaces)
    return (pool.blocks, selectors, pool.auto_assign, judged.excluded)


def _body_of(term: _Term, key: Key) -> dict[str, object] | None:
    """What to write to a Service's status. None: nothing."""
    balancer, outcome = term.balancers.get(key), term.allocator.outcomes.get(key)
    if balancer is None or outcome is None or outcome.addresses is None:
        return None
    shown = balancer.shown
    wanted = _service_condition(outcome, balancer.problems)
    if shown.addresses == outcome.addresses and not shown.odd and wanted.says(shown.condition):
        return None
    ingress = [{"ip": text(addr), "ipMode": "VIP"} for addr in outcome.addresses]
    return {
        "metadata": {"resourceVersion": balancer.resource_version},
        "status": {
            "loadBalancer": {"ingress": ingress or None},
            "conditions": [condition_body(wanted, shown.condition)],
        },
    }


def _service_condition(outcome: Outcome, problems: tuple[Problem, ...]) -> Condition:
    problems += outcome.problems
    words = ", ".join(map(text, outcome.addresses or ()))
    if not problems:
        return Condition(ASSIGNED, "True", "Assigned", words)
    told = "; ".join(problem.message for problem in problems)
    return Condition(ASSIGNED, "False", problems[0].reason, told)


def _pool_body(
    pool: Pool, judged: Judged, counts: tuple[Counts, Counts]
) -> dict[str, object] | None:
    shown, wanted = pool.status, condition(judged)
    before = (shown.ipv4 or Counts(), shown.ipv6 or Counts()) if shown else None
    if before == counts and wanted.says(pool.condition):
        return None
    ipv4, ipv6 = counts
    return {
        "status": {
            "conditions": [condition_body(wanted, pool.condition)],
            "ipv4": {"used": ipv4.used, "free": ipv4.free},
            "ipv6": {"used": ipv6.used, "free": ipv6.free},
        }
    }
