# SPDX-License-Identifier: Apache-2.0
"""API servers: learned from the cluster's own EndpointSlices, and tried in turn."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.operator_state import READERS, key

from weir.operator.api import LEARNED, Api, ApiError
from weir.operator.kubeconfig import Access
from weir.operator.objects import Key, Problem
from weir.operator.servers import ServerWatch

PORTS = [{"name": "https", "port": 6443}, {"name": "metrics", "port": 1}]


class Told:
    def __init__(self) -> None:
        self.keys: list[str] = []

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        self.keys.append(str(key))

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        self.keys.append(f"problems {key}")

    def synced(self, kind: str) -> None:
        self.keys.append(f"synced {kind}")


@pytest.mark.parametrize(
    ("namespace", "service", "addresses", "learned"),
    [
        pytest.param("default", "kubernetes", ["10.0.0.1"], ["https://10.0.0.1:6443"], id="IPv4"),
        pytest.param("default", "kubernetes", ["fd00::1"], ["https://[fd00::1]:6443"], id="IPv6"),
        pytest.param("default", "kubernetes", ["not an address"], [], id="no address"),
        pytest.param("default", "other", ["10.0.0.1"], [], id="another Service"),
        pytest.param("evil", "kubernetes", ["10.0.0.1"], [], id="another namespace"),
    ],
)
def test_what_is_learned_from_a_slice(
    namespace: str, service: str, addresses: list[str], learned: list[str]
) -> None:
    meta = {"name": "s", "namespace": namespace, "labels": {"kubernetes.io/service-name": service}}
    endpoints = [{"addresses": [address]} for address in addresses]
    body: Any = {"metadata": meta, "ports": PORTS, "endpoints": endpoints}
    made = READERS["EndpointSlice"](msgspec.Raw(msgspec.json.encode(body))).value
    found, told = list[str](), Told()
    watch = ServerWatch(told, found.append)
    watch.changed("EndpointSlice", key(namespace, "s"), None, made)
    watch.changed("EndpointSlice", key(namespace, "s"), made, None)
    watch.problems("EndpointSlice", key(namespace, "s"), ())
    watch.synced("EndpointSlice")
    assert found == learned
    name = f"{namespace}/s"
    assert told.keys == [name, name, f"problems {name}", "synced EndpointSlice"]


async def test_all_are_tried_in_turn_and_the_configured_stay() -> None:
    configured = ("http://127.0.0.1:1", "http://127.0.0.1:2")
    async with Api(Access(configured)) as api:
        for port in range(100, 100 + LEARNED + 4):
            api.learn(f"http://127.0.0.1:{port}")
        api.learn(configured[0])
        assert len(api.servers) == len(configured) + LEARNED
        assert f"http://127.0.0.1:{100 + LEARNED + 3}" in api.servers
        tried = []
        for _ in range(len(api.servers) + 1):
            tried.append(api.server)
            with pytest.raises(ApiError):
                await api.get("/")
        assert tried == [*api.servers, configured[0]]
