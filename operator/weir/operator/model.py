# SPDX-License-Identifier: Apache-2.0
"""Where reflectors, announcements, compiler and revisions meet: changes in, revisions out.

The compiler is run when things go quiet for a turn of the loop, and at most once in the
configured gap, so a burst of events becomes one revision and a lone event waits for nothing.
Before every kind has synced, only objects are kept: the first compilation takes them in the
order that makes it cheap (namespaces, policies, pods), and no agent sees half a cluster.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weir.api.address import Addr
from weir.operator.announcer import Announcer
from weir.operator.blocklists import BlockLists
from weir.operator.claims import Claims, Tell
from weir.operator.cluster_policy import ClusterPolicies
from weir.operator.compiler import Compiler
from weir.operator.conditions import Conditions
from weir.operator.objects import Key, Problem
from weir.operator.revisions import Revisions
from weir.operator.writes import Reference

logger = logging.getLogger(__name__)

# In the order of the first compilation.
ORDER = (
    *("Namespace", "NetworkPolicy", "ClusterNetworkPolicy", "Node", "Pod"),
    *("Service", "EndpointSlice", "BlockList", "LoadBalancerPool"),
)
PROBLEMS_LOGGED = 5  # of one object at a time
YIELD_EVERY = 500  # objects of the first compilation between turns for others


@dataclass(slots=True)
class Model:
    """The consumer of every reflector, and of the agents' announcements."""

    revisions: Revisions
    gap: float
    on_synced: Callable[[], None]
    on_conflict: Tell = lambda _reference, _problems: None
    compiler: Compiler = field(default_factory=Compiler)
    claims: Claims = field(init=False)
    blocklists: BlockLists = field(init=False)
    cluster_policies: ClusterPolicies = field(init=False)
    announcer: Announcer = field(default_factory=Announcer)
    conditions: Conditions = field(default_factory=lambda: Conditions(asyncio.Event()))
    compile_seconds: float = 0.0
    compilations: int = 0
    problem_count: int = 0
    _waiting: dict[str, dict[Key, object]] = field(default_factory=dict)
    _synced: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _complete: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.claims = Claims(self.compiler, self._conflict)
        self.blocklists = BlockLists(self._conflict, self.conditions)
        self.cluster_policies = ClusterPolicies(self._conflict, self.conditions)

    # Consumer

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        if self._complete.is_set() and kind not in self._waiting:
            self._apply(kind, key, new)
            self._changed.set()
            return
        objects = self._waiting.setdefault(kind, {})
        if new is None and not self._complete.is_set():
            objects.pop(key, None)
        else:
            objects.pop(key, None)
            objects[key] = new

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        self.problem_count += len(problems)
        for problem in problems[:PROBLEMS_LOGGED]:
            text = problem.message[:500]
            logger.warning("%s %s: %s: %s", kind, key, problem.field or "object", text)
        if len(problems) > PROBLEMS_LOGGED:
            more = len(problems) - PROBLEMS_LOGGED
            logger.warning("%s %s: and %d more problems", kind, key, more)

    def synced(self, kind: str) -> None:
        self._synced.add(kind)
        if not self._complete.is_set() and self._synced.issuperset(ORDER):
            self._complete.set()

    def silent(self, node: str, on: bool) -> None:
        """Nothing is heard of a node, or something again."""
        logger.warning("%s: %s", node, "its kubelet is silent" if on else "its kubelet is back")
        self.announcer.silent(node, on)
        self._changed.set()

    # Announcements

    def announce(self, node: str, uid: str, addresses: tuple[Addr, ...] | None) -> None:
        self.compiler.announce(node, uid, addresses)
        self._changed.set()

    def announced_by(self, node: str) -> list[str]:
        return self.compiler.announced_by(node)

    @property
    def ready(self) -> bool:
        return self.revisions.revision > 0

    async def run(self) -> None:
        await self._complete.wait()
        await self._first()
        self._publish(always=True)
        # What is here now mostly stays: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        self.on_synced()
        while True:
            await self._changed.wait()
            await asyncio.sleep(0)  # what arrived together goes out together
            self._publish()
            await asyncio.sleep(self.gap)

    async def _first(self) -> None:
        started = time.perf_counter()
        count = 0
        for kind in ORDER:
            # Changes that come meanwhile join what is waiting, or are applied if it is through.
            while objects := self._waiting.get(kind):
                key = next(iter(objects))
                self._apply(kind, key, objects.pop(key))
                count += 1
                if count % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
            self._waiting.pop(kind, None)
        logger.info("compiled %d objects in %.2f s", count, time.perf_counter() - started)

    def _apply(self, kind: str, key: Key, new: Any) -> None:
        started = time.perf_counter()
        match kind:
            case "Namespace":
                self.compiler.namespace(key, new)
            case "NetworkPolicy":
                self.compiler.policy(key, new)
            case "ClusterNetworkPolicy":
                self.compiler.policy(key, self.cluster_policies.change(key, new))
            case "Node":
                self.claims.node(key, new)
                self.blocklists.node(key, new)
                self.announcer.node(key, new)
            case "Pod":
                self.claims.pod(key, new)
            case "Service":
                self.claims.service(key, new)
                self.announcer.service(key, new)
            case "EndpointSlice":
                self.compiler.slice(key, new)
                self.blocklists.slice(key, new)
                self.announcer.slice(key, new)
            case "BlockList":
                self.blocklists.change(key, new)
            case "LoadBalancerPool":
                self.announcer.pool(key, new)
        self.compile_seconds += time.perf_counter() - started

    def _conflict(self, about: Reference, problems: tuple[Problem, ...]) -> None:
        self.problems(about.kind, Key(about.namespace, about.name), problems)
        self.on_conflict(about, problems)

    def _publish(self, always: bool = False) -> None:
        self._changed.clear()
        started = time.perf_counter()
        self.claims.settle()
        changes = self.compiler.flush() + self.blocklists.settle() + self.announcer.settle()
        news = self.revisions.publish(changes, always)
        self.compile_seconds += time.perf_counter() - started
        self.compilations += 1
        for refusal in self.compiler.refusals:
            logger.warning(
                "%s: announcement of pod %s refused: %s", refusal.node, refusal.pod, refusal.reason
            )
        self.compiler.refusals.clear()
        if news:
            logger.debug("revision %d: %d resources", self.revisions.revision, news)
