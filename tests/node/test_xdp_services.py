# SPDX-License-Identifier: Apache-2.0
"""A NodePort with its backend elsewhere, by XDP on real devices: connections, data, both families.

node netns: uplink ── wire :outside netns, where the client and the backend are
192.0.2.1, 2001:db8::1      192.0.2.2, 2001:db8::2 (client)
                            10.0.2.2, fd00:2::2 (backend, by way of the client's address)
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from node.conftest import Installation
from support.datapaths import place
from support.namespaces import NetNs, veth
from support.timing import SCALE
from support.traffic import Echo

from weir.api.address import parse
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.libbpf import AttachType, XdpMode
from weir.datapath.records import Address, AddressFlag, Backend, BackendKey, Service, ServiceKey
from weir.datapath.settings import Settings

NODE_PORT, PORT, DATAGRAM_PORT = 30080, 8080, 8081
ADDRESSES = {
    4: ("192.0.2.1", "192.0.2.2", "10.0.2.2", "32", "24"),
    6: ("2001:db8::1", "2001:db8::2", "fd00:2::2", "128", "64"),
}
MODES = {"native": (XdpMode.NATIVE,), "generic": (XdpMode.GENERIC,)}
SETTINGS = Settings(node_ipv4=parse("192.0.2.1"), node_ipv6=parse("2001:db8::1"), xdp_services=True)


@pytest.fixture
def pair(netns: Callable[[], NetNs]) -> tuple[NetNs, NetNs]:
    node, outside = netns(), netns()
    veth("uplink", node, "wire", outside)
    node.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    # The path is not the same there and back, which is how a veth pair plays two machines.
    outside.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0", "net.ipv4.conf.wire.rp_filter=0")
    for here, client, backend, whole, bits in ADDRESSES.values():
        nodad = ["nodad"] if ":" in here else []
        node.run("ip", "addr", "add", f"{here}/{bits}", "dev", "uplink", *nodad)
        outside.run("ip", "addr", "add", f"{client}/{bits}", "dev", "wire", *nodad)
        outside.run("ip", "addr", "add", f"{backend}/{whole}", "dev", "wire", *nodad)
        node.run("ip", "route", "add", f"{backend}/{whole}", "via", client)
        node.run("ping", "-c1", "-W2", client)  # resolves the neighbour
    # XDP rewrites checksums that are there; a veth's peer leaves them to be filled in.
    outside.run("ethtool", "-K", "wire", "tx", "off")
    return node, outside


@pytest.fixture
def receiving(pair: tuple[NetNs, NetNs]) -> Iterator[None]:
    """A veth takes what XDP sends it only where XDP is at its other end too."""
    with ExitStack() as stack:
        root, cgroup = stack.enter_context(place())
        with pair[1].entered():
            passing = Datapath.open(root, cgroup, Settings())
            stack.callback(passing.close)
            index = socket.if_nametoindex("wire")
            program = passing.programs["xdp_uplink"]
            link = libbpf.create_link(program, index, AttachType.XDP, "wire", XdpMode.NATIVE)
        stack.callback(Datapath.remove, root)
        stack.callback(os.close, link)
        yield


def forwarded(datapath: Datapath) -> int:
    return sum(v.packets for k, v in datapath.tables.metrics.items() if k.reason == 0)


@pytest.mark.core
@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("receiving")
def test_connections_by_xdp(
    installation: Installation, pair: tuple[NetNs, NetNs], mode: str, family: int
) -> None:
    """TCP with data of many sizes, and datagrams; tc's program is away, so that it is XDP's."""
    node, outside = pair
    here, client, backend, _, _ = ADDRESSES[family]
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    echo = Echo(outside, PORT)
    with node.entered():
        datapath = Datapath.open(installation.root, installation.cgroup, SETTINGS)
        tables = datapath.tables
        tables.addresses.update({parse(here): Address(3, AddressFlag.LOCAL_HOST)})
        for number, (protocol, port) in enumerate(((6, PORT), (17, DATAGRAM_PORT)), start=1):
            tables.backends.update({BackendKey(number, 0): Backend(parse(backend), port)})
            key = ServiceKey(parse(here), NODE_PORT, protocol, 0)
            tables.services.update({key: Service(number, 1, 0, 0, number)})
        datapath.attach_uplink("uplink", MODES[mode])
        # What is passed on to tc gets nowhere: what works is XDP's work.
        (installation.root / "links" / "uplink" / "from_uplink").unlink()
        before = forwarded(datapath)
    try:
        with outside.entered():
            stream = socket.socket(kind, socket.SOCK_STREAM)
            datagrams = socket.socket(kind, socket.SOCK_DGRAM)
            server = socket.socket(kind, socket.SOCK_DGRAM)
        with stream, datagrams, server:
            # Bound: an answer must come from the address that was asked.
            server.bind((backend, DATAGRAM_PORT))
            stream.settimeout(3 * SCALE)
            stream.bind((client, 0))
            stream.connect((here, NODE_PORT))
            for size in (1, 2, 1447, 40_000):
                sent = os.urandom(size)
                stream.sendall(sent)
                got = b""
                while len(got) < size:
                    piece = stream.recv(65536)
                    assert piece
                    got += piece
                assert got == sent
            datagrams.settimeout(3 * SCALE)
            server.settimeout(3 * SCALE)
            datagrams.bind((client, 0))
            datagrams.connect((here, NODE_PORT))
            for size in (0, 1, 999):
                sent = os.urandom(size)
                datagrams.send(sent)
                got, peer = server.recvfrom(65536)
                assert (got, peer[0]) == (sent, here)
                server.sendto(got, peer)
                assert datagrams.recv(65536) == sent
        assert forwarded(datapath) > before + 20
    finally:
        echo.close()
        with node.entered():
            datapath.close()
