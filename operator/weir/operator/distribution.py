# SPDX-License-Identifier: Apache-2.0
"""The gRPC side: a Sync stream per agent over `Revisions`, announcements and acks back.

A stream is two tasks: one reads what the agent says, one writes whenever the revision is beyond
its cursor. The writer awaits gRPC's flow control, so a slow agent waits alone and then gets the
latest of each resource. Updates go out as bytes: they were encoded once for all.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import grpc
import grpc.aio

from weir.api.address import Addr
from weir.api.v1 import weir_pb2 as pb
from weir.operator.auth import AuthError, Identity, Unavailable
from weir.operator.relay import Relay, Said
from weir.operator.revisions import Revisions

logger = logging.getLogger(__name__)

MAX_ADDRESSES = 16
HELLO_SECONDS = 20.0  # for an agent that was let in to say who it is
REVIEW_SECONDS = 600.0  # between reviews of the token of a stream that stays
OPTIONS: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]

Context = grpc.aio.ServicerContext[pb.AgentMessage, bytes]


class Announcements(Protocol):
    """Where announcements go: the compiler, with whatever follows a change of it."""

    def announce(self, node: str, uid: str, addresses: tuple[Addr, ...] | None) -> None: ...

    def announced_by(self, node: str) -> list[str]: ...


class Troubles(Protocol):
    """Where goes what agents have no room for."""

    def heard(self, node: str, said: Iterable[pb.PolicyTrouble]) -> None: ...


@dataclass(slots=True, eq=False)
class Stream:
    """One agent's stream, as far as others may know of it."""

    node: str
    version: str
    said: Said
    sent: int = 0
    acknowledged: int = 0
    ready: bool = False
    snapshots: int = 0


