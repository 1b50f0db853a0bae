# SPDX-License-Identifier: Apache-2.0
"""The latest encoding of every resource, by revision, and what changed since any of them.

Not a queue: a name is there once, at its last revision, so a burst coalesces by itself and a
slow reader costs nothing but its cursor. Tombstones are bounded; a reader from before the last
one dropped (`floor`) needs a snapshot. What only one node may see is in a log of its own.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weir.api.v1 import weir_pb2 as pb
from weir.operator.resources import Change

TOMBSTONES = 20_000
BATCH_RESOURCES = 500
BATCH_BYTES = 256 * 1024


@dataclass(slots=True)
class Part:
    """What one Update can carry."""

    resources: list[bytes] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def batches(resources: Iterable[bytes], removed: Iterable[str]) -> Iterator[Part]:
    """Split by number and size. Yields nothing if there is nothing."""
    part = Part()
    size = 0
    for data in resources:
        if part.resources and (
            len(part.resources) >= BATCH_RESOURCES or size + len(data) > BATCH_BYTES
        ):
            yield part
            part, size = Part(), 0
        part.resources.append(data)
        size += len(data)
    for name in removed:
        if len(part.resources) + len(part.removed) >= BATCH_RESOURCES:
            yield part
            part = Part()
        part.removed.append(name)
    if part.resources or part.removed:
        yield part


class Log:
    """Resources of one audience."""

    def __init__(self, tombstones: int = TOMBSTONES) -> None:
        self._limit = tombstones
        self._live: OrderedDict[str, tuple[int, bytes]] = OrderedDict()
        self._gone: OrderedDict[str, int] = OrderedDict()
        self.floor = 0  # readers at an earlier revision may have missed a removal

    def __len__(self) -> int:
        return len(self._live)

    def put(self, name: str, data: bytes | None, revision: int) -> bool:
        """False: that is what it already was."""
        known = self._live.get(name)
        if data is None:
            if known is None:
                return False
            del self._live[name]
            self._gone[name] = revision
            self._gone.move_to_end(name)
            if len(self._gone) > self._limit:
                _, self.floor = self._gone.popitem(last=False)
            return True
        if known is not None and known[1] == data:
            return False
        self._gone.pop(name, None)
        self._live[name] = (revision, data)
        self._live.move_to_end(name)
        return True

    def since(self, revision: int) -> tuple[list[bytes], list[str]]:
        """What changed after it: resources in order of their last change, and names gone."""
        changed: list[bytes] = []
        for at, data in reversed(self._live.values()):
            if at <= revision:
                break
            changed.append(data)
        changed.reverse()
        gone: list[str] = []
        for name in reversed(self._gone):
            if self._gone[name] <= revision:
                break
            gone.append(name)
        return changed, gone


class Revisions:
    """All logs under one count of revisions, and the encoded Updates that streams share."""

    def __init__(self, instance: str, tombstones: int = TOMBSTONES) -> None:
        self.instance = instance
        self.revision = 0
        self._tombstones = tombstones
        self._shared = Log(tombstones)
        self._nodes: dict[str, Log] = {}
        self._cache: dict[tuple[int, bool], list[bytes]] = {}
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._shared) + sum(len(log) for log in self._nodes.values())

    def publish(self, changes: Iterable[Change], always: bool = False) -> int:
        """Take changes in as one revision, if any is news or `always`. The number of news."""
        revision = self.revision + 1
        news = 0
        for change in changes:
            data = None
            if change.resource is not None:
                data = change.resource.SerializeToString(deterministic=True)
            log = self._shared
            if change.node is not None:
                log = self._nodes.setdefault(change.node, Log(self._tombstones))
            news += log.put(change.name, data, revision)
        if news or always:
            self.revision = revision
            self._cache.clear()
            self._news.set()
            self._news = asyncio.Event()
        return news

    async def beyond(self, revision: int) -> None:
        """Wait for a later revision."""
        while self.revision <= revision:
            await self._news.wait()

    def can_resume(self, instance: str, revision: int, node: str) -> bool:
        own = self._nodes.get(node)
        floor = max(self._shared.floor, own.floor if own is not None else 0)
        return instance == self.instance and floor <= revision <= self.revision

    def delta(self, revision: int, node: str) -> list[bytes]:
        """Encoded Updates from a revision to now, for one node. Applied together."""
        shared = self._shared_updates(revision, False)
        own = self._own_updates(revision, node, False)
        if own and not shared:
            own[-1].more = False
        return [update.SerializeToString() for update in own] + shared

    def snapshot(self, node: str) -> list[bytes]:
        """Encoded Updates with all that there is for one node."""
        own = self._own_updates(0, node, True)
        return [update.SerializeToString() for update in own] + self._shared_updates(0, True)

    def _own_updates(self, revision: int, node: str, snapshot: bool) -> list[pb.Update]:
        log = self._nodes.get(node)
        changed, gone = log.since(revision) if log is not None else ([], [])
        updates = [
            self._update(part, more=True) for part in batches(changed, () if snapshot else gone)
        ]
        if snapshot:
            if not updates:
                updates.append(self._update(Part(), more=True))
            updates[0].snapshot_begins = True
        return updates

    def _shared_updates(self, revision: int, snapshot: bool) -> list[bytes]:
        """Encoded once for all streams that are as far."""
        made = self._cache.get((revision, snapshot))
        if made is None:
            changed, gone = self._shared.since(revision)
            parts = list(batches(changed, () if snapshot else gone))
            if snapshot and not parts:
                parts.append(Part())
            updates = [self._update(part, more=True) for part in parts]
            if updates:
                updates[-1].more = False
                updates[-1].snapshot_ends = snapshot
            made = [update.SerializeToString() for update in updates]
            self._cache[revision, snapshot] = made
        return made

    def _update(self, part: Part, more: bool) -> pb.Update:
        return pb.Update(
            instance=self.instance,
            revision=self.revision,
            resources=part.resources,
            removed=part.removed,
            more=more,
        )
