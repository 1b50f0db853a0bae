# SPDX-License-Identifier: Apache-2.0
"""Distribution over real gRPC and TLS: snapshots, deltas, resuming, and who is let in."""

from __future__ import annotations

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from blockbuster import blockbuster_ctx
from support.apiserver import FakeApi

from weir.api.address import Addr, parse
from weir.api.v1 import weir_pb2 as pb
from weir.api.v1 import weir_pb2_grpc as pb_grpc
from weir.operator import tls
from weir.operator.api import Api
from weir.operator.auth import AuthError, Identity, Unavailable
from weir.operator.distribution import OPTIONS, Distribution
from weir.operator.kubeconfig import Access
from weir.operator.resources import Change
from weir.operator.revisions import BATCH_RESOURCES, Log, Revisions


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx() as blockbuster:
        # gRPC joins its poller thread when its last object goes, whenever that is.
        for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
            if name in blockbuster.functions:
                blockbuster.functions[name].deactivate()
        yield


def change(name: str, value: str, node: str | None = None) -> Change:
    return Change(name, pb.Resource(name=name, selector=pb.Selector(key=value)), node)


def gone(name: str, node: str | None = None) -> Change:
    return Change(name, None, node)


@dataclass
class Announced:
    said: dict[str, tuple[str, tuple[Addr, ...]]] = field(default_factory=dict)

    def announce(self, node: str, uid: str, addresses: tuple[Addr, ...] | None) -> None:
        if addresses is None:
            self.said.pop(uid, None)
        else:
            self.said[uid] = (node, addresses)

    def announced_by(self, node: str) -> list[str]:
        return [uid for uid, (by, _) in self.said.items() if by == node]


@dataclass
class World:
    """A server and what it was told."""

    distribution: Distribution
    revisions: Revisions
    announced: Announced
    ready: list[str]
    channel: grpc.aio.Channel

    def connect(self, node: str = "n1", instance: str = "", revision: int = 0) -> Agent:
        return Agent(self.channel, node, instance, revision)


@dataclass
class Agent:
    """Holds what a real agent would: the sum of all complete updates."""

    channel: grpc.aio.Channel
    node: str
    instance: str = ""
    revision: int = 0
    held: dict[str, str] = field(default_factory=dict)
    snapshots: int = 0
    updates: int = 0
    _pending: list[pb.Update] = field(default_factory=list)

    async def open(self, token: str = "") -> Agent:
        stub = pb_grpc.DistributionStub(self.channel)
        metadata = (("authorization", f"Bearer {token or self.node}"),)
        self.call = stub.Sync(None, metadata=metadata)
        hello = pb.Hello(node=self.node, instance=self.instance, revision=self.revision)
        await self.call.write(pb.AgentMessage(hello=hello))
        return self

    async def change(self) -> None:
        """Take updates up to the next that completes one."""
        while True:
            update = await asyncio.wait_for(self.call.read(), 10)
            assert isinstance(update, pb.Update), update
            self.updates += 1
            self._pending.append(update)
            if not update.more:
                break
        if self._pending[0].snapshot_begins:
            assert self._pending[-1].snapshot_ends
            self.held.clear()
            self.snapshots += 1
        for update in self._pending:
            for data in update.resources:
                resource = pb.Resource.FromString(data)
                self.held[resource.name] = resource.selector.key
            for name in update.removed:
                self.held.pop(name, None)
        self.instance, self.revision = update.instance, update.revision
        self._pending.clear()

    async def until(self, held: dict[str, str]) -> None:
        while self.held != held:
            await self.change()


async def authenticate(token: str) -> Identity:
    if token == "api-down":
        raise Unavailable("no answer")
    if token == "bad":
        raise AuthError("not authenticated")
    return Identity(token)


