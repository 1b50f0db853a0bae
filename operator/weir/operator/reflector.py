# SPDX-License-Identifier: Apache-2.0
"""List and watch of one kind: every object, parsed at the edge, and each change exactly once.

The reflector remembers what it reported. So after a relist (at start, after 410, after the API
server lost its history) it reports the difference, objects that vanished meanwhile included.
An object that cannot be read is reported by name and treated as gone; the rest goes on. Written
for this instead of a client library's watch because of what those cost at 10,000 objects.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import msgspec

from weir.operator import wire
from weir.operator.api import Api, ApiError
from weir.operator.objects import Key, Parsed, Problem, key_of

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reader = Callable[[msgspec.Raw], Parsed[T]]

NOT_FOUND = 404
GONE = 410


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. A watch ends itself after `watch`, spread by half, and is silent at most `silence`
    (bookmarks come about once a minute); retries back off from `retry` to `retry_most`. After
    `barren` watches in a row that brought nothing it is listed again: the server may never reach
    the version that is asked for, as after etcd was restored from a backup."""

    watch: float = 300.0
    silence: float = 100.0
    retry: float = 0.1
    retry_most: float = 15.0
    page: int = 500
    barren: int = 5


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """A kind of object: where to list it, how to read one, and what stands in for one that
    cannot be read (None: nothing does). optional: a cluster need not have the kind. fields: a
    field selector; what it does not select is not there."""

    name: str
    path: str
    read: Reader[T]
    unreadable: Callable[[Key], T | None] = lambda _key: None
    optional: bool = False
    fields: str = ""


class Consumer(Protocol):
    """Told synchronously, in order, from the event loop."""

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None: ...

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None: ...

    def synced(self, kind: str) -> None: ...


class Lost(Exception):
    """The watch cannot go on from where it was: list again."""