@dataclass(slots=True)
class Distribution:
    """The servicer. `synced` is set once every reflector has listed all there is."""

    revisions: Revisions
    authenticate: Callable[[str], Awaitable[Identity]]
    announcements: Announcements
    on_ready: Callable[[str], None]
    relay: Relay | None = None
    troubles: Troubles | None = None
    synced: asyncio.Event = field(default_factory=asyncio.Event)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    streams: dict[str, Stream] = field(default_factory=dict)  # the latest of each node
    review_seconds: float = REVIEW_SECONDS
    hello_seconds: float = HELLO_SECONDS

    def handler(self) -> grpc.GenericRpcHandler[pb.AgentMessage, bytes]:
        method = grpc.stream_stream_rpc_method_handler(
            self.sync,
            request_deserializer=pb.AgentMessage.FromString,
            response_serializer=None,
        )
        return grpc.method_handlers_generic_handler("weir.v1.Distribution", {"Sync": method})

    async def sync(self, _requests: object, context: Context) -> None:
        token = await self._token(context)
        identity = await self._identity(token, context)
        try:
            message = await asyncio.wait_for(_next(context), self.hello_seconds)
        except TimeoutError:
            message = None
        if message is None or not message.HasField("hello"):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message is not Hello")
        hello = message.hello
        if hello.node != identity.node:
            logger.warning("%s: refused, its token is for node %s", hello.node, identity.node)
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"the token is for node {identity.node}"
            )
        try:
            if hello.relayed:
                await self._serve_relay(hello.node, token, context)
            else:
                await self._serve_agent(hello, token, context)
        except AuthError as error:
            logger.warning("%s: its token is no good any more: %s", hello.node, error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))

    async def _serve_agent(self, hello: pb.Hello, token: str, context: Context) -> None:
        stream = Stream(hello.node, hello.version, Said(hello.node, token))
        self.streams[stream.node] = stream
        logger.info("%s: stream begins, has %s/%d", stream.node, hello.instance, hello.revision)
        parts = [self._read(stream, context), self._write(stream, hello, context)]
        if self.relay is not None:
            parts.append(self.relay.run(stream.said))
        try:
            await self._serve(hello.node, token, parts)
        finally:
            if self.streams.get(stream.node) is stream:
                del self.streams[stream.node]
                self._has_no_room(stream, ())
            logger.info("%s: stream ends at revision %d", stream.node, stream.sent)

    async def _token(self, context: Context) -> str:
        metadata = dict(context.invocation_metadata() or ())
        header = metadata.get("authorization", "")
        text = header.decode("latin-1") if isinstance(header, bytes) else header
        kind, _, token = text.partition(" ")
        if kind != "Bearer" or not token:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no bearer token")
        return token

    async def _identity(self, token: str, context: Context) -> Identity:
        try:
            return await self.authenticate(token)
        except Unavailable as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        except AuthError as error:
            logger.warning("%s: refused: %s", context.peer(), error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))

    async def _serve_relay(self, node: str, token: str, context: Context) -> None:
        """Another replica passes on what its agent says."""
        await context.write(pb.Update(instance=self.revisions.instance).SerializeToString())
        await self._serve(node, token, [self._read_relay(node, context)])

    async def _read_relay(self, node: str, context: Context) -> None:
        first = True
        while (message := await _next(context)) is not None:
            if node in self.streams:
                # What it says itself counts; the other replica has not noticed that it left.
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"{node} is connected here")
            if message.WhichOneof("message") == "announcement":
                self._announced(node, message.announcement, first)
                first = False

    async def _serve(
        self, node: str, token: str, parts: Sequence[Coroutine[None, None, None]]
    ) -> None:
        """Until the other side hangs up, either fails, the token ends, or the operator stops."""
        parts = [*parts, self._review(node, token), _wait(self.closing)]
        tasks = [asyncio.create_task(part, name=f"stream of {node}") for part in parts]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _review(self, node: str, token: str) -> None:
        """Raises AuthError once the token is expired or revoked (its pod or node is gone); the
        agent, if it is still one, then comes back with its new token and goes on where it was.
        While the API server does not answer, nothing changes."""
        while True:
            await asyncio.sleep(self.review_seconds)
            try:
                identity = await self.authenticate(token)
            except Unavailable as error:
                logger.info("%s: its token stays: %s", node, error)
                continue
            if identity.node != node:
                raise AuthError(f"the token is for node {identity.node}")

    async def _write(self, stream: Stream, hello: pb.Hello, context: Context) -> None:
        await self.synced.wait()
        revisions = self.revisions
        instance, cursor = hello.instance, hello.revision
        while True:
            # Both calls below read the logs at one instant: nothing awaits between them.
            resumes = revisions.can_resume(instance, cursor, stream.node)
            updates = (
                revisions.delta(cursor, stream.node) if resumes else revisions.snapshot(stream.node)
            )
            stream.snapshots += not resumes
            instance, cursor = revisions.instance, revisions.revision
            for update in updates:
                await context.write(update)
            stream.sent = cursor
            await revisions.beyond(cursor)

    async def _read(self, stream: Stream, context: Context) -> None:
        first = True
        while (message := await _next(context)) is not None:
            match message.WhichOneof("message"):
                case "announcement":
                    self._announced(stream.node, message.announcement, first)
                    stream.said.take(message.announcement)
                    first = False
                case "acknowledgement":
                    stream.acknowledged = message.acknowledgement.revision
                    became_ready = message.acknowledgement.ready and not stream.ready
                    stream.ready = message.acknowledgement.ready
                    if became_ready:
                        self.on_ready(stream.node)
                case "trouble":
                    if self.streams.get(stream.node) is stream:
                        self._has_no_room(stream, message.trouble.policies)
                case _:
                    logger.warning("%s: an unexpected message", stream.node)

    def _has_no_room(self, stream: Stream, policies: Iterable[pb.PolicyTrouble]) -> None:
        if self.troubles is not None:
            self.troubles.heard(stream.node, policies)

    def _announced(self, node: str, announcement: pb.Announcement, first: bool) -> None:
        if announcement.complete:
            named = {endpoint.uid for endpoint in announcement.added}
            for uid in self.announcements.announced_by(node):
                if uid not in named:
                    self.announcements.announce(node, uid, None)
        elif first:
            logger.warning("%s: its first announcement is not complete", node)
        for endpoint in announcement.added:
            addresses = tuple(dict.fromkeys(Addr(addr) for addr in endpoint.addresses))
            if len(addresses) > MAX_ADDRESSES or any(len(addr) != 16 for addr in addresses):
                logger.warning(
                    "%s: announces bad addresses for pod %s/%s: refused",
                    node,
                    endpoint.namespace,
                    endpoint.name,
                )
                continue
            self.announcements.announce(node, endpoint.uid, addresses)
        for uid in announcement.removed_uids:
            self.announcements.announce(node, uid, None)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _next(context: Context) -> pb.AgentMessage | None:
    """None: the agent has hung up."""
    message: object = await context.read()
    return message if isinstance(message, pb.AgentMessage) else None
