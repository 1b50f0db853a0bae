# SPDX-License-Identifier: Apache-2.0
"""Converges the maps to the projection. Level-triggered: events only wake it.

A round takes what changed, plans, and applies in a thread, group by group (services, policy,
routes): they do not depend on each other, so one that fails does not hold the others up. A
group that failed, and every group at start and each resync period, is compared with the kernel
and planned from what is really there. Nothing is written before `release`, which is called when
the desired state is complete: what is half known must not prune live traffic.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from weir.agent.apply import AnyTable, Outcome, apply_group, compare, denies_more, misses, opened
from weir.agent.errors import Rejected
from weir.agent.plan import plan
from weir.agent.policy import MISSED
from weir.agent.rows import Change
from weir.agent.tables import Delta, Projection
from weir.datapath.errors import DatapathError
from weir.datapath.records import Service, ServiceKey

logger = logging.getLogger(__name__)

GROUPS: Mapping[str, tuple[str, ...]] = {
    "services": ("services", "backends", "maglev", "source_ranges"),
    "policy": ("policy", "prefixes", "addresses", "endpoints"),
    "routes": ("routes",),
    "blocked": ("blocked",),
    "announced": ("announced",),
    "namespaces": ("netns_addresses",),
}
# Without a row of these, more passes, not less.
FAILS_OPEN = frozenset({"blocked"})
FULL_RETRY_SECONDS = 5.0


class Runtime(Protocol):
    """What the programs read besides the tables."""

    def bump(self) -> int:
        """Raises the policy generation: established flows are judged again."""

    def set_features(self, features: int) -> None:
        """RuntimeFeature bits."""


class Follower(Protocol):
    """Cleans up behind changed Services."""

    def note(self, changes: Mapping[ServiceKey, Change[Service]]) -> None:
        """Rows of `services` that change from what was noted before."""

    def published(self) -> None:
        """All that was noted is in the kernel."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds. resync: between comparisons with the kernel, which cost a read of all maps;
    retry: first delay after a failure, doubled up to retry_limit."""

    resync: float = 300.0
    retry: float = 0.1
    retry_limit: float = 30.0


@dataclass(slots=True)
class Health:
    """Of one group, for status, metrics and retries."""

    failures: int = 0
    error: str = ""
    retry_at: float = 0.0
    compare: bool = True
    rejected: dict[str, set[Hashable]] = field(default_factory=dict)
    full_retry_at: float = 0.0
    shut: set[int] = field(default_factory=set)  # rule sets, see Outcome


@dataclass(slots=True)
class Statistics:
    rounds: int = 0
    last_seconds: float = 0.0
    total_seconds: float = 0.0
    rows_written: int = 0
    rows_deleted: int = 0
    repaired: int = 0
    failures: int = 0


class Reconciler:
    def __init__(
        self,
        projection: Projection,
        tables: Mapping[str, AnyTable],
        runtime: Runtime,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
        follower: Follower | None = None,
    ) -> None:
        self.projection = projection
        self.tables = dict(tables)
        self.health = {group: Health() for group in GROUPS}
        self.statistics = Statistics()
        self._runtime = runtime
        self._pace = pace or Pace()
        self._clock = clock
        self._follower = follower
        self._wake = asyncio.Event()
        self._released = asyncio.Event()
        self._wanted = 0
        self._done = 0
        self._finished = asyncio.Condition()
        self._resync_at = 0.0
        # Who was killed between the maps and the generation left them right, and flows unjudged.
        self._bump_owed = True
        self._features: int | None = None
        self._features_owed = False
        self.first_done = asyncio.Event()
        # Held during a round; who holds it may exchange the tables.
        self.paused = asyncio.Lock()

    # ---- for others

    def wake(self) -> None:
        self._wake.set()

    def release(self) -> None:
        """The desired state is complete: start writing."""
        self._released.set()

    async def flush(self) -> None:
        """Returns when all that was desired at the call was planned and applied or rejected.

        Raises DatapathError when the policy group cannot be written now.
        """
        self._wanted += 1
        wanted = self._wanted
        self.wake()
        async with self._finished:
            await self._finished.wait_for(lambda: self._done >= wanted)
        health = self.health["policy"]
        if health.error:
            raise DatapathError("write", "policy tables", 0, health.error)

    def require_written(self, subject: str, keys: Mapping[str, set[Hashable]]) -> None:
        """Raises Rejected when rows with these keys did not fit."""
        full = tuple(
            table
            for health in self.health.values()
            for table, rejected in health.rejected.items()
            if rejected & keys.get(table, set())
        )
        if full:
            raise Rejected(subject, full)

    async def next_round(self) -> None:
        """Returns after the round that is under way, or the next one."""
        rounds = self.statistics.rounds
        async with self._finished:
            await self._finished.wait_for(lambda: self.statistics.rounds != rounds)

    @property
    def released(self) -> bool:
        return self._released.is_set()

    @property
    def settled(self) -> bool:
        return self.first_done.is_set() and not any(h.error for h in self.health.values())

    # ---- the loop

    async def run(self) -> None:
        await self._released.wait()
        while True:
            self._wake.clear()
            async with self.paused:
                await self.round()
            timeout = max(0.0, self._next_due() - self._clock())
            try:
                async with asyncio.timeout(timeout):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def round(self) -> None:
        """Take, compare where due, plan, apply."""
        wanted = self._wanted
        began = self._clock()
        if began >= self._resync_at:
            self._resync_at = began + self._pace.resync
            for health in self.health.values():
                health.compare = True
        retired = self._retired()
        # At the start only: later, what is ours is told from what had to be repaired.
        compared = self.health["services"].compare and not self.first_done.is_set()
        delta = self.projection.take(compared=compared)
        if self._follower is not None:
            self._follower.note(delta.services)
        due = [group for group, health in self.health.items() if began >= health.retry_at]
        for group, health in self.health.items():
            if group not in due:
                # What changed meanwhile is found by the comparison that the retry starts with.
                health.compare = True
                for table in GROUPS[group]:
                    getattr(delta, table).clear()
        # Whatever a new row needs looked at is before the row is there, and goes after it.
        features = self.projection.features
        await self._write_features(features | (self._features or 0))
        await self._apply([g for g in due if await self._look(g, delta)], delta, retired)
        if not self.health["services"].error:
            await self._write_features(features)
        if self._follower is not None and not self.health["services"].error:
            self._follower.published()
        self.statistics.rounds += 1
        self.statistics.last_seconds = self._clock() - began
        self.statistics.total_seconds += self.statistics.last_seconds
        if not self.first_done.is_set() and not any(h.error for h in self.health.values()):
            self.projection.services.forget_adoptable()
            self.first_done.set()
        async with self._finished:
            self._done = wanted
            self._finished.notify_all()

    async def _look(self, group: str, delta: Delta) -> bool:
        """Put what the kernel really holds into the delta, where that is to be compared.

        False when the kernel could not be read. The projection's rows change in `take` only, so
        the thread reads them safely.
        """
        health = self.health[group]
        retry_full = self._clock() >= health.full_retry_at
        for name in GROUPS[group]:
            changes: dict[Any, Change[Any]] = getattr(delta, name)
            desired: Mapping[Any, Any] = self.projection.table(name).rows
            rejected = health.rejected.get(name, set())
            if health.compare:
                try:
                    found = await asyncio.to_thread(compare, self.tables[name], desired)
                except DatapathError as error:
                    self._failed(group, error)
                    return False
                if self.first_done.is_set() and not health.error:
                    ours = changes.keys() | rejected
                    if name == "endpoints":
                        ours |= {
                            k for k, row in found.items() if row and opened(row) == desired.get(k)
                        }
                    self.statistics.repaired += sum(key not in ours for key in found)
                changes.clear()
                changes.update({k: Change(row, desired.get(k)) for k, row in found.items()})
            elif rejected and retry_full:
                for key in rejected & desired.keys() - changes.keys():
                    changes[key] = Change(None, desired[key])
        return True

    async def _apply(
        self, due: list[str], delta: Delta, retired: Mapping[str, frozenset[int]]
    ) -> None:
        numbers = self.projection.class_numbers
        prefixes = self.projection.table("prefixes").rows
        made = plan(delta, numbers, self.projection.policy, prefixes)
        for group in due:
            ops = getattr(made, group)
            outcome = Outcome()
            if ops:
                untried = {
                    name: keys - getattr(delta, name).keys()
                    for name, keys in self.health[group].rejected.items()
                }
                outcome = await asyncio.to_thread(
                    apply_group,
                    ops,
                    self.tables,
                    self._shut_by(untried),
                    self.projection.policy.relying_on,
                )
            self._account(group, outcome, delta)
        for number in made.borrowed:
            numbers.release(number)
        if made.judge_again or self._bump_owed:
            await self._bump()
        if not any(h.error or h.rejected for h in self.health.values()):
            self._reclaim(retired)

    async def _bump(self) -> None:
        try:
            await asyncio.to_thread(self._runtime.bump)
            self._bump_owed = False
        except DatapathError as error:
            self._bump_owed = True
            logger.warning("raising the policy generation: %s", error)
            self.health["policy"].retry_at = self._clock() + self._pace.retry

    async def _write_features(self, features: int) -> None:
        if features == self._features:
            return
        try:
            await asyncio.to_thread(self._runtime.set_features, features)
            self._features = features
            self._features_owed = False
        except DatapathError as error:
            self._features_owed = True
            logger.warning("writing the features: %s", error)

    def _account(self, group: str, outcome: Outcome, delta: Delta) -> None:
        health = self.health[group]
        self.statistics.rows_written += outcome.written
        self.statistics.rows_deleted += outcome.deleted
        if outcome.failed is not None:
            self._failed(group, outcome.failed)
            self._bump_owed |= group == "policy"
            return
        health.failures = 0
        health.error = ""
        health.compare = False
        health.retry_at = 0.0
        rejected = outcome.rejected
        for name, keys in health.rejected.items():
            untried = keys & self.projection.table(name).rows.keys() - getattr(delta, name).keys()
            if untried:
                rejected.setdefault(name, set()).update(untried)
        self._name_rejected(health.rejected, rejected)
        health.rejected = rejected
        if group == "policy":
            self._account_shut(health, outcome.shut)
        if any(c.new is None for name in rejected for c in getattr(delta, name).values()):
            health.full_retry_at = 0.0  # room was made
            self.wake()
        elif self._clock() >= health.full_retry_at:
            health.full_retry_at = self._clock() + FULL_RETRY_SECONDS

    def _shut_by(self, rejected: Mapping[str, set[Hashable]]) -> set[int]:
        """Rule sets that are shut as these rows are not there."""
        policy = self.projection.policy
        desired: Mapping[Any, Any] = policy.rows.rows
        rows = ((key, desired.get(key)) for key in rejected.get("policy", ()))
        shut = {key.rule_set for key, row in rows if row is not None and denies_more(row)}  # type: ignore[attr-defined]  # PolicyKey
        for table in self.missed(rejected):
            shut |= policy.relying_on(table)
        return shut

    def missed(self, rejected: Mapping[str, set[Hashable]]) -> list[str]:
        """Tables for want of whose rows rules that deny may not know what they deny."""
        found = []
        for table in MISSED:
            rows: Mapping[Any, Any] = self.projection.table(table).rows
            if misses(table, (rows[key] for key in rejected.get(table, ()) if key in rows)):
                found.append(table)
        return found

    def _account_shut(self, health: Health, written: set[int]) -> None:
        now = self._shut_by(health.rejected)
        # Established flows through what has been shut.
        self._bump_owed |= bool(written - health.shut)
        if (health.shut | written) - now:
            # Open again, which the comparison sees to.
            health.compare = True
            self.wake()
        health.shut = now

    def _failed(self, group: str, error: DatapathError) -> None:
        health = self.health[group]
        delay = min(self._pace.retry * 2.0**health.failures, self._pace.retry_limit)
        health.failures = min(health.failures + 1, 30)
        health.error = str(error)
        health.compare = True
        health.retry_at = self._clock() + delay
        self.statistics.failures += 1
        logger.error("%s: %s; again in %.1f s", group, error, delay)

    def _name_rejected(
        self, before: Mapping[str, set[Hashable]], now: Mapping[str, set[Hashable]]
    ) -> None:
        for table, keys in now.items():
            fails = "open" if table in FAILS_OPEN else "closed"
            for owner in sorted({self.projection.owner(table, k) for k in keys}):
                if keys != before.get(table):
                    logger.error("no room in %s for %s: it fails %s", table, owner, fails)

    def rejected_owners(self) -> dict[str, list[str]]:
        """By table, the objects whose rows did not fit."""
        return {
            table: sorted({self.projection.owner(table, key) for key in keys})
            for health in self.health.values()
            for table, keys in health.rejected.items()
            if keys
        }

    def _next_due(self) -> float:
        due = [self._resync_at]
        due += [h.retry_at for h in self.health.values() if h.error]
        due += [h.full_retry_at for h in self.health.values() if h.rejected]
        if self._bump_owed or self._features_owed:
            due.append(self._clock() + self._pace.retry)
        return min(due)

    def _retired(self) -> dict[str, frozenset[int]]:
        """Numbers that the rows about to be taken do not mention."""
        self.projection.project()
        return {name: n.retired() for name, n in self.projection.number_spaces().items()}

    def _reclaim(self, retired: Mapping[str, frozenset[int]]) -> None:
        for name, numbers in self.projection.number_spaces().items():
            numbers.reclaim(retired[name])
