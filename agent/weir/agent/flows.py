# SPDX-License-Identifier: Apache-2.0
"""The agent's work on what the programs remember of flows, put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping

from weir.agent.aging import Aging
from weir.agent.conntrack import Conntrack
from weir.agent.denials import Denials
from weir.agent.explain import Explainer
from weir.agent.gate import Gate
from weir.agent.rows import Change
from weir.agent.sweep import Watch
from weir.agent.sweeper import Sweeper
from weir.agent.tables import Projection
from weir.agent.walks import Walks
from weir.agent.why import Why
from weir.datapath.datapath import Tables
from weir.datapath.records import Service, ServiceKey

NO_DESTROY = (
    "this kernel cannot end connected UDP sockets to backends that are gone "
    "(CONFIG_INET_DIAG_DESTROY): their programs must notice themselves"
)


class Flows:
    """`namespaces`: paths of the pods' network namespaces."""

    def __init__(
        self,
        projection: Projection,
        explainer: Explainer,
        gate: Gate,
        tables: Callable[[], Tables],
        namespaces: Callable[[], Iterable[str]],
    ) -> None:
        services = projection.services
        walks = Walks(gate, tables)
        self._watch = Watch(services.serving, services.backends.packed, lambda: services.facts.own)
        self.sweeper = Sweeper(self._watch, walks, namespaces)
        self.aging = Aging(self._watch, walks)
        self.conntrack = Conntrack(projection, explainer.pod_name, walks)
        self.denials = Denials(explainer, walks)
        self.why = Why(projection, explainer, walks)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.sweeper.run(), name="sweeping")
            group.create_task(self.aging.run(), name="aging")

    # ---- for the reconciler

    def adopt(self, keys: Iterable[ServiceKey]) -> None:
        """Frontends that the kernel had at start."""
        self._watch.adopt(keys)

    def note(self, changes: Mapping[ServiceKey, Change[Service]]) -> None:
        self._watch.note(changes)

    def published(self) -> None:
        self.sweeper.published()

    # ---- for status

    def warnings(self) -> list[str]:
        return self.aging.warnings() + ([NO_DESTROY] if self.sweeper.destroys is False else [])
