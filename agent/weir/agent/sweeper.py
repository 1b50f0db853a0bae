# SPDX-License-Identifier: Apache-2.0
"""Takes away what is stale (weir.agent.sweep) after Services have changed, and ends connected UDP
sockets to vanished backends. One walk serves a burst of changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from weir.agent import sockets, sweep
from weir.agent.rows import Change
from weir.agent.sweep import Due, Flow, Pair, Place, Watch
from weir.agent.walks import Exchanged, Walks
from weir.datapath.datapath import Tables
from weir.datapath.errors import DatapathError
from weir.datapath.records import (
    Affinity,
    AffinityKey,
    CtEntry,
    CtKey,
    Service,
    ServiceKey,
    SockNat,
    SockNatKey,
)
from weir.datapath.view import View

logger = logging.getLogger(__name__)

GAP_SECONDS = 0.5
RETRY_SECONDS = 1.0

T = TypeVar("T", bound=Hashable)
V = TypeVar("V")


@dataclass(slots=True)
class SweepStatistics:
    sweeps: int = 0
    last_seconds: float = 0.0
    flows: int = 0
    sockets: int = 0
    clients: int = 0
    destroyed: int = 0


class Sweeper:
    """`note` and `published` are called by the reconciler, `run` is a task."""

    def __init__(self, watch: Watch, walks: Walks, namespaces: Callable[[], Iterable[str]]) -> None:
        self._watch = watch
        self._walks = walks
        self._namespaces = namespaces
        self._wanted = asyncio.Event()
        self.statistics = SweepStatistics()
        # Whether this kernel lets us end sockets; None: not tried yet.
        self.destroys: bool | None = None

    def note(self, changes: Mapping[ServiceKey, Change[Service]]) -> None:
        self._watch.note(changes)

    def published(self) -> None:
        """The rows noted so far are in the kernel: nobody chooses an old backend any more."""
        if self._watch.due:
            self._wanted.set()

    async def run(self) -> None:
        self.destroys = await asyncio.to_thread(sockets.can_destroy)
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            due, self._watch.due = self._watch.due, Due()
            try:
                await self.sweep(due)
            except (DatapathError, Exchanged) as error:
                logger.warning("sweep after changed Services: %s", error or "begun again")
                self._watch.due.add(due)
                self._wanted.set()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                await asyncio.sleep(GAP_SECONDS)

    async def sweep(self, due: Due) -> None:
        clock = asyncio.get_running_loop().time
        began, before = clock(), self.statistics.flows + self.statistics.sockets
        if due.flows:
            serving = _remembering(self._watch.serving)
            await self._sweep_flows(serving)
            await self._sweep_sockets(due.gone, serving)
        if due.affinity:
            await self._sweep_affinity()
        statistics = self.statistics
        statistics.sweeps += 1
        statistics.last_seconds = clock() - began
        if statistics.flows + statistics.sockets != before:
            logger.info(
                "Services changed: took away %d stale flows and rows of sockets",
                statistics.flows + statistics.sockets - before,
            )

    async def _sweep_flows(self, serving: Callable[[Place], set[bytes] | None]) -> None:
        tables = self._walks.tables
        frontends = self._watch.frontends()
        stale: dict[Flow, bool] = {}
        walk = self._walks.each(_flows, lambda batch: sweep.udp_flows(batch.rows(), frontends))
        async for batch, found in walk:
            picked: list[int] = []
            for flow, places in found.items():
                if flow not in stale:
                    stale[flow] = sweep.flow_is_stale(flow, serving)
                if stale[flow]:
                    picked += places
            self.statistics.flows += await self._walks.delete(tables, batch, picked)

    async def _sweep_sockets(
        self, gone: set[Place], serving: Callable[[Place], set[bytes] | None]
    ) -> None:
        victims: dict[int, set[Place]] = {}
        try:
            await self._forget_sockets(gone, serving, victims)
        finally:
            # Also of a walk that broke off: what it has deleted nobody finds again.
            if victims and self.destroys:
                namespaces = list(self._namespaces())
                done = await asyncio.to_thread(sockets.destroy, victims, namespaces)
                self.statistics.destroyed += done
                logger.info("ended %d connected UDP sockets to vanished backends", done)

    async def _forget_sockets(
        self,
        gone: set[Place],
        serving: Callable[[Place], set[bytes] | None],
        victims: dict[int, set[Place]],
    ) -> None:
        tables = self._walks.tables
        stale: dict[Pair, bool] = {}
        walk = self._walks.each(_sockets, lambda batch: sweep.udp_sockets(batch.rows()))
        async for batch, found in walk:
            picked: list[int] = []
            for pair, places in found.items():
                if pair not in stale:
                    stale[pair] = sweep.pair_is_stale(pair, serving)
                if not stale[pair]:
                    continue
                picked += [at for at, _ in places]
                if sweep.names_backend(pair, gone, serving):
                    for _, cookie in places:
                        victims.setdefault(cookie, set()).add(pair.key)
            self.statistics.sockets += await self._walks.delete(tables, batch, picked)

    async def _sweep_affinity(self) -> None:
        tables = self._walks.tables
        sticking = _remembering(self._watch.sticking)
        async for batch, rows in self._walks.each(_clients, lambda batch: list(batch.rows())):
            picked = sweep.stale_affinity(rows, sticking)
            self.statistics.clients += await self._walks.delete(tables, batch, picked)


def _remembering(ask: Callable[[T], V]) -> Callable[[T], V]:
    """Asks once: a walk has few different questions, and many of each."""
    answers: dict[T, V] = {}

    def answer(question: T) -> V:
        if question not in answers:
            answers[question] = ask(question)
        return answers[question]

    return answer


def _flows(tables: Tables) -> View[CtKey, CtEntry]:
    # Between the look and the deletion a program may have chosen a new backend.
    return tables.ct.view(sweep.FLOW_OF_KEY, sweep.FLOW_OF_VALUE, ("nat_address", "nat_port"))


def _sockets(tables: Tables) -> View[SockNatKey, SockNat]:
    watched = sweep.SOCKET_OF_VALUE
    return tables.sock_nat.view(sweep.SOCKET_OF_KEY, sweep.SOCKET_OF_VALUE, watched)


def _clients(tables: Tables) -> View[AffinityKey, Affinity]:
    watched = ("address", "port")
    return tables.affinity.view(sweep.AFFINITY_OF_KEY, sweep.AFFINITY_OF_VALUE, watched)
