# SPDX-License-Identifier: Apache-2.0
"""Whole replicas against a fake API server, and agents that only listen: that it is all wired."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import grpc.aio
import pytest
from support.apiserver import FakeApi
from unit.operator.test_operator_distribution import authenticate

from weir.api.address import Addr, parse, text
from weir.api.v1 import weir_pb2 as pb
from weir.api.v1 import weir_pb2_grpc as pb_grpc
from weir.operator import app as module
from weir.operator import kinds, tls
from weir.operator.app import App
from weir.operator.config import Config
from weir.operator.handlers import KopfThread
from weir.operator.kubeconfig import Access
from weir.operator.troubles import Troubles

NAMESPACE = "kube-system"
KINDS = [value for value in vars(kinds).values() if isinstance(value, kinds.Kind)]


async def until(wanted: Callable[[], object], what: Callable[[], object]) -> None:
    deadline = asyncio.get_running_loop().time() + 20
    while not wanted():
        assert asyncio.get_running_loop().time() < deadline, what()
        await asyncio.sleep(0.01)


@dataclass
class Agent:
    """Holds all resources."""

    channel: grpc.aio.Channel
    node: str
    held: dict[str, pb.Resource] = field(default_factory=dict)

    async def run(self) -> None:
        stub = pb_grpc.DistributionStub(self.channel)
        self.call = stub.Sync(None, metadata=(("authorization", f"Bearer {self.node}"),))
        await self.call.write(pb.AgentMessage(hello=pb.Hello(node=self.node)))
        first = pb.Announcement(complete=True)
        await self.call.write(pb.AgentMessage(announcement=first))
        async for update in self.call:
            for data in update.resources:
                resource = pb.Resource.FromString(data)
                self.held[resource.name] = resource
            for name in update.removed:
                self.held.pop(name, None)

    async def announce(self, uid: str, address: str) -> None:
        pod = pb.AnnouncedEndpoint(namespace="ns", name="p", uid=uid, addresses=[parse(address)])
        message = pb.AgentMessage(announcement=pb.Announcement(added=[pod]))
        await self.call.write(message)


@asynccontextmanager
async def replicas(fake: FakeApi, *names: str) -> AsyncIterator[list[Agent]]:
    """One agent on each: "n1" on the first, and so on."""
    for kind in KINDS:
        fake.collection(kind.path)
    async with fake.serve() as server:
        apps = [
            App(Config(NAMESPACE, name, listen="127.0.0.1:0", health_listen="127.0.0.1:0"),
                Access((server,)))
            for name in names
        ]  # fmt: skip
        tasks = [asyncio.create_task(app.run()) for app in apps]
        agents: list[Agent] = []
        listening: list[asyncio.Task[None]] = []
        try:
            await until(
                lambda: all(app.port for app in apps), lambda: [t for t in tasks if t.done()]
            )
            ca = fake.stored[f"/api/v1/namespaces/{NAMESPACE}/configmaps/weir-ca"]["data"]["ca.crt"]
            for i, app in enumerate(apps):
                fake.put(kinds.SLICE.path, operator_slice(f"weir-operator-{i}", app.port))
                channel = grpc.aio.secure_channel(
                    f"127.0.0.1:{app.port}",
                    grpc.ssl_channel_credentials(ca.encode()),
                    options=[("grpc.ssl_target_name_override", tls.SERVER_NAME)],
                )
                agents.append(Agent(channel, f"n{i + 1}"))
                listening.append(asyncio.create_task(agents[-1].run()))
            yield agents
        finally:
            for agent in agents:
                await agent.channel.close(None)
            for app in apps:
                app.stop.set()
            await asyncio.gather(*listening, return_exceptions=True)
            await asyncio.gather(*tasks)


def operator_slice(name: str, port: int) -> dict[str, Any]:
    labels = {"kubernetes.io/service-name": "weir-operator", "service.kubernetes.io/headless": ""}
    return {
        "metadata": {"namespace": NAMESPACE, "name": name, "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["127.0.0.1"], "nodeName": name}],
        "ports": [{"name": "grpc", "port": port, "protocol": "TCP"}],
    }


def service(name: str, second: int) -> dict[str, Any]:
    created = f"2030-01-01T00:00:0{second}Z"
    return {
        "metadata": {
            "namespace": "ns",
            "name": name,
            "uid": f"uid-{name}",
            "creationTimestamp": created,
        },
        "spec": {
            "clusterIP": f"10.96.0.{second}",
            "externalIPs": ["192.0.2.1"],
            "ports": [{"port": 80, "nodePort": 30000 + second}],
        },
    }


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    async def sleep(_: object) -> None:
        await asyncio.Event().wait()

    # A token is its node's name; kopf needs more of an API server than the fake one is.
    monkeypatch.setattr(module, "Authenticator", lambda _api, _namespace: authenticate)
    monkeypatch.setattr(module, "Troubles", partial(Troubles, settle_seconds=0.05))
    monkeypatch.setattr(KopfThread, "start", lambda _: None)
    monkeypatch.setattr(KopfThread, "watch", sleep)
    made = FakeApi()
    made.put(kinds.NAMESPACE.path, {"metadata": {"name": "ns"}})
    for i in (1, 2):
        node = {"metadata": {"name": f"n{i}"}, "spec": {"podCIDRs": [f"10.0.{i}.0/24"]}}
        made.put(kinds.NODE.path, node)
    return made


async def test_a_conflict_reaches_agents_and_its_object(fake: FakeApi) -> None:
    fake.put(kinds.SERVICE.path, service("younger", 2))
    fake.put(kinds.SERVICE.path, service("older", 1))
    async with replicas(fake, "one", "two") as agents:
        for agent in agents:
            await until(lambda: "service/ns/older" in agent.held, lambda: agent.held)  # noqa: B023
            older, younger = (agent.held[f"service/ns/{n}"].service for n in ("older", "younger"))
            assert not older.refused
            (refused,) = younger.refused
            assert (text(Addr(refused.address)), refused.port) == ("192.0.2.1", 80)
            assert younger.ports[0].node_port == 30002
        events = "/api/v1/namespaces/ns/events/"
        await until(lambda: any(p.startswith(events) for p in fake.stored), lambda: fake.stored)
        fake.delete(kinds.SERVICE.path, "ns/older")
        for agent in agents:
            await until(lambda: "service/ns/older" not in agent.held, lambda: agent.held)  # noqa: B023
            assert not agent.held["service/ns/younger"].service.refused
        (event,) = [content for path, content in fake.stored.items() if path.startswith(events)]
        assert event["involvedObject"]["name"] == "younger"
        assert "80/TCP of 192.0.2.1 is Service ns/older's" in event["message"]


async def test_an_announced_address_reaches_the_agents_of_all_replicas(fake: FakeApi) -> None:
    pod = {
        "metadata": {"namespace": "ns", "name": "p", "uid": "u"},
        "spec": {"nodeName": "n1", "containers": []},
    }
    fake.put(kinds.POD.path, pod)
    async with replicas(fake, "one", "two") as agents:
        one, two = agents
        await until(lambda: "pod/u" in one.held and "node/n2" in two.held, lambda: agents)
        await one.announce("u", "10.0.1.7")
        name = f"address/{parse('10.0.1.7').hex()}"
        await until(lambda: name in one.held and name in two.held, lambda: agents)
        assert two.held[name].address.pod == "p"
        await two.announce("u", "10.0.2.7")  # it is not a pod of that node
        await asyncio.sleep(0.2)
        assert [n for n in one.held if n.startswith("address/")] == [name]


def posts(fake: FakeApi) -> list[str]:
    return [r.path for r in fake.requests if r.method == "POST" and r.path.endswith("/events")]


async def test_what_is_wrong_with_policies_reaches_agents_and_the_policies(fake: FakeApi) -> None:
    rule = {"action": "Deny", "from": [{"later": {}}]}
    subject = {"namespaces": {}}
    spec = {"tier": "Admin", "priority": 1, "subject": subject, "ingress": [rule]}
    policy = {"metadata": {"name": "odd", "uid": "u", "generation": 2}, "spec": spec}
    path = f"{kinds.CLUSTER_POLICY.path}/odd"
    fake.put(kinds.CLUSTER_POLICY.path, policy)
    fake.stored[path] = policy
    web = "/apis/networking.k8s.io/v1/namespaces/ns/networkpolicies/web"
    fake.stored[web] = {"metadata": {"namespace": "ns", "name": "web", "uid": "w"}}

    def events(of: str) -> list[dict[str, Any]]:
        return [
            content
            for where, content in fake.stored.items()
            if "/events/" in where and content["involvedObject"]["name"] == of
        ]

    async with replicas(fake, "one", "two") as agents:
        for agent in agents:
            await until(lambda: "cluster-policy/odd" in agent.held, lambda: agent.held)  # noqa: B023
            (denies,) = agent.held["cluster-policy/odd"].policy.rules
            assert (denies.any_peer, denies.action) == (True, pb.ACTION_DENY)
            trouble = pb.PolicyTrouble(namespace="ns", name="web", message=f"by {agent.node}")
            said = pb.AgentMessage(trouble=pb.Trouble(policies=[trouble]))
            await agent.call.write(said)
        await until(lambda: policy.get("status"), lambda: fake.stored)
        await until(lambda: events("odd") and events("web"), lambda: fake.stored)
        # Both replicas post both.
        await until(lambda: len(posts(fake)) == 4, lambda: posts(fake))
    (condition,) = policy["status"]["conditions"]
    assert (condition["type"], condition["status"]) == ("Accepted", "False")
    assert condition["observedGeneration"] == 2
    (invalid,), (no_room,) = events("odd"), events("web")
    assert invalid["message"].startswith("spec.ingress[0].from[0]: needs exactly one of ")
    assert (no_room["reason"], no_room["involvedObject"]["uid"]) == ("NoRoom", "w")
    assert "on node n" in no_room["message"]
