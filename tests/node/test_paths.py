# SPDX-License-Identifier: Apache-2.0
"""Two nodes with real devices and sockets: what BPF_PROG_TEST_RUN cannot show.

pod a, pod b -- node 1 -- wire -- node 2 -- pod r
                            |
                          world
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support.two_nodes import ADDRESS, OVERLAY_MTU, TIMEOUT_S, Net, build, sock

from weir.api.address import parse
from weir.datapath.records import (
    Backend,
    BackendKey,
    DropReason,
    Route,
    RuntimeFeature,
    Service,
    ServiceFlag,
    ServiceKey,
)

pytestmark = pytest.mark.core

FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


@pytest.fixture(scope="module", params=[True, False], ids=["vxlan", "native"])
def net(request: pytest.FixtureRequest, private_mounts: None) -> Iterator[Net]:
    with ExitStack() as stack:
        yield build(stack, request.param)


def exchange(net: Net, family: int, client: str, server: str, name: str = "") -> str:
    """A TCP connection that moves 1 MB and a datagram each way; the client that the server saw."""
    target = ADDRESS[family][name or server]
    with sock(net.where(server), family, socket.SOCK_STREAM) as listener:
        listener.bind(("", 7000))
        listener.listen()
        with sock(net.where(client), family, socket.SOCK_STREAM) as stream:
            stream.connect((target, 7000))
            accepted, peer = listener.accept()
            sender = threading.Thread(target=stream.sendall, args=(bytes(1 << 20),))
            sender.start()
            accepted.settimeout(TIMEOUT_S)
            left = 1 << 20
            while left:
                left -= len(accepted.recv(left))
            sender.join()
            accepted.close()
    with sock(net.where(server), family, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("", 7000))
        with sock(net.where(client), family, socket.SOCK_DGRAM) as datagrams:
            datagrams.sendto(b"ping", (target, 7000))
            _, seen = receiver.recvfrom(99)
            receiver.sendto(b"pong", seen)
            data, answerer = datagrams.recvfrom(99)
            assert (data, answerer[0]) == (b"pong", target)
    assert seen[0] == peer[0]
    return str(peer[0])


@FAMILIES
@pytest.mark.parametrize(
    ("client", "server"),
    [("a", "b"), ("a", "r"), ("r", "a"), ("a", "node1"), ("node1", "a"), ("a", "node2"),
     ("node2", "a")],
)  # fmt: skip
def test_pods_and_nodes_see_each_other(net: Net, family: int, client: str, server: str) -> None:
    """Each sees the other's own address, and nothing is dropped on the way, but for what tells
    a sender the path's MTU: the pods' devices take more than the overlay."""
    before = net.one.drops(), net.two.drops()
    assert exchange(net, family, client, server) == ADDRESS[family][client]
    assert (net.one.drops(), net.two.drops()) == before


@FAMILIES
def test_masquerade(net: Net, family: int) -> None:
    assert exchange(net, family, "a", "world") == ADDRESS[family]["node1"]


@FAMILIES
@pytest.mark.parametrize("server", ["b", "r", "node1", "node2", "world"])
def test_service_in_packets(net: Net, family: int, server: str) -> None:
    """The client is in no cgroup that the socket programs see."""
    tables = net.one.datapath.tables
    address = parse(ADDRESS[family][server])
    number = 1000 + family * 10 + len(server) + ord(server[-1])
    for proto in (6, 17):
        tables.backends.update({BackendKey(number, 0): Backend(address, 7000)})
        key = ServiceKey(parse(ADDRESS[family]["vip"]), 7000, proto, 0)
        tables.services.update({key: Service(number, 1, 0, 0)})
    seen = exchange(net, family, "a", server, "vip")
    assert seen == ADDRESS[family]["node1" if server == "world" else "a"]


@FAMILIES
def test_no_backend(net: Net, family: int) -> None:
    key = ServiceKey(parse(ADDRESS[family]["vip"]), 81, 6, 0)
    net.one.datapath.tables.services.update({key: Service(5, 0, 0, 0)})
    with (
        sock(net.where("a"), family, socket.SOCK_STREAM) as stream,
        pytest.raises(ConnectionRefusedError),
    ):
        stream.connect((ADDRESS[family]["vip"], 81))


@FAMILIES
def test_path_mtu(net: Net, family: int) -> None:
    """The pod's device takes 1500 bytes, the overlay less: the sender learns it."""
    if not net.one.tunnel:
        return
    with sock(net.where("a"), family, socket.SOCK_DGRAM) as datagrams:
        level, option, do = (0, 10, 2) if family == 4 else (41, 23, 2)
        datagrams.setsockopt(level, option, do)
        datagrams.connect((ADDRESS[family]["r"], 9))
        # The first is sent and answered, unless an earlier connection learned it already.
        with pytest.raises(OSError, match="too long"):  # noqa: PT012
            for _ in range(2):
                datagrams.send(bytes(OVERLAY_MTU - 20))
        assert datagrams.getsockopt(level, 14 if family == 4 else 24) == OVERLAY_MTU


