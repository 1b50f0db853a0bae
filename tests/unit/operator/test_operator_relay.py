# SPDX-License-Identifier: Apache-2.0
"""Announcements that reach all replicas, over real gRPC and TLS."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from blockbuster import blockbuster_ctx
from unit.operator.test_operator_distribution import Agent, Announced, authenticate

from weir.api.address import parse
from weir.api.v1 import weir_pb2 as pb
from weir.operator import tls
from weir.operator.distribution import OPTIONS, Distribution
from weir.operator.objects import Endpoint, EndpointSlice, Key, Port
from weir.operator.relay import PeerWatch, Relay, operators
from weir.operator.revisions import Revisions


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[None]:
    with blockbuster_ctx() as blockbuster:
        # gRPC joins its poller thread when its last object goes, whenever that is.
        for name in ("threading.Lock.acquire", "threading.Lock.acquire_lock"):
            if name in blockbuster.functions:
                blockbuster.functions[name].deactivate()
        yield


@dataclass
class Replica:
    distribution: Distribution
    announced: Announced
    relay: Relay
    channel: grpc.aio.Channel
    target: str

    def agent(self, node: str = "n1") -> Agent:
        return Agent(self.channel, node)

    def knows(self) -> dict[str, int]:
        """How many addresses of each pod."""
        return {uid: len(addresses) for uid, (_, addresses) in self.announced.said.items()}


@asynccontextmanager
async def replica(name: str, bundle: tls.Bundle, port: int = 0) -> AsyncIterator[Replica]:
    relay = Relay(name, lambda: bundle.ca_cert, retry_seconds=0.02)
    revisions, announced = Revisions(name), Announced()
    revisions.publish([], always=True)
    distribution = Distribution(revisions, authenticate, announced, lambda _: None, relay)
    distribution.synced.set()
    server = grpc.aio.server(options=OPTIONS)
    server.add_generic_rpc_handlers([distribution.handler()])
    credentials = grpc.ssl_server_credentials([(bundle.key, bundle.cert)])
    port = server.add_secure_port(f"127.0.0.1:{port}", credentials)
    await server.start()
    channel = grpc.aio.secure_channel(
        f"127.0.0.1:{port}",
        grpc.ssl_channel_credentials(bundle.ca_cert),
        options=[("grpc.ssl_target_name_override", tls.SERVER_NAME)],
    )
    try:
        async with channel:
            yield Replica(distribution, announced, relay, channel, f"127.0.0.1:{port}")
    finally:
        distribution.closing.set()
        await server.stop(1)
        await relay.close()


@dataclass
class Pair:
    bundle: tls.Bundle
    stack: AsyncExitStack
    replicas: list[Replica] = field(default_factory=list)

    async def start(self, name: str) -> Replica:
        made = await self.stack.enter_async_context(replica(name, self.bundle))
        self.replicas.append(made)
        targets = frozenset(r.target for r in self.replicas)
        for each in self.replicas:
            each.relay.set_peers(targets)
        return made


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    bundle = await asyncio.to_thread(tls.make, datetime.datetime.now(datetime.UTC))
    async with AsyncExitStack() as stack:
        yield Pair(bundle, stack)


async def until(wanted: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 10
    while not wanted():
        assert asyncio.get_running_loop().time() < deadline, what()
        await asyncio.sleep(0.005)


async def announce(
    agent: Agent, *uids: str, gone: tuple[str, ...] = (), complete: bool = False
) -> None:
    added = [
        pb.AnnouncedEndpoint(namespace="ns", name=uid, uid=uid, addresses=[parse("10.0.0.1")])
        for uid in uids
    ]
    message = pb.Announcement(complete=complete, added=added, removed_uids=gone)
    await agent.call.write(pb.AgentMessage(announcement=message))


async def test_what_an_agent_says_reaches_the_other_replica() -> None:
    async with pair() as p:
        one, two = await p.start("one"), await p.start("two")
        agent = await one.agent().open()
        await announce(agent, "a", "b", complete=True)
        await until(lambda: two.knows() == {"a": 1, "b": 1}, two.knows)
        await announce(agent, "c", gone=("a",))
        await until(lambda: two.knows() == {"b": 1, "c": 1}, two.knows)
        assert one.knows() == two.knows()
        # Not to itself, not back, and the other has no stream of that node's own.
        assert (one.relay.streams, two.relay.streams) == (1, 0)
        await until(lambda: one.relay._own == {one.target}, lambda: one.relay._own)
        assert not two.distribution.streams


async def test_a_replica_that_comes_later_hears_all_of_it() -> None:
    async with pair() as p:
        one = await p.start("one")
        agent = await one.agent().open()
        await announce(agent, "a", complete=True)
        await announce(agent, "b")
        await until(lambda: one.knows() == {"a": 1, "b": 1}, one.knows)
        two = await p.start("two")
        two.announced.said["stale"] = ("n1", (parse("10.0.0.2"),))
        two.announced.said["other"] = ("n2", (parse("10.0.0.3"),))
        await until(lambda: two.knows() == {"a": 1, "b": 1, "other": 1}, two.knows)


async def test_an_agent_that_goes_to_the_other_replica_is_heard_there() -> None:
    async with pair() as p:
        one, two = await p.start("one"), await p.start("two")
        agent = await one.agent().open()
        await announce(agent, "a", complete=True)
        await until(lambda: two.knows() == {"a": 1}, two.knows)
        moved = await two.agent().open()
        await announce(moved, "b", complete=True)
        await until(lambda: two.knows() == {"b": 1}, two.knows)
        # The first has not noticed, and what it passes on is refused.
        await announce(agent, "late")
        await until(lambda: one.knows().keys() >= {"late"}, one.knows)
        await asyncio.sleep(0.2)
        assert two.knows() == {"b": 1}
        agent.call.cancel()
        await until(lambda: not one.distribution.streams, lambda: one.distribution.streams)
        await announce(moved, "c")
        await until(lambda: one.knows() == {"b": 1, "c": 1}, one.knows)


async def test_a_relay_goes_with_its_agent_and_with_its_replica() -> None:
    async with pair() as p:
        one, two = await p.start("one"), await p.start("two")
        agent = await one.agent().open()
        await announce(agent, "a", complete=True)
        await until(lambda: one.relay.streams == 1, lambda: one.relay.streams)
        one.relay.set_peers(frozenset({one.target}))
        await until(lambda: one.relay.streams == 0, lambda: one.relay.streams)
        one.relay.set_peers(frozenset({one.target, two.target}))
        await until(lambda: one.relay.streams == 1, lambda: one.relay.streams)
        agent.call.cancel()
        await until(lambda: one.relay.streams == 0, lambda: one.relay.streams)
        assert two.knows() == {"a": 1}  # as with an agent that goes away


async def test_a_replica_that_is_down_is_tried_again_and_delays_nobody() -> None:
    async with pair() as p:
        one = await p.start("one")
        async with replica("two", p.bundle) as two:
            target = two.target
        one.relay.set_peers(frozenset({one.target, target}))
        agent = await one.agent().open()
        await announce(agent, "a", complete=True)
        await until(lambda: one.knows() == {"a": 1}, one.knows)
        await asyncio.wait_for(agent.change(), 5)
        async with replica("two", p.bundle, int(target.rpartition(":")[2])) as two:
            await until(lambda: two.knows() == {"a": 1}, two.knows)
        await announce(agent, "b")
        await until(lambda: one.knows() == {"a": 1, "b": 1}, one.knows)


async def test_a_token_of_another_node_passes_nothing_on() -> None:
    async with pair() as p:
        one = await p.start("one")
        agent = one.agent("n1")
        stub = await agent.open(token="n2")
        with pytest.raises(grpc.aio.AioRpcError, match="the token is for node n2"):
            await stub.change()
        hello = pb.Hello(node="n1", relayed=True)
        agent = await one.agent("n2").open()
        await agent.call.write(pb.AgentMessage(hello=hello))
        await announce(agent, "a", complete=True)
        await until(lambda: one.announced.said, lambda: one.announced.said)
        assert one.announced.said["a"][0] == "n2"


def the_slice(service: str, *addresses: str) -> EndpointSlice:
    endpoints = tuple(Endpoint(parse(a), True, True, False, "n", "") for a in addresses)
    ports = (Port("grpc", 6, 9890), Port("metrics", 6, 9881))
    # As the slice controller labels those of a headless Service: nodes do not serve it.
    return EndpointSlice(Key("kube-system", "x"), service, ports, endpoints, served=False)


def test_replicas_are_found_by_the_operators_service() -> None:
    assert operators(the_slice("weir-operator", "192.0.2.1", "2001:db8::1")) == {
        "192.0.2.1:9890",
        "[2001:db8::1]:9890",
    }
    assert operators(the_slice("other", "192.0.2.1")) == set()


async def test_connections_to_replicas_that_are_gone_are_closed() -> None:
    async with pair() as p:
        relay = (await p.start("one")).relay
        for peers in ({"127.0.0.1:1", "127.0.0.1:2"}, {"127.0.0.1:2", "127.0.0.1:3"}):
            relay.set_peers(frozenset(peers))
            for target in sorted(peers):
                await relay._channel(target)
        assert relay._channels.keys() == {"127.0.0.1:2", "127.0.0.1:3"}


def test_peers_follow_the_slices() -> None:
    class Sink:
        told = 0

        def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
            self.told += 1

    relay = Relay("one", lambda: b"")
    watch = PeerWatch(Sink(), "kube-system", relay)  # type: ignore[arg-type]
    for name, namespace, what in (
        ("x", "kube-system", the_slice("weir-operator", "192.0.2.1")),
        ("y", "kube-system", the_slice("weir-operator", "192.0.2.2")),
        ("z", "default", the_slice("weir-operator", "192.0.2.3")),
        ("x", "kube-system", None),
    ):
        watch.changed("EndpointSlice", Key(namespace, name), None, what)
    assert relay._peers == {"192.0.2.2:9890"}
    assert watch.consumer.told == 4  # type: ignore[attr-defined]