@asynccontextmanager
async def world(tombstones: int = 100) -> AsyncIterator[World]:
    bundle = await asyncio.to_thread(tls.make, datetime.datetime.now(datetime.UTC))
    revisions = Revisions("one", tombstones)
    announced, ready = Announced(), list[str]()
    distribution = Distribution(revisions, authenticate, announced, ready.append)
    distribution.synced.set()
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([distribution.handler()])
    credentials = grpc.ssl_server_credentials([(bundle.key, bundle.cert)])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{port}",
        grpc.ssl_channel_credentials(bundle.ca_cert),
        options=[("grpc.ssl_target_name_override", tls.SERVER_NAME)],
    )
    async with channel:
        yield World(distribution, revisions, announced, ready, channel)
    distribution.closing.set()
    await server.stop(1)


async def test_snapshot_then_changes_of_all_and_of_ones_own_node() -> None:
    async with world() as w:
        w.revisions.publish([change("a", "1"), change("pod/x", "x", "n1"), change("p", "y", "n2")])
        agent = await w.connect().open()
        await agent.change()
        assert agent.held == {"a": "1", "pod/x": "x"}
        w.revisions.publish([change("a", "2"), change("b", "1"), gone("pod/x", "n1")])
        await agent.until({"a": "2", "b": "1"})
        w.revisions.publish([gone("a")])
        await agent.until({"b": "1"})
        assert agent.snapshots == 1


@dataclass
class Heard:
    said: asyncio.Queue[tuple[str, list[str]]] = field(default_factory=asyncio.Queue)

    def heard(self, node: str, said: Iterable[pb.PolicyTrouble]) -> None:
        self.said.put_nowait((node, [trouble.name for trouble in said]))


async def test_what_an_agent_has_no_room_for_is_passed_on_until_its_stream_ends() -> None:
    async with world() as w:
        troubles = w.distribution.troubles = Heard()
        w.revisions.publish([change("a", "1")])
        agent = await w.connect().open()
        await agent.change()
        said = pb.Trouble(policies=[pb.PolicyTrouble(namespace="ns", name="web")])
        await agent.call.write(pb.AgentMessage(trouble=said))
        assert await asyncio.wait_for(troubles.said.get(), 10) == ("n1", ["web"])
        agent.call.cancel()
        assert await asyncio.wait_for(troubles.said.get(), 10) == ("n1", [])


async def test_an_empty_cluster_is_a_snapshot_too() -> None:
    async with world() as w:
        w.revisions.publish([], always=True)
        agent = w.connect()
        agent.held = {"stale": "1"}
        await (await agent.open()).change()
        assert agent.held == {}
        assert agent.snapshots == 1


async def test_nothing_is_sent_before_all_is_synced() -> None:
    async with world() as w:
        w.distribution.synced.clear()
        w.revisions.publish([change("a", "1")])
        agent = await w.connect().open()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(asyncio.ensure_future(agent.call.read())), 0.2)


async def test_resume_gets_the_difference_alone() -> None:
    async with world() as w:
        w.revisions.publish([change("a", "1"), change("b", "1")])
        w.revisions.publish([gone("b"), change("c", "1")])
        agent = w.connect(instance="one", revision=1)
        agent.held = {"a": "1", "b": "1"}
        await (await agent.open()).change()
        assert agent.held == {"a": "1", "c": "1"}
        assert agent.snapshots == 0


@pytest.mark.parametrize(
    ("instance", "revision"),
    [
        pytest.param("another", 1, id="of another operator"),
        pytest.param("one", 1, id="from before a tombstone that was dropped"),
        pytest.param("one", 99, id="from the future"),
    ],
)
async def test_what_cannot_be_resumed_is_replaced(instance: str, revision: int) -> None:
    async with world(tombstones=1) as w:
        w.revisions.publish([change(name, "1") for name in "abcd"])
        w.revisions.publish([gone("a")])
        w.revisions.publish([gone("b")])
        w.revisions.publish([gone("c")])
        agent = w.connect(instance=instance, revision=revision)
        agent.held = {"a": "1", "b": "1", "stale": "1"}
        await (await agent.open()).change()
        assert agent.held == {"d": "1"}
        assert agent.snapshots == 1


