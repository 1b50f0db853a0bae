# SPDX-License-Identifier: Apache-2.0
"""Where the stream, the store and the projection meet, and the state file's writer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping

from weir.agent import numbering, resources
from weir.agent.errors import BadResource
from weir.agent.reconciler import Reconciler
from weir.agent.resources import Resource
from weir.agent.store import Position, Store
from weir.agent.tables import Projection
from weir.cni.endpoint import LocalEndpoint

logger = logging.getLogger(__name__)

PARSE_AT_ONCE = 500
WRITE_GAP_SECONDS = 1.0
RETRY_SECONDS = 10.0


class DesiredState:
    """The stream's Sink: store first, projection next, then the reconciler's turn."""

    def __init__(self, store: Store, projection: Projection, reconciler: Reconciler) -> None:
        self._store = store
        self._projection = projection
        self._reconciler = reconciler
        self._rejected: dict[str, str] = {}
        self._numbers: tuple[int, ...] = ()
        self._writing = asyncio.Lock()
        self.changed = asyncio.Event()
        self.applied = 0
        """The revision whose resources the projection has: the store may be ahead, as it is
        while a large change is parsed. Only this one may be acknowledged."""

    @property
    def position(self) -> Position:
        return self._store.position

    @property
    def rejected(self) -> Mapping[str, str]:
        """Resources that could not be used, with the reason."""
        return self._rejected

    def endpoints(self) -> Iterable[LocalEndpoint]:
        return list(self._projection.placement.local.values())

    async def restore(self) -> None:
        numbering.restore(self._projection, self._store.numbers)
        await self._use(self._store.resources)
        self.applied = self.position.revision
        if self.position.complete:
            self._reconciler.release()
        logger.info(
            "restored %d resources of %s/%d",
            len(self._store),
            self.position.instance or "nobody",
            self.position.revision,
        )

    async def change(self, encoded: list[bytes], removed: list[str], position: Position) -> None:
        changed = self._store.apply(encoded, removed, position).changed
        await self._write_ahead()
        await self._use(changed)
        self._announce(position)

    async def snapshot(self, encoded: list[bytes], position: Position) -> None:
        named: dict[str, bytes] = {}
        for number, item in enumerate(encoded):
            if number % PARSE_AT_ONCE == 0:
                await asyncio.sleep(0)
            try:
                named[resources.resource_name(item)] = item
            except BadResource as error:
                logger.warning("%s: skipped", error)
        changed = self._store.replace(named, position).changed
        logger.info(
            "snapshot of %s/%d: %d resources, %d changed",
            position.instance,
            position.revision,
            len(named),
            len(changed),
        )
        await self._write_ahead()
        await self._use(changed)
        self._announce(position)
        self._reconciler.release()

    def _announce(self, position: Position) -> None:
        self.applied = position.revision
        self.changed.set()
        self._reconciler.wake()

    async def _use(self, changed: Mapping[str, bytes | None]) -> None:
        """Parse in portions, then apply in one go."""
        parsed: dict[str, Resource | None] = {}
        for number, (name, encoded) in enumerate(list(changed.items())):
            if number % PARSE_AT_ONCE == PARSE_AT_ONCE - 1:
                await asyncio.sleep(0)
            self._rejected.pop(name, None)
            try:
                parsed[name] = resources.parse(encoded)[1] if encoded is not None else None
            except BadResource as error:
                # What was there under the name stays: without a policy more would be allowed.
                logger.warning("%s: not used", error)
                self._rejected[name] = error.reason
        self._projection.apply(parsed)

    # ---- the state file

    async def _write_ahead(self) -> None:
        """The file before the maps: a killed agent must not go back to what was before."""
        try:
            await self._write(durable=False)
        except OSError as error:
            logger.warning("the desired state cannot be saved, nor kept as it was: %s", error)
            await asyncio.to_thread(self._store.forget)

    async def persist(self) -> None:
        """All of it down to the disk. OSError when the disk does not take it."""
        versions = numbering.versions(self._projection)
        if versions != self._numbers:
            self._store.set_numbers(numbering.dump(self._projection))
            self._numbers = versions
        await self._write(durable=True)

    async def _write(self, *, durable: bool) -> None:
        async with self._writing:
            nothing = not self._store.dirty and not (durable and self._store.unsynced)
            if nothing or not self._store.position.complete:
                return
            pending = self._store.take_pending(durable=durable)
            writing = asyncio.ensure_future(asyncio.to_thread(pending.write))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                # The thread goes on: the last write, at the end, must not begin beside it.
                await asyncio.wait([writing])
                raise
            except OSError:
                pass
            finally:
                if writing.done() and writing.exception() is None:
                    self._store.written(writing.result())
                else:
                    self._store.failed()
            writing.result()

    async def keep_persisting(self) -> None:
        while True:
            await asyncio.sleep(WRITE_GAP_SECONDS)
            try:
                await self.persist()
            except OSError as error:
                logger.warning("the desired state cannot be saved: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
