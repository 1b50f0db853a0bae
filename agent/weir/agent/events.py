# SPDX-License-Identifier: Apache-2.0
"""Events of the datapath to whoever listens. Nobody listening costs the datapath nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from weir.agent.explain import Explained, Explainer
from weir.datapath.records import Event, EventKind

logger = logging.getLogger(__name__)

DROPS = 1 << EventKind.DROP | 1 << EventKind.AUDIT
EVERYTHING = DROPS | 1 << EventKind.ALLOW
BACKLOG = 4096


class Reader(Protocol):
    @property
    def fd(self) -> int: ...

    def drain(self) -> list[Event]: ...

    def close(self) -> None: ...


class Source(Protocol):
    """The part of a Datapath that events come from."""

    def events(self) -> Reader: ...

    def set_event_mask(self, mask: int) -> None: ...


class Subscriber:
    """A queue that loses the oldest when its reader is slow; `lost` counts them."""

    def __init__(self, mask: int) -> None:
        self.mask = mask
        self.lost = 0
        self._queue: asyncio.Queue[Explained] = asyncio.Queue(BACKLOG)

    def offer(self, event: Explained) -> None:
        if self._queue.full():
            self._queue.get_nowait()
            self.lost += 1
        self._queue.put_nowait(event)

    async def get(self) -> Explained:
        return await self._queue.get()


class Events:
    def __init__(self, source: Callable[[], Source], explainer: Explainer) -> None:
        self._source = source
        self._explainer = explainer
        self._subscribers: list[Subscriber] = []
        self._reader: Reader | None = None
        self._watched = -1

    @asynccontextmanager
    async def subscribe(self, mask: int) -> AsyncIterator[Subscriber]:
        subscriber = Subscriber(mask)
        self._subscribers.append(subscriber)
        try:
            await self.refresh()
            yield subscriber
        finally:
            self._subscribers.remove(subscriber)
            await self.refresh()

    async def refresh(self) -> None:
        """Make mask and reader fit the subscribers; also after the datapath was opened anew."""
        mask = 0
        for subscriber in self._subscribers:
            mask |= subscriber.mask
        source = self._source()
        if self._reader is not None:
            asyncio.get_running_loop().remove_reader(self._watched)
            self._reader.close()
            self._reader = None
        if mask:
            self._reader = source.events()
            self._reader.drain()
            self._watched = self._reader.fd
            asyncio.get_running_loop().add_reader(self._watched, self._readable)
        await asyncio.to_thread(source.set_event_mask, mask)

    def _readable(self) -> None:
        if self._reader is None:
            return
        for event in self._reader.drain():
            wanted = [s for s in self._subscribers if s.mask >> event.kind & 1]
            if wanted:
                explained = self._explainer.explain(event)
                for subscriber in wanted:
                    subscriber.offer(explained)
