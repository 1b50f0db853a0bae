# SPDX-License-Identifier: Apache-2.0
"""Passes agents' announcements on to the other replicas, so that all agents hear of a pod at once.

Without it the agents of another replica learn a new pod's address from the pod's status, about a
second later. To each other replica there is one connection, and on it a stream for each agent of
ours that carries the agent's own token: a replica believes no other more than it would believe
the agent itself. What goes over is the difference between what the agent has announced and what
was passed on, so nothing is queued and a broken stream begins anew with all of it.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from weir.api.address import is_ipv4, text
from weir.api.v1 import weir_pb2 as pb
from weir.api.v1.weir_pb2_grpc import DistributionStub
from weir.operator.objects import EndpointSlice, Key, Problem
from weir.operator.reflector import Consumer
from weir.operator.tls import SERVER_NAME

logger = logging.getLogger(__name__)

SERVICE = "weir-operator"
PORT_NAME = "grpc"
RETRY_SECONDS = 0.5
RETRY_MOST_SECONDS = 15.0
OPTIONS = [
    ("grpc.ssl_target_name_override", SERVER_NAME),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
]


class _Call(Protocol):
    async def read(self) -> object: ...

    async def write(self, request: pb.AgentMessage) -> None: ...

    def cancel(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Said:
    """The pods that an agent has announced on its present stream, and a sign of news."""

    node: str
    token: str
    endpoints: dict[str, pb.AnnouncedEndpoint] = field(default_factory=dict)  # by uid
    complete: bool = False  # its first announcement has come
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, announcement: pb.Announcement) -> None:
        if announcement.complete:
            self.endpoints.clear()
            self.complete = True
        for endpoint in announcement.added:
            self.endpoints[endpoint.uid] = endpoint
        for uid in announcement.removed_uids:
            self.endpoints.pop(uid, None)
        self.news.set()
        self.news = asyncio.Event()

    async def differ(self, sent: dict[str, pb.AnnouncedEndpoint] | None) -> pb.Announcement:
        """Wait until there is something to say to who knows this much (None: nothing yet)."""
        while not self.complete or sent == self.endpoints:
            await self.news.wait()
        known = sent or {}
        return pb.Announcement(
            complete=sent is None,
            added=[e for uid, e in self.endpoints.items() if known.get(uid) != e],
            removed_uids=[uid for uid in known if uid not in self.endpoints],
        )


class Itself(Exception):
    """The other replica is this one."""


@dataclass(slots=True)
class Relay:
    """`instance` is this replica's; `ca` gives the CA that all replicas' certificates are of.

    `peers` may be set at any time; a stream in `run` follows within a turn.
    """

    instance: str
    ca: Callable[[], bytes]
    retry_seconds: float = RETRY_SECONDS
    streams: int = 0
    _peers: frozenset[str] = frozenset()
    _own: set[str] = field(default_factory=set)
    _channels: dict[str, tuple[bytes, grpc.aio.Channel]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def set_peers(self, targets: frozenset[str]) -> None:
        """All replicas, this one among them: it is found out when it answers."""
        if targets == self._peers:
            return
        self._peers = targets
        self._own &= targets
        self._changed.set()
        self._changed = asyncio.Event()

    async def run(self, said: Said) -> None:
        """Until cancelled: pass on what an agent says, to all that there are."""
        tasks: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                changed = self._changed
                for gone in tasks.keys() - self._peers:
                    tasks.pop(gone).cancel()
                for target in self._peers - tasks.keys():
                    name = f"relay {said.node} to {target}"
                    tasks[target] = asyncio.create_task(self._to(target, said), name=name)
                await changed.wait()
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def close(self) -> None:
        for _, channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    async def _to(self, target: str, said: Said) -> None:
        delay = self.retry_seconds
        loop = asyncio.get_running_loop()
        while target not in self._own:
            began = loop.time()
            try:
                await self._stream(target, said)
            except Itself:
                self._own.add(target)
                return
            except grpc.aio.AioRpcError as error:
                logger.debug("%s: relay of %s: %s", target, said.node, error.details())
            except Exception:
                logger.exception("%s: relay of %s failed", target, said.node)
            if loop.time() - began > RETRY_MOST_SECONDS:
                delay = self.retry_seconds
            await asyncio.sleep(delay * (0.5 + random.random()))  # noqa: S311 - jitter
            delay = min(delay * 2, RETRY_MOST_SECONDS)

    async def _stream(self, target: str, said: Said) -> None:
        """Until the other side ends it. AioRpcError."""
        metadata = (("authorization", f"Bearer {said.token}"),)
        call: _Call = DistributionStub(await self._channel(target)).Sync(None, metadata=metadata)
        try:
            hello = pb.Hello(node=said.node, relayed=True)
            await call.write(pb.AgentMessage(hello=hello))
            answer = await call.read()
            if not isinstance(answer, pb.Update):
                return
            if answer.instance == self.instance:
                raise Itself
            self.streams += 1
            saying = asyncio.create_task(self._say(call, said), name=f"say of {said.node}")
            try:
                await call.read()  # nothing more comes but the end
            finally:
                self.streams -= 1
                saying.cancel()
                await asyncio.wait([saying])
        finally:
            call.cancel()

    async def _say(self, call: _Call, said: Said) -> None:
        sent: dict[str, pb.AnnouncedEndpoint] | None = None
        try:
            while True:
                announcement = await said.differ(sent)
                sent = dict(said.endpoints)
                await call.write(pb.AgentMessage(announcement=announcement))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            logger.debug("relay of %s: %s", said.node, error)  # who reads hears why it ended

    async def _channel(self, target: str) -> grpc.aio.Channel:
        ca = self.ca()
        known = self._channels.get(target)
        if known is not None and known[0] == ca:
            return known[1]
        credentials = grpc.ssl_channel_credentials(root_certificates=ca)
        channel = grpc.aio.secure_channel(target, credentials, options=OPTIONS)
        self._channels[target] = (ca, channel)
        useless = self._channels.keys() - self._peers - {target}
        closing = [self._channels.pop(gone) for gone in useless]
        if known is not None:
            closing.append(known)
        for _, old in closing:
            await old.close(None)
        return channel


@dataclass(slots=True)
class PeerWatch:
    """A consumer that passes everything on, and tells the relay of the operators' own slices."""

    consumer: Consumer
    namespace: str
    relay: Relay
    _targets: dict[Key, frozenset[str]] = field(default_factory=dict)

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        if kind == "EndpointSlice" and key.namespace == self.namespace:
            targets = operators(new) if isinstance(new, EndpointSlice) else frozenset()
            if targets or key in self._targets:
                self._targets[key] = targets
                self.relay.set_peers(frozenset().union(*self._targets.values()))
        self.consumer.changed(kind, key, old, new)

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        self.consumer.problems(kind, key, problems)

    def synced(self, kind: str) -> None:
        self.consumer.synced(kind)


def operators(slice_: EndpointSlice) -> frozenset[str]:
    """ "host:port" of each replica that a slice of the operators' Service names."""
    if slice_.service != SERVICE:
        return frozenset()
    ports = [port.port for port in slice_.ports if port.name == PORT_NAME]
    found = [e.address for e in slice_.endpoints if e.serving]
    hosts = [text(a) if is_ipv4(a) else f"[{text(a)}]" for a in found]
    return frozenset(f"{host}:{port}" for host in hosts for port in ports)