async def test_a_slow_agent_gets_the_latest_and_delays_nobody() -> None:
    async with world() as w:
        w.revisions.publish([change("a", "0")])
        slow, quick = await w.connect("n1").open(), await w.connect("n2").open()
        await slow.change()
        await quick.change()
        filler = "x" * 1000
        for i in range(300):
            w.revisions.publish([change(f"r{n}", f"{i}{filler}") for n in range(100)])
            await quick.until({"a": "0"} | {f"r{n}": f"{i}{filler}" for n in range(100)})
        assert quick.updates >= 300
        await slow.until(quick.held)
        assert slow.updates < 250  # 300 revisions of 100 kB: most were never sent to it


async def test_a_large_change_is_one_change_in_many_messages() -> None:
    async with world() as w:
        w.revisions.publish([change(f"r{i}", "1") for i in range(3 * BATCH_RESOURCES)])
        agent = await w.connect().open()
        await agent.change()
        assert len(agent.held) == 3 * BATCH_RESOURCES
        assert agent.updates == 4  # one of the node's own, and three


async def test_what_did_not_change_is_no_news() -> None:
    revisions = Revisions("one")
    assert revisions.publish([change("a", "1")]) == 1
    assert revisions.publish([change("a", "1"), gone("b")]) == 0
    assert revisions.revision == 1


def test_log_forgets_a_tombstone_when_the_name_is_back() -> None:
    log = Log()
    log.put("a", b"1", 1)
    log.put("a", None, 2)
    log.put("a", b"1", 3)
    assert log.since(1) == ([b"1"], [])


@pytest.mark.parametrize(
    ("token", "code"),
    [
        pytest.param("bad", grpc.StatusCode.UNAUTHENTICATED, id="bad token"),
        pytest.param("n2", grpc.StatusCode.PERMISSION_DENIED, id="another node's token"),
        pytest.param("api-down", grpc.StatusCode.UNAVAILABLE, id="cannot be judged"),
    ],
)
async def test_who_is_not_let_in(token: str, code: grpc.StatusCode) -> None:
    async with world() as w:
        w.revisions.publish([change("a", "1")])
        agent = w.connect("n1")
        with pytest.raises((grpc.aio.AioRpcError, AssertionError)):
            await (await agent.open(token)).change()
        assert await agent.call.code() is code


async def test_announcements_and_readiness() -> None:
    async with world() as w:
        w.announced.said["old"] = ("n1", ())
        w.announced.said["other"] = ("n2", ())
        w.revisions.publish([change("a", "1")])
        agent = await w.connect().open()
        good = pb.AnnouncedEndpoint(uid="u1", addresses=[parse("10.0.0.1")])
        short = pb.AnnouncedEndpoint(uid="u2", addresses=[b"\x0a\0\0\1"])
        message = pb.Announcement(complete=True, added=[good, short])
        await agent.call.write(pb.AgentMessage(announcement=message))
        acknowledgement = pb.Acknowledgement(revision=1, ready=True)
        await agent.call.write(pb.AgentMessage(acknowledgement=acknowledgement))
        await agent.call.write(pb.AgentMessage(acknowledgement=acknowledgement))
        deadline = asyncio.get_running_loop().time() + 5
        while not w.ready:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        assert w.announced.said == {"u1": ("n1", (parse("10.0.0.1"),)), "other": ("n2", ())}
        assert w.ready == ["n1"]
        assert w.distribution.streams["n1"].acknowledged == 1


async def test_streams_end_when_the_operator_stops() -> None:
    async with world() as w:
        w.revisions.publish([change("a", "1")])
        agent = await w.connect().open()
        await agent.change()
        w.distribution.closing.set()
        assert await asyncio.wait_for(agent.call.code(), 5) is grpc.StatusCode.OK
        assert not w.distribution.streams


