# SPDX-License-Identifier: Apache-2.0
"""Walks over the programs' own tables, batch by batch, between everything else.

A batch is read and looked at in a thread, a few milliseconds each, so that neither the event loop
nor an exchange of the datapath waits for a whole table. When the datapath is exchanged midway, the
walk ends with `Exchanged`: its descriptors are closed, perhaps somebody else's by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from weir.agent.gate import Gate
from weir.datapath.datapath import Tables
from weir.datapath.view import Batch, View

T = TypeVar("T")
AnyBatch = Batch[Any, Any]


class Exchanged(Exception):
    """Begin again, with the new tables."""


class Walks:
    def __init__(self, gate: Gate, tables: Callable[[], Tables]) -> None:
        self._gate = gate
        self._tables = tables

    @property
    def tables(self) -> Tables:
        return self._tables()

    async def each(
        self,
        view: Callable[[Tables], View[Any, Any]],
        look: Callable[[AnyBatch], T],
        pause: float = 0.0,
    ) -> AsyncIterator[tuple[AnyBatch, T]]:
        """All batches with what `look` made of each in a thread. `pause`: seconds between two."""
        tables = self._tables()
        batches = view(tables).batches()

        def step() -> tuple[AnyBatch, T] | None:
            batch = next(batches, None)
            return None if batch is None else (batch, look(batch))

        while found := await self._inside(tables, step):
            yield found
            await asyncio.sleep(pause)

    async def read(self, work: Callable[[Tables], T]) -> T:
        """What `work` makes of the tables, in a thread: few lookups, or a small table."""
        tables = self._tables()
        return await self._inside(tables, lambda: work(tables))

    async def delete(self, tables: Tables, batch: AnyBatch, picked: Sequence[int]) -> int:
        """As `Batch.delete`, of a batch of these tables."""
        if not picked:
            return 0
        return await self._inside(tables, lambda: batch.delete(picked))

    async def _inside(self, tables: Tables, work: Callable[[], T]) -> T:
        async with self._gate.use():
            if self._tables() is not tables:
                raise Exchanged
            return await asyncio.to_thread(work)