@dataclass(slots=True)
class Reflector(Generic[T]):
    """Runs until cancelled. `objects` are the latest of each that could be read."""

    api: Api
    kind: Kind[T]
    consumer: Consumer
    timing: Timing = field(default_factory=Timing)
    jitter: Callable[[], float] = random.random
    objects: dict[Key, T] = field(default_factory=dict)
    lists: int = 0
    failures: int = 0
    _version: str = ""
    _bad: dict[Key, tuple[Problem, ...]] = field(default_factory=dict)
    _barren: int = 0
    _absent: bool = False
    _doubted: bool = False

    async def run(self) -> None:
        delay = self.timing.retry
        while True:
            try:
                if not self._version:
                    await self._list()
                    delay = self.timing.retry
                heard = await self._watch()
                if heard:
                    delay = self.timing.retry
                    continue
                # A watch that ends at once, without a word, must not become a busy loop.
            except Lost as lost:
                logger.info("%s: listing again: %s", self.kind.name, lost)
                self._version = ""
            except ApiError as error:
                if error.status == NOT_FOUND and self.kind.optional:
                    await self._wait_for_kind(error)
                    continue
                self.failures += 1
                logger.warning("%s: %s; again in about %.1f s", self.kind.name, error, delay)
                if error.status == GONE:
                    self._version = ""
                elif error.status:
                    self._barren += 1
            if self._barren >= self.timing.barren:
                logger.warning("%s: listing again: watches bring nothing", self.kind.name)
                self._version = ""
            await asyncio.sleep(delay * (0.5 + self.jitter()))
            delay = min(delay * 2, self.timing.retry_most)

    async def _wait_for_kind(self, error: ApiError) -> None:
        """There are no objects of a kind that there is not; it may come. Of one that was there it
        is asked once more: for a server's bad moment no policy must go out of force."""
        self._version = ""
        if self.objects and not self._doubted:
            self._doubted = True
            logger.warning("%s: %s; listing again", self.kind.name, error)
            await asyncio.sleep(self.timing.retry * (0.5 + self.jitter()))
            return
        if self.objects:
            count = len(self.objects)
            logger.warning("%s: %d objects are not in force any more", self.kind.name, count)
        elif not self._absent:
            logger.info("%s: none: %s", self.kind.name, error)
        self._absent = True
        self._doubted = False
        self._forget(keep=set())
        self.consumer.synced(self.kind.name)
        await asyncio.sleep(self.timing.retry_most * (0.5 + self.jitter()))

    async def _list(self) -> None:
        self.lists += 1
        self._barren = 0
        found: set[Key] = set()
        query = {"limit": str(self.timing.page)} | self._selector()
        while True:
            page = await self._page(query)
            for raw in page.items or []:
                key = self._take(raw)
                if key is not None:
                    found.add(key)
            if not page.metadata.continue_:
                break
            query["continue"] = page.metadata.continue_
            await asyncio.sleep(0)  # others' turn: a page takes a while to digest
        self._forget(keep=found)
        self._absent = self._doubted = False
        self._version = page.metadata.resource_version
        if not self._version:
            raise ApiError(f"GET {self.kind.path}", 200, "the list has no resourceVersion")
        self.consumer.synced(self.kind.name)

    def _forget(self, keep: set[Key]) -> None:
        for key in [key for key in self.objects if key not in keep]:
            self._report(key, None)
        self._bad = {key: problems for key, problems in self._bad.items() if key in keep}

    def _selector(self) -> dict[str, str]:
        return {"fieldSelector": self.kind.fields} if self.kind.fields else {}

    async def _page(self, query: Mapping[str, str]) -> wire.Page:
        body = await self.api.get(self.kind.path, query)
        try:
            return msgspec.json.decode(body, type=wire.Page)
        except msgspec.DecodeError as error:
            raise ApiError(f"GET {self.kind.path}", 200, f"not a list: {error}") from error

    async def _watch(self) -> bool:
        """Until the stream ends. Whether anything came."""
        seconds = self.timing.watch * (1 + self.jitter()) / 1.5
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, round(seconds))),
        } | self._selector()
        heard = False
        rest = b""
        async with self.api.request(
            "GET", self.kind.path, query=query, read_seconds=self.timing.silence
        ) as response:
            self._barren += 1
            async for chunk in response.content.iter_any():
                *lines, rest = (rest + chunk).split(b"\n") if rest else chunk.split(b"\n")
                for line in lines:
                    if line:
                        self._event(line)
                        heard = True
                        self._barren = 0
        return heard

    def _event(self, line: bytes) -> None:
        try:
            event = msgspec.json.decode(line, type=wire.WatchEvent)
        except msgspec.DecodeError as error:
            raise Lost(f"an event that cannot be read: {error}") from error
        match event.type:
            case "ADDED" | "MODIFIED":
                self._take(event.object)
                self._advance(event.object)
            case "DELETED":
                meta = self._meta(event.object)
                self._bad.pop(key_of(meta), None)
                self._report(key_of(meta), None)
                self._advance(event.object)
            case "BOOKMARK":
                self._advance(event.object)
            case "ERROR":
                raise Lost(_reason(event.object))
            case other:
                raise Lost(f"unknown event type {other!r}")

    def _advance(self, raw: msgspec.Raw) -> None:
        self._version = self._meta(raw).resource_version or self._version

    def _meta(self, raw: msgspec.Raw) -> wire.Identity:
        try:
            return msgspec.json.decode(raw, type=wire.Identified).metadata
        except msgspec.DecodeError as error:
            raise Lost(f"an object without readable metadata: {error}") from error

    def _take(self, raw: msgspec.Raw) -> Key | None:
        """Parse and report one object. None: not even its name could be read."""
        try:
            key = key_of(msgspec.json.decode(raw, type=wire.Identified).metadata)
        except msgspec.DecodeError as error:
            logger.warning("%s: an object without a readable name: %s", self.kind.name, error)
            return None
        try:
            parsed = self.kind.read(raw)
        except msgspec.DecodeError as error:
            stand_in = self.kind.unreadable(key)
            parsed = Parsed(stand_in, (Problem("", f"cannot be read: {error}"),))
        if parsed.problems != self._bad.get(key, ()):  # each is told once, not at every relist
            self._bad[key] = parsed.problems
            self.consumer.problems(self.kind.name, key, parsed.problems)
        if not parsed.problems:
            self._bad.pop(key, None)
        self._report(key, parsed.value)
        return key

    def _report(self, key: Key, new: T | None) -> None:
        old = self.objects.get(key)
        if old == new:
            return
        if new is None:
            del self.objects[key]
        else:
            self.objects[key] = new
        self.consumer.changed(self.kind.name, key, old, new)


def _reason(raw: msgspec.Raw) -> str:
    """What an ERROR event says, whatever its form."""
    try:
        status = msgspec.json.decode(raw, type=wire.Status)
    except msgspec.DecodeError:
        return f"an error of no known form: {bytes(raw)[:200]!r}"
    return f"{status.reason or status.code}: {status.message}"