@FAMILIES
@pytest.mark.parametrize("lie", ["unknown node", "another node's pod"])
def test_overlay_believes_nodes_only(net: Net, family: int, lie: str) -> None:
    """Each node may send what is its own, and nobody else anything."""
    if not net.one.tunnel:
        return
    tables = net.one.datapath.tables
    node2, cidr = parse(ADDRESS[4]["node2"]), net.one.prefix(family, 2)
    node_row, cidr_row = tables.addresses.get(node2), tables.routes.get(cidr)
    assert node_row
    assert cidr_row
    before = net.one.drops().get(DropReason.SPOOFED_SOURCE, 0)
    if lie == "unknown node":
        tables.addresses.delete([node2])
    else:
        tables.routes.update({cidr: Route(parse("192.0.2.77"), cidr_row.flags)})
    try:
        with sock(net.where("r"), family, socket.SOCK_DGRAM) as datagrams:
            datagrams.sendto(b"?", (ADDRESS[family]["a"], 7000))
        assert net.one.drops().get(DropReason.SPOOFED_SOURCE, 0) == before + 1
    finally:
        tables.addresses.update({node2: node_row})
        tables.routes.update({cidr: cidr_row})


@FAMILIES
@pytest.mark.parametrize("way", ["snat", "dsr"])
@pytest.mark.parametrize("server", ["a", "r", "node1", "node2"])
def test_node_port_from_outside(net: Net, family: int, server: str, way: str) -> None:
    """Whole connections with segments of all sizes, to each place; only a node that must take the
    answers back hides the client."""
    tables = net.one.datapath.tables
    number = 2000 + family
    net.one.datapath.set_features(RuntimeFeature.HOST_BACKENDS)
    for proto in (6, 17):
        row = {BackendKey(number, 0): Backend(parse(ADDRESS[family][server]), 7000)}
        tables.backends.update(row)
        key = ServiceKey(parse(ADDRESS[family]["node1"]), 7000, proto, 0)
        flags = ServiceFlag.DSR if way == "dsr" else 0
        tables.services.update({key: Service(number, 1, flags, 0)})
    before = net.one.drops(), net.two.drops()
    try:
        seen = exchange(net, family, "world", server, "node1")
    finally:
        tables.services.delete([
            ServiceKey(parse(ADDRESS[family]["node1"]), 7000, proto, 0) for proto in (6, 17)
        ])  # fmt: skip
    hidden = server == "node2" or (server == "r" and way == "snat")
    assert seen == ADDRESS[family]["node1" if hidden else "world"]
    assert (net.one.drops(), net.two.drops()) == before


@pytest.mark.parametrize("way", ["snat", "dsr"])
@pytest.mark.parametrize("size", [1300, 1460, 2000, 4000, 20_000])
def test_datagrams_that_must_be_cut(net: Net, size: int, way: str) -> None:
    """IPv4, from a client that lets routers cut: the first one arrives already. The answers too."""
    tables = net.one.datapath.tables
    key = ServiceKey(parse(ADDRESS[4]["node1"]), 7100, 17, 0)
    row = Service(2100, 1, ServiceFlag.DSR if way == "dsr" else 0, 0)
    tables.backends.update({BackendKey(2100, 0): Backend(parse(ADDRESS[4]["r"]), 7100)})
    tables.services.update({key: row})
    with (
        sock(net.where("r"), 4, socket.SOCK_DGRAM) as receiver,
        sock(net.where("world"), 4, socket.SOCK_DGRAM) as client,
    ):
        receiver.bind(("", 7100))
        for end in (receiver, client):
            end.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER: IP_PMTUDISC_DONT
        sent = bytes(number & 0xFF for number in range(size))
        client.sendto(sent, (ADDRESS[4]["node1"], 7100))
        data, seen = receiver.recvfrom(1 << 16)
        assert data == sent
        assert seen[0] == ADDRESS[4]["world" if way == "dsr" else "node1"]
        receiver.sendto(data, seen)
        data, answerer = client.recvfrom(1 << 16)
        assert (data, answerer) == (sent, (ADDRESS[4]["node1"], 7100))
    tables.services.delete([key])
