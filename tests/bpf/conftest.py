# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the packet ring: see support.packet_node for its world."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.datapaths import Datapaths
from support.packet_node import BOOKS, Book, Node, World

from weir.api.address import parse
from weir.datapath.settings import Settings


@pytest.fixture(params=[4, 6], ids=["v4", "v6"])
def net(request: pytest.FixtureRequest) -> Book:
    return BOOKS[request.param]


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.ns.close()


@pytest.fixture
def settings(net: Book) -> Settings:
    return Settings(
        node_ipv4=parse(BOOKS[4].node), node_ipv6=parse(BOOKS[6].node), overlay_ifindex=1,
        overlay_mtu=1400, tunnel=True, masquerade=True, snat_port_first=61000,
        snat_port_last=61003,
    )  # fmt: skip


@pytest.fixture
def node(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[Node]:
    made = Node(datapaths.get(settings), world, net)
    yield made
    made.reader.close()
