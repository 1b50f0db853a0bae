# SPDX-License-Identifier: Apache-2.0
"""The stream from an operator: finds one, stays with it, goes to another when it is gone.

What arrives goes to a `Sink`, one call for each whole change, in order. The operator being away
changes nothing: what is there stays. Acknowledgements say what the maps hold.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import grpc
import grpc.aio

from weir.agent.errors import NoServer
from weir.agent.rule_sets import PolicyName
from weir.agent.servers import SERVICE, Known
from weir.agent.store import Position
from weir.api.v1 import weir_pb2 as pb
from weir.api.v1.weir_pb2_grpc import DistributionStub
from weir.cni.endpoint import LocalEndpoint

logger = logging.getLogger(__name__)

MESSAGE_LIMIT = 64 << 20
OPTIONS = [
    ("grpc.ssl_target_name_override", SERVICE),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT),
    ("grpc.enable_retries", 0),
]
FIRST_DELAY = 0.2
# Of a thousand agents, 300 attempts a second: little beside what an operator does for one of them.
LONGEST_DELAY = 3.0
HEALTHY_SECONDS = 10.0


_Call = grpc.aio.StreamStreamCall[pb.AgentMessage, pb.Update]


class Sink(Protocol):
    """Who takes what the operator says."""

    @property
    def position(self) -> Position: ...

    async def change(
        self, resources: list[bytes], removed: list[str], position: Position
    ) -> None: ...

    async def snapshot(self, resources: list[bytes], position: Position) -> None: ...

    def endpoints(self) -> Iterable[LocalEndpoint]: ...


@dataclass(slots=True)
class StreamState:
    """For status and metrics."""

    connected: bool = False
    operator: str = ""
    error: str = "not connected yet"
    received: int = 0
    snapshots: int = 0
    connects: int = 0
    acknowledged: int = 0


@dataclass(slots=True)
class Assembler:
    """Puts Updates together to whole changes."""

    resources: list[bytes] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    in_snapshot: bool = False

    def add(self, update: pb.Update) -> bool:
        """True when the change is whole."""
        if update.snapshot_begins:
            self.resources, self.removed, self.in_snapshot = [], [], True
        self.resources += update.resources
        self.removed += update.removed
        return update.snapshot_ends or not (update.more or self.in_snapshot)

    def take(self) -> tuple[list[bytes], list[str], bool]:
        whole = (self.resources, self.removed, self.in_snapshot)
        self.resources, self.removed, self.in_snapshot = [], [], False
        return whole


class OperatorStream:
    """`run` never ends. `announce` and `acknowledge` may be called any time."""

    def __init__(
        self,
        node: str,
        version: str,
        find: Callable[[], Awaitable[Known]],
        token: Path,
        sink: Sink,
    ) -> None:
        self.state = StreamState()
        self._node = node
        self._version = version
        self._find = find
        self._token = token
        self._sink = sink
        self._outgoing: asyncio.Queue[pb.AgentMessage] | None = None
        self._turn = random.randrange(1 << 16)  # noqa: S311  spreads agents, no secret
        self._revision = 0
        self._ready = False
        self._troubles: dict[PolicyName, str] = {}

    # ---- what the agent says

    def announce(self, endpoint: LocalEndpoint) -> None:
        if endpoint.pod.uid:
            self._say(pb.AgentMessage(announcement=pb.Announcement(added=[_announced(endpoint)])))

    def withdraw(self, uid: str) -> None:
        if uid:
            self._say(pb.AgentMessage(announcement=pb.Announcement(removed_uids=[uid])))

    def acknowledge(self, revision: int, ready: bool) -> None:
        """All resources up to `revision` are in the maps."""
        if (revision, ready) == (self._revision, self._ready):
            return
        self._revision, self._ready = revision, ready
        self._acknowledge()

    def tell_troubles(self, troubles: Mapping[PolicyName, str]) -> None:
        """Policies that this node enforces with less than they allow: all of them."""
        if troubles == self._troubles:
            return
        self._troubles = dict(troubles)
        self._tell_troubles()

    def _tell_troubles(self) -> None:
        policies = [
            pb.PolicyTrouble(namespace=namespace, name=name, message=message)
            for (namespace, name), message in self._troubles.items()
        ]
        self._say(pb.AgentMessage(trouble=pb.Trouble(policies=policies)))

    def _acknowledge(self) -> None:
        self.state.acknowledged = self._revision
        ack = pb.Acknowledgement(revision=self._revision, ready=self._ready)
        self._say(pb.AgentMessage(acknowledgement=ack))

    def _say(self, message: pb.AgentMessage) -> None:
        # Without a stream nothing is kept: the first messages of the next one say it all.
        if self._outgoing is not None:
            self._outgoing.put_nowait(message)

    # ---- the connection

    async def run(self) -> None:
        delay = FIRST_DELAY
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await self._connect()
                self.state.error = "the operator closed the stream"
            except grpc.aio.AioRpcError as error:
                self.state.error = f"{self.state.operator}: {error.code().name}: {error.details()}"
            except (NoServer, OSError, ssl.SSLError, ValueError) as error:
                self.state.error = str(error)
            finally:
                self.state.connected = False
                self._outgoing = None
            if loop.time() - began > HEALTHY_SECONDS:
                delay = FIRST_DELAY
            pause = delay * random.uniform(0.5, 1.5)  # noqa: S311  jitter, not a secret
            logger.warning("operator stream: %s; again in %.1f s", self.state.error, pause)
            await asyncio.sleep(pause)
            delay = min(delay * 2, LONGEST_DELAY)

    async def _connect(self) -> None:
        known = await self._find()
        token = (await asyncio.to_thread(self._token.read_text)).strip()
        # Each attempt takes the next operator, so that a broken one is not tried forever.
        self._turn += 1
        target = known.operators[self._turn % len(known.operators)]
        self.state.operator = target
        credentials = grpc.ssl_channel_credentials(root_certificates=known.ca.encode())
        async with grpc.aio.secure_channel(target, credentials, options=OPTIONS) as channel:
            outgoing: asyncio.Queue[pb.AgentMessage] = asyncio.Queue()
            position = self._sink.position
            outgoing.put_nowait(
                pb.AgentMessage(
                    hello=pb.Hello(
                        node=self._node,
                        version=self._version,
                        instance=position.instance,
                        revision=position.revision,
                    )
                )
            )
            added = [_announced(e) for e in self._sink.endpoints() if e.pod.uid]
            first = pb.Announcement(complete=True, added=added)
            outgoing.put_nowait(pb.AgentMessage(announcement=first))
            self._outgoing = outgoing
            self.state.connects += 1
            if self._revision:
                self._acknowledge()
            if self._troubles:
                self._tell_troubles()
            call: _Call = DistributionStub(channel).Sync(
                None,  # it is written to
                metadata=(("authorization", f"Bearer {token}"),),
            )
            # A task of ours and not an iterator of gRPC's: that one would be left behind, waiting
            # for the queue, when the stream ends.
            saying = asyncio.create_task(_say_all(call, outgoing), name="to the operator")
            try:
                await self._listen(call, target)
            finally:
                saying.cancel()
                await asyncio.wait([saying])

    async def _listen(self, call: _Call, target: str) -> None:
        assembler = Assembler()
        async for update in call:
            if not self.state.connected:
                self.state.connected = True
                self.state.error = ""
                logger.info("operator stream: connected to %s", target)
            self.state.received += 1
            if assembler.add(update):
                await self._deliver(assembler, update)

    async def _deliver(self, assembler: Assembler, update: pb.Update) -> None:
        resources, removed, snapshot = assembler.take()
        if snapshot:
            self.state.snapshots += 1
            position = Position(update.instance, update.revision, complete=True)
            await self._sink.snapshot(resources, position)
        else:
            complete = self._sink.position.complete
            position = Position(update.instance, update.revision, complete)
            await self._sink.change(resources, removed, position)


async def _say_all(call: _Call, queue: asyncio.Queue[pb.AgentMessage]) -> None:
    """Until the stream ends; why it ended is for who listens to tell."""
    try:
        while True:
            await call.write(await queue.get())
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
        logger.debug("operator stream: %s", error)


def _announced(endpoint: LocalEndpoint) -> pb.AnnouncedEndpoint:
    pod = endpoint.pod
    return pb.AnnouncedEndpoint(
        namespace=pod.namespace, name=pod.name, uid=pod.uid, addresses=list(endpoint.addresses)
    )
