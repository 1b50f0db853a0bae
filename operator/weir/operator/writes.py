# SPDX-License-Identifier: Apache-2.0
"""What the operator writes to objects: Events that name problems, and nodes' readiness.

Callers only say what ought to be so; it is tried until it is done. Nodes do not wait behind
Events: ten thousand bad objects are posted at a bounded rate, the latest state of each, the
first few problems of each. What is said twice is done once: an Event's name is made of the
object's uid, generation and the problem, so neither a restart nor the other replica posts it
again.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from weir.operator.api import Api, ApiError
from weir.operator.objects import Problem
from weir.operator.wire import Struct

logger = logging.getLogger(__name__)

TAINT = "node.weir.dev/agent-not-ready"
RETRY_SECONDS = 1.0
RETRY_MOST_SECONDS = 30.0
EVENT_SECONDS = 0.05  # between two Events: they are for people, the API server is for all
EVENTS_AN_OBJECT = 5


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


# An object, whatever its generation, and the identity of what is told of it, if that has one.
_Object = tuple[str, str, str, str]


@dataclass(slots=True)
class Writer:
    """Runs until cancelled."""

    api: Api
    identity: str
    event_seconds: float = EVENT_SECONDS
    retry_seconds: float = RETRY_SECONDS
    _nodes: dict[str, None] = field(default_factory=dict)
    _events: dict[_Object, tuple[Reference, tuple[Problem, ...]]] = field(default_factory=dict)
    _node_news: asyncio.Event = field(default_factory=asyncio.Event)
    _event_news: asyncio.Event = field(default_factory=asyncio.Event)

    def report(self, about: Reference, problems: Sequence[Problem]) -> None:
        """Of an object that waits already, only the latest state counts."""
        told = tuple(problems[:EVENTS_AN_OBJECT])
        if len(problems) > len(told):
            told += (Problem("", f"and {len(problems) - len(told)} more problems"),)
        if told:
            which = (about.kind, about.namespace, about.name, told[0].identity)
            self._events[which] = (about, told)
            self._event_news.set()

    def mark_ready(self, node: str) -> None:
        """The node's agent is ready: pods may come."""
        self._nodes[node] = None
        self._node_news.set()

    @property
    def waiting(self) -> int:
        return len(self._nodes) + len(self._events)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_nodes(), name="writes to nodes")
            group.create_task(self._run_events(), name="Events")

    async def _run_nodes(self) -> None:
        delay = self.retry_seconds
        while True:
            await self._node_news.wait()
            self._node_news.clear()
            # Out before the attempt: who asks again meanwhile has seen something newer.
            nodes, self._nodes = self._nodes, {}
            failed = [node for node in nodes if not await self._try_node(node)]
            if failed:
                self._nodes |= dict.fromkeys(failed)
                self._node_news.set()
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MOST_SECONDS)
            else:
                delay = self.retry_seconds

    async def _try_node(self, node: str) -> bool:
        """Whether that is done with."""
        try:
            await self._mark_ready(node)
        except ApiError as error:
            if not _for_good(error):
                logger.info("to be tried again: %s", error)
                return False
            logger.warning("given up: %s", error)
        return True

    async def _run_events(self) -> None:
        delay = self.retry_seconds
        while True:
            while not self._events:
                self._event_news.clear()
                await self._event_news.wait()
            which = next(iter(self._events))
            about, problems = self._events.pop(which)
            for problem in problems:
                try:
                    await self._post_event(about, problem)
                    delay = self.retry_seconds
                except ApiError as error:
                    if _for_good(error):
                        logger.warning("given up: %s", error)
                        continue
                    logger.info("to be tried again: %s", error)
                    self._events.setdefault(which, (about, problems))
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, RETRY_MOST_SECONDS)
                    break
                await asyncio.sleep(self.event_seconds)

    async def _post_event(self, about: Reference, problem: Problem) -> None:
        text = f"{problem.field}: {problem.message}" if problem.field else problem.message
        identity = f"{about.uid} {about.generation} {problem.identity or text}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        # Events on what has no namespace live in this one, by custom.
        namespace = about.namespace or "default"
        involved = {
            "apiVersion": about.api_version,
            "kind": about.kind,
            "name": about.name,
            "uid": about.uid,
            "resourceVersion": about.resource_version,
        }
        if about.namespace:
            involved["namespace"] = about.namespace
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{about.name[:200]}.{digest}", "namespace": namespace},
            "involvedObject": involved,
            "type": "Warning",
            "reason": problem.reason,
            "action": "Compile",
            "message": text[:1024],
            "eventTime": now.replace("+00:00", "Z"),
            "reportingComponent": "weir-operator",
            "reportingInstance": self.identity[:128],
        }
        try:
            await self.api.post(f"/api/v1/namespaces/{namespace}/events", body)
        except ApiError as error:
            if error.status != 409:
                raise
            return  # posted before
        logger.info("Event on %s %s/%s: %s", about.kind, about.namespace, about.name, text)

    async def _mark_ready(self, name: str) -> None:
        path = f"/api/v1/nodes/{name}"
        node = await self._node(path)
        conditions = node.status.conditions or []
        if any(c.type == "NetworkUnavailable" and c.status != "False" for c in conditions):
            await self._network_available(path)
            node = await self._node(path)  # of another version now
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

    async def _node(self, path: str) -> _Node:
        try:
            return msgspec.json.decode(await self.api.get(path), type=_Node)
        except msgspec.DecodeError as error:
            raise ApiError(f"GET {path}", 400, f"cannot be read: {error}") from error

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


def _for_good(error: ApiError) -> bool:
    """Trying again would not help: refused, or what it is about is gone."""
    return 400 <= error.status < 500 and error.status not in (401, 409, 429)