@pytest.mark.parametrize(
    ("later", "code"),
    [
        pytest.param(AuthError("expired"), grpc.StatusCode.UNAUTHENTICATED, id="expired, revoked"),
        pytest.param(Identity("n2"), grpc.StatusCode.UNAUTHENTICATED, id="of another node"),
        pytest.param(Unavailable("API down"), None, id="outage of the API"),
        pytest.param(Identity("n1"), None, id="still good"),
    ],
)
async def test_the_token_of_a_long_stream_is_reviewed(
    later: Identity | Exception, code: grpc.StatusCode | None
) -> None:
    reviews: list[str] = []

    async def review(token: str) -> Identity:
        reviews.append(token)
        if len(reviews) > 1 and isinstance(later, Exception):
            raise later
        return later if len(reviews) > 1 and isinstance(later, Identity) else Identity(token)

    async with world() as w:
        w.distribution.review_seconds = 0.02
        w.distribution.authenticate = review
        w.revisions.publish([change("a", "1")])
        agent = await w.connect().open()
        await agent.change()
        if code is not None:
            assert await asyncio.wait_for(agent.call.code(), 5) is code
            assert not w.distribution.streams
            return
        deadline = asyncio.get_running_loop().time() + 5
        while len(reviews) < 4:
            assert asyncio.get_running_loop().time() < deadline, reviews
            await asyncio.sleep(0.01)
        w.revisions.publish([change("a", "2")])
        await agent.until({"a": "2"})


async def test_who_says_nothing_is_not_waited_for() -> None:
    async with world() as w:
        w.distribution.hello_seconds = 0.05
        stub = pb_grpc.DistributionStub(w.channel)
        call = stub.Sync(None, metadata=(("authorization", "Bearer n1"),))
        assert await asyncio.wait_for(call.code(), 5) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_hundred_agents_at_once() -> None:
    async with world() as w:
        w.revisions.publish([change(f"r{i}", "1") for i in range(1000)])
        agents = await asyncio.gather(*(w.connect(f"n{i}").open() for i in range(100)))
        await asyncio.wait_for(asyncio.gather(*(agent.change() for agent in agents)), 20)
        assert len(w.distribution.streams) == 100
        assert {len(agent.held) for agent in agents} == {1000}
        w.revisions.publish([change("r0", "2")])
        await asyncio.wait_for(asyncio.gather(*(agent.change() for agent in agents)), 20)
        assert {agent.held["r0"] for agent in agents} == {"2"}


async def test_a_renewed_certificate_serves_without_a_restart() -> None:
    # Made a while ago, so that both certificates are valid today.
    fake, now = FakeApi(), [datetime.datetime.now(datetime.UTC) - tls.CERT_LIFE * 0.7]
    async with fake.serve() as at, Api(Access((at,))) as api:
        certificates = tls.Certificates(api, "ns", lambda: now[0])
        await certificates.start()
        first = certificates.bundle
        assert first is not None
        revisions = Revisions("one")
        revisions.publish([change("a", "1")])
        distribution = Distribution(revisions, authenticate, Announced(), lambda _: None)
        distribution.synced.set()
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers([distribution.handler()])
        port = server.add_secure_port("127.0.0.1:0", certificates.server_credentials())
        await server.start()
        try:
            context = ssl.create_default_context(cadata=first.ca_cert.decode())

            async def serial() -> str:
                _, writer = await asyncio.open_connection(
                    "127.0.0.1", port, ssl=context, server_hostname=tls.SERVER_NAME
                )
                found = dict(writer.get_extra_info("peercert"))["serialNumber"]
                writer.transport.abort()
                return str(found)

            before = await serial()
            now[0] += tls.CERT_LIFE * 0.7
            await certificates.refresh()
            assert certificates.bundle != first
            after = await serial()  # verified by the CA that the agent remembers
            assert before != after
        finally:
            distribution.closing.set()
            await server.stop(0)
