# SPDX-License-Identifier: Apache-2.0
"""What the operator writes to objects: Events that name problems, and nodes' readiness.

Callers only say what ought to be so; one task does it, again until it is done. What is said
twice is done once: an Event's name is made of the object's uid, generation and the problem, so
neither a restart nor the other replica posts it again.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from weir.operator.api import Api, ApiError
from weir.operator.objects import Problem
from weir.operator.wire import Struct

logger = logging.getLogger(__name__)

TAINT = "node.weir.dev/agent-not-ready"
RETRY_SECONDS = 1.0
RETRY_MOST_SECONDS = 30.0
ATTEMPTS = 20


@dataclass(frozen=True, slots=True)
class Reference:
    """The object that an Event is about."""

    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str
    resource_version: str
    generation: int


@dataclass(frozen=True, slots=True)
class PostEvent:
    about: Reference
    problem: Problem


@dataclass(frozen=True, slots=True)
class MarkReady:
    """The node's agent is ready: pods may come."""

    node: str


Write = PostEvent | MarkReady


class _Taint(Struct, omit_defaults=True):
    key: str = ""
    value: str | None = None
    effect: str = ""
    time_added: str | None = None


class _NodeSpec(Struct):
    taints: list[_Taint] | None = None


class _Condition(Struct):
    type: str = ""
    status: str = ""


class _NodeStatus(Struct):
    conditions: list[_Condition] | None = None


class _NodeMeta(Struct):
    resource_version: str = ""


class _Node(Struct):
    metadata: _NodeMeta
    spec: _NodeSpec = msgspec.field(default_factory=_NodeSpec)
    status: _NodeStatus = msgspec.field(default_factory=_NodeStatus)


@dataclass(slots=True)
class Writer:
    """Runs until cancelled."""

    api: Api
    identity: str
    _wanted: dict[Write, int] = field(default_factory=dict)  # attempts so far
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def report(self, about: Reference, problems: Iterable[Problem]) -> None:
        for problem in problems:
            self._want(PostEvent(about, problem))

    def mark_ready(self, node: str) -> None:
        self._want(MarkReady(node))

    def _want(self, write: Write) -> None:
        self._wanted.setdefault(write, 0)
        self._news.set()

    async def run(self) -> None:
        delay = RETRY_SECONDS
        while True:
            await self._news.wait()
            self._news.clear()
            for write in list(self._wanted):
                await self._try(write)
            if self._wanted:
                self._news.set()
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MOST_SECONDS)
            else:
                delay = RETRY_SECONDS

    async def _try(self, write: Write) -> None:
        try:
            if isinstance(write, PostEvent):
                await self._post_event(write)
            else:
                await self._mark_ready(write.node)
        except ApiError as error:
            self._wanted[write] += 1
            for_good = 400 <= error.status < 500 and error.status not in (401, 409, 429)
            if for_good or self._wanted[write] >= ATTEMPTS:
                logger.warning("given up: %s", error)
                del self._wanted[write]
            else:
                logger.info("to be tried again: %s", error)
        else:
            del self._wanted[write]

    async def _post_event(self, write: PostEvent) -> None:
        about, problem = write.about, write.problem
        text = f"{problem.field}: {problem.message}" if problem.field else problem.message
        identity = f"{about.uid} {about.generation} {text}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{about.name[:200]}.{digest}", "namespace": about.namespace},
            "involvedObject": {
                "apiVersion": about.api_version,
                "kind": about.kind,
                "namespace": about.namespace,
                "name": about.name,
                "uid": about.uid,
                "resourceVersion": about.resource_version,
            },
            "type": "Warning",
            "reason": "Invalid",
            "action": "Compile",
            "message": text[:1024],
            "eventTime": now.replace("+00:00", "Z"),
            "reportingComponent": "weir-operator",
            "reportingInstance": self.identity[:128],
        }
        try:
            await self.api.post(f"/api/v1/namespaces/{about.namespace}/events", body)
        except ApiError as error:
            if error.status != 409:
                raise
            return  # posted before
        logger.info("Event on %s %s/%s: %s", about.kind, about.namespace, about.name, text)

    async def _mark_ready(self, name: str) -> None:
        path = f"/api/v1/nodes/{name}"
        try:
            node = msgspec.json.decode(await self.api.get(path), type=_Node)
        except msgspec.DecodeError as error:
            raise ApiError(f"GET {path}", 400, f"cannot be read: {error}") from error
        conditions = node.status.conditions or []
        if any(c.type == "NetworkUnavailable" and c.status != "False" for c in conditions):
            await self._network_available(path)
        taints = node.spec.taints or []
        kept = [taint for taint in taints if taint.key != TAINT]
        if len(kept) == len(taints):
            return
        patch = {
            # So that a taint put on meanwhile is not lost: 409, and again from the start.
            "metadata": {"resourceVersion": node.metadata.resource_version},
            "spec": {"taints": kept or None},
        }
        await self.api.patch(path, patch, "application/merge-patch+json")
        logger.info("%s: took taint %s off", name, TAINT)

    async def _network_available(self, path: str) -> None:
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        condition = {
            "type": "NetworkUnavailable",
            "status": "False",
            "reason": "WeirReady",
            "message": "Weir's agent on this node is ready",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        body = {"status": {"conditions": [condition]}}
        await self.api.patch(f"{path}/status", body, "application/strategic-merge-patch+json")
