# SPDX-License-Identifier: Apache-2.0
"""Associations between real SCTP sockets, on kernels that have them: `make test-kernels`.

Two nodes, see support.two_nodes. All ends have one address: of several, each end tells the other,
which then leaves the VIP or the node's address behind. A probe sent there by NAT's port is out of
the blue to its receiver, whose ABORT ends the association; with kube-proxy likewise.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace

import pytest
from support.namespaces import NetNs
from support.sctp import PROTOCOL
from support.timing import SCALE
from support.traffic import eventually
from support.two_nodes import ADDRESS, Net, build, service, sock

from weir.api.address import parse
from weir.datapath.records import CtEntry, CtFlag, Isolation

PORT, TARGET = 7000, 7100
MESSAGE, MESSAGES = bytes(range(256)) * 32, 16
# (level, option) that make a socket tell of ICMP errors at once.
RECEIVE_ERRORS = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}
FAMILIES = pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])


@pytest.fixture(scope="module", params=[True, False], ids=["vxlan", "native"])
def net(request: pytest.FixtureRequest, private_mounts: None) -> Iterator[Net]:
    with ExitStack() as stack:
        yield build(stack, request.param)


@pytest.fixture(params=["device", "sender"])
def checksums(request: pytest.FixtureRequest, net: Net) -> str:
    """Who fills in the checksum: the device, so that programs see none, or the sender."""
    state = "on" if request.param == "device" else "off"
    for name in ("a", "b", "r"):
        net.where(name).run("ethtool", "-K", "eth0", "tx-checksum-sctp", state)
    for node in ("node1", "node2"):
        net.where(node).run("ethtool", "-K", "uplink", "tx-checksum-sctp", state)
    return str(request.param)


def sctp_socket(place: NetNs, family: int) -> socket.socket:
    made = sock(place, family, socket.SOCK_STREAM, PROTOCOL)
    made.settimeout(5 * SCALE)
    if family == 6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return made


def talk(client: socket.socket, server: socket.socket) -> None:
    """The messages there, and back."""
    for source, sink in ((client, server), (server, client)):
        sender = threading.Thread(target=send, args=(source,))
        sender.start()
        received = bytearray()
        while len(received) < len(MESSAGE) * MESSAGES:
            part = sink.recv(len(MESSAGE))
            assert part
            received += part
        sender.join()
        assert received == MESSAGE * MESSAGES


def send(source: socket.socket) -> None:
    """The receiver tells what did not arrive; its socket may be gone by then."""
    with suppress(OSError):
        for _ in range(MESSAGES):
            source.sendall(MESSAGE)


def exchange(net: Net, family: int, client: str, server: str, name: str, port: int) -> str:
    """An association that carries data both ways; the client that the server saw."""
    with closing(sctp_socket(net.where(server), family)) as listener:
        listener.bind((ADDRESS[family][server], TARGET))
        listener.listen()
        with closing(sctp_socket(net.where(client), family)) as caller:
            caller.connect((ADDRESS[family][name], port))
            accepted, peer = listener.accept()
            accepted.settimeout(5 * SCALE)
            with closing(accepted):
                assert caller.getpeername()[:2] == (ADDRESS[family][name], port)
                talk(caller, accepted)
    return str(peer[0])


def flows(net: Net) -> list[CtEntry]:
    rows = net.one.datapath.tables.ct.items()
    return [entry for key, entry in rows if key.protocol == PROTOCOL]


@FAMILIES
@pytest.mark.parametrize("server", ["b", "r", "node1", "node2"])
def test_between_pods_and_nodes(net: Net, family: int, server: str, checksums: str) -> None:
    seen = exchange(net, family, "a", server, server, TARGET)
    assert seen == ADDRESS[family]["a"]


@FAMILIES
@pytest.mark.parametrize("server", ["b", "r", "node1", "node2", "world"])
def test_service(net: Net, family: int, server: str, checksums: str) -> None:
    """The VIP's port is not the backend's, and the client never sees the backend."""
    service(net.one, family, PROTOCOL, PORT, (server, TARGET))
    seen = exchange(net, family, "a", server, "vip", PORT)
    assert seen == ADDRESS[family]["node1" if server == "world" else "a"]


@FAMILIES
@pytest.mark.parametrize("server", ["b", "r", "node2"])
def test_node_port(net: Net, family: int, server: str, checksums: str) -> None:
    """From outside by the node's own address: a backend here sees the client, others the node."""
    service(net.one, family, PROTOCOL, PORT + 2, (server, TARGET), address="node1")
    seen = exchange(net, family, "world", server, "node1", PORT + 2)
    assert seen == ADDRESS[family]["world" if server == "b" else "node1"]


@FAMILIES
@pytest.mark.parametrize("server", ["b", "r", "node2"])
def test_service_from_the_host(net: Net, family: int, server: str, checksums: str) -> None:
    """No socket hook sees SCTP: the uplink's program does, where the host routes VIPs."""
    vip = ADDRESS[family]["vip"]
    route = ("ip", f"-{family}", "route", "replace", vip, "via", ADDRESS[family]["world"])
    net.one.ns.run(*route)
    service(net.one, family, PROTOCOL, PORT, (server, TARGET))
    assert exchange(net, family, "node1", server, "vip", PORT) == ADDRESS[family]["node1"]


@FAMILIES
def test_masquerade(net: Net, family: int, checksums: str) -> None:
    seen = exchange(net, family, "a", "world", "world", TARGET)
    assert seen == ADDRESS[family]["node1"]


@FAMILIES
def test_the_end_of_an_association_is_seen(net: Net, family: int) -> None:
    """Both rows of a Service's flow go soon after, and not after minutes."""
    tables = net.one.datapath.tables
    tables.ct.delete([key for key, _ in tables.ct.items()])
    service(net.one, family, PROTOCOL, PORT, ("b", TARGET))
    exchange(net, family, "a", "b", "vip", PORT)

    def both_close() -> bool:
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        found = [e for e in flows(net) if e.flags & (CtFlag.SERVICE | CtFlag.REV_NAT)]
        return len(found) == 2 and all(e.expires - now <= 31 for e in found)

    assert eventually(both_close, 5 * SCALE), flows(net)


@FAMILIES
def test_no_backend(net: Net, family: int) -> None:
    """Who asks for errors is refused at once, as by kube-proxy."""
    service(net.one, family, PROTOCOL, PORT + 1)
    with closing(sctp_socket(net.where("a"), family)) as caller:
        caller.setsockopt(*RECEIVE_ERRORS[family], 1)
        with pytest.raises(OSError, match="refused") as refusal:
            caller.connect((ADDRESS[family]["vip"], PORT + 1))
    assert refusal.value.errno == errno.ECONNREFUSED


@FAMILIES
def test_policy(net: Net, family: int) -> None:
    """Pod b is isolated by a rule set that allows nothing."""
    table = net.one.datapath.tables.endpoints
    address = parse(ADDRESS[family]["b"])
    row = table.get(address)
    assert row is not None
    with closing(sctp_socket(net.where("b"), family)) as listener:
        listener.bind((ADDRESS[family]["b"], TARGET))
        listener.listen()
        table.update({address: replace(row, ingress=Isolation(99, 0))})
        try:
            with closing(sctp_socket(net.where("a"), family)) as caller:
                caller.settimeout(0.5 * SCALE)
                with pytest.raises(TimeoutError):
                    caller.connect((ADDRESS[family]["b"], TARGET))
        finally:
            table.update({address: row})
