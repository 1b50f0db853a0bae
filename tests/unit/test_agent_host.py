# SPDX-License-Identifier: Apache-2.0
"""When the agent moves pods from filters to links: settled ones, in quiet times, one by one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from weir.agent import host as host_module
from weir.agent.gate import Gate
from weir.agent.host import AgentHost
from weir.api import address
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.datapath.errors import DeviceGone


class Attacher:
    def __init__(self) -> None:
        self.filters: set[str] = set()
        self.settled: list[str] = []
        self.gone: set[str] = set()

    def attach_pod(self, ifname: str) -> None:
        self.filters.add(ifname)

    def settle_pod(self, ifname: str) -> bool:
        if ifname in self.gone:
            raise DeviceGone("attach to", ifname, 19)
        if ifname not in self.filters:
            return False
        self.filters.remove(ifname)
        self.settled.append(ifname)
        return True

    def detach_pod(self, ifname: str) -> None:
        self.filters.discard(ifname)


class Placement:
    def __init__(self) -> None:
        self.local: dict[str, LocalEndpoint] = {}


class Projection:
    def __init__(self) -> None:
        self.placement = Placement()


def endpoint(name: str) -> LocalEndpoint:
    return LocalEndpoint(
        container_id=name,
        netns=str(Path("/run/netns") / name),
        ifname="eth0",
        host_ifname=f"weir-{name}",
        ifindex=7,
        mac=bytes(6),
        host_mac=bytes(6),
        addresses=(address.parse("10.0.0.1"),),
        pod=PodRef("ns", name, name),
    )


@pytest.fixture
def attacher() -> Attacher:
    return Attacher()


@pytest.fixture
def host(attacher: Attacher, monkeypatch: pytest.MonkeyPatch) -> AgentHost:
    monkeypatch.setattr(host_module, "SETTLE_GAP_SECONDS", 0.0)
    projection = Projection()
    for name in ("a", "b"):
        projection.placement.local[name] = endpoint(name)
    unused = cast("Any", None)
    return AgentHost(cast("Any", projection), unused, lambda: attacher, Gate(), unused, lambda: "")


async def test_pods_found_at_start_settle_at_once(host: AgentHost, attacher: Attacher) -> None:
    attacher.filters = {"weir-a", "weir-b"}
    await host.settle()
    assert attacher.settled == ["weir-a", "weir-b"]


async def test_nothing_settles_while_pods_are_wired(
    host: AgentHost, attacher: Attacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacher.filters = {"weir-a"}
    await host.attach("weir-b")
    await host.settle()
    assert attacher.settled == []
    monkeypatch.setattr(host_module, "QUIET_SECONDS", 0.0)
    await host.settle()
    assert attacher.settled == ["weir-a"], "the new one has not come to stay yet"
    monkeypatch.setattr(host_module, "STAY_SECONDS", 0.0)
    await asyncio.sleep(0)
    await host.settle()
    assert attacher.settled == ["weir-a", "weir-b"]


async def test_a_pod_that_went_does_not_hold_up_the_others(
    host: AgentHost, attacher: Attacher
) -> None:
    attacher.filters = {"weir-a", "weir-b"}
    attacher.gone = {"weir-a"}
    await host.settle()
    assert attacher.settled == ["weir-b"]
