# SPDX-License-Identifier: Apache-2.0
"""A fake API server for list and watch, with scripted faults. Objects are plain JSON.

What it does: pages, resourceVersions, bookmarks, watches from a version, 410 for versions that
it has forgotten, and storage by name for the few objects that the operator writes.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]


@dataclass
class Faults:
    """Scripted: taken one by one. A list fault is a status, or None for none."""

    lists: deque[int | None] = field(default_factory=deque)
    watches: deque[int] = field(default_factory=deque)
    writes: deque[int | None] = field(default_factory=deque)
    page_seconds: float = 0.0


@dataclass
class Collection:
    """One kind under one path."""

    objects: dict[str, Json] = field(default_factory=dict)
    events: list[tuple[int, Json]] = field(default_factory=list)
    oldest: int = 0  # watches from before this get 410


class FakeApi:
    def __init__(self) -> None:
        self.collections: dict[str, Collection] = {}
        self.faults = Faults()
        self.requests: list[web.Request] = []
        self.version = 100
        self.tokens: set[str] | None = None  # None: anybody
        self.stored: dict[str, Json] = {}  # what was written, by path of the object
        self.answers: dict[str, Json] = {}  # fixed answers to POST, by path
        self._streams: set[asyncio.Queue[bytes | None]] = set()
        self._paths: dict[asyncio.Queue[bytes | None], str] = {}

    def collection(self, path: str) -> Collection:
        return self.collections.setdefault(path, Collection())

    def put(self, path: str, content: Json) -> None:
        self.version += 1
        content["metadata"]["resourceVersion"] = str(self.version)
        objects = self.collection(path).objects
        name = self._name(content)
        self._event(path, "MODIFIED" if name in objects else "ADDED", content)
        objects[name] = content

    def delete(self, path: str, name: str) -> None:
        self.version += 1
        content = self.collection(path).objects.pop(name)
        content["metadata"]["resourceVersion"] = str(self.version)
        self._event(path, "DELETED", content)

    def forget(self) -> None:
        """Compaction: no watch can go on from here."""
        self.version += 1
        for collection in self.collections.values():
            collection.oldest = self.version
            collection.events.clear()

    def send(self, path: str, line: bytes) -> None:
        """Any bytes into the open watches of a path."""
        for queue in self._streams:
            if self._paths[queue] == path:
                queue.put_nowait(line)

    def bookmark(self, path: str) -> None:
        self.version += 1
        meta = {"metadata": {"resourceVersion": str(self.version)}}
        self.send(path, json.dumps({"type": "BOOKMARK", "object": meta}).encode() + b"\n")

    def drop_watches(self) -> None:
        for queue in self._streams:
            queue.put_nowait(None)

    def watching(self, path: str) -> int:
        return sum(at == path for at in self._paths.values())

    def _event(self, path: str, kind: str, content: Json) -> None:
        line = {"type": kind, "object": content}
        self.collection(path).events.append((self.version, line))
        self.send(path, json.dumps(line).encode() + b"\n")

    @staticmethod
    def _name(content: Json) -> str:
        meta = content["metadata"]
        return f"{meta.get('namespace', '')}/{meta['name']}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and token not in self.tokens:
            return self._status(401, "Unauthorized")
        if request.method == "GET" and "watch" in request.query:
            return await self._watch(request)
        if request.path in self.collections:
            return await self._list(request)
        return await self._store(request)

    async def _store(self, request: web.Request) -> web.Response:
        """GET, POST, PUT, PATCH of single objects, with the API server's rules on conflicts."""
        if request.method == "GET":
            if request.path not in self.stored:
                return self._status(404, "NotFound")
            return web.json_response(self.stored[request.path])
        body = await request.json()
        if self.faults.writes and (fault := self.faults.writes.popleft()):
            return self._status(fault, "scripted")
        if request.path in self.answers:
            return web.json_response(self.answers[request.path])
        path = request.path
        if request.method == "PATCH":
            return self._patch(path, body)
        if request.method == "POST":
            path += "/" + body["metadata"]["name"]
            if path in self.stored:
                return self._status(409, "AlreadyExists")
        elif self.stored[path]["metadata"]["resourceVersion"] != body["metadata"].get(
            "resourceVersion"
        ):
            return self._status(409, "Conflict")
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.stored[path] = body
        return web.json_response(body)

    def _patch(self, path: str, body: Json) -> web.Response:
        """A merge patch: of maps in maps, to `PATH/status` too."""
        at = path.removesuffix("/status")
        if at not in self.stored:
            return self._status(404, "NotFound")
        known = self.stored[at]
        version = body.get("metadata", {}).get("resourceVersion", "")
        if version and version != known["metadata"]["resourceVersion"]:
            return self._status(409, "Conflict")
        for field_name in ("spec", "status"):
            known.setdefault(field_name, {}).update(body.get(field_name, {}))
        self.version += 1
        known["metadata"]["resourceVersion"] = str(self.version)
        return web.json_response(known)

    async def _list(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.faults.page_seconds)
        fault = self.faults.lists.popleft() if self.faults.lists else None
        if fault:
            return self._status(fault, "scripted")
        items = list(self.collection(request.path).objects.values())
        start = int(request.query.get("continue", 0))
        limit = int(request.query.get("limit", len(items) + 1))
        meta = {"resourceVersion": str(self.version)}
        if start + limit < len(items):
            meta["continue"] = str(start + limit)
        return web.json_response({"metadata": meta, "items": items[start : start + limit]})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        if self.faults.watches:
            return self._status(self.faults.watches.popleft(), "scripted")
        collection = self.collection(request.path)
        since = int(request.query["resourceVersion"])
        if since < collection.oldest:
            return self._status(410, "Expired")
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        response = web.StreamResponse()
        for version, line in collection.events:
            if version > since:
                queue.put_nowait(json.dumps(line).encode() + b"\n")
        self._streams.add(queue)
        self._paths[queue] = request.path
        try:
            await response.prepare(request)
            while (line_out := await queue.get()) is not None:
                await response.write(line_out)
        finally:
            self._streams.discard(queue)
            del self._paths[queue]
        return response

    @staticmethod
    def _status(code: int, reason: str) -> web.Response:
        body = {"kind": "Status", "code": code, "reason": reason, "message": reason}
        return web.json_response(body, status=code)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """The address to reach it at."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            host, port = runner.addresses[0][:2]
            yield f"http://{host}:{port}"
        finally:
            self.drop_watches()
            await runner.cleanup()
