# SPDX-License-Identifier: Apache-2.0
"""NodePort and LoadBalancer with XDP on the uplink: the tests of tc alone, again, with XDP before
it; and which packets XDP sends out itself.

    client -- gateway -- uplink (dev ul): xdp_uplink, then from_uplink -- pods of other nodes
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import pytest
from bpf import test_dsr, test_flow_life, test_frontends
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw
from support.datapaths import Datapaths
from support.packet_node import GATEWAY_MAC, PEER_MAC, Book, Node, World
from support.packets import TC_ACT_REDIRECT, XDP_PASS, assert_packet
from support.xdp_node import XdpNode

from weir.api.address import parse
from weir.datapath.records import CtEntry, CtFlag, CtKey, ServiceFlag, SnatEntry, SnatKey, SnatKind
from weir.datapath.settings import Settings

# The same functions, with this module's fixtures.
for _module in (test_frontends, test_flow_life, test_dsr):
    _prefix = _module.__name__.rpartition(".")[2]
    for _name in dir(_module):
        if _name.startswith("test_"):
            globals()[_prefix + _name.removeprefix("test")] = getattr(_module, _name)


# A fixture of its own.
backend = test_flow_life.backend


def made(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[XdpNode]:
    node = XdpNode(datapaths.get(settings), world, net)
    yield node
    node.reader.close()


@pytest.fixture
def node(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[XdpNode]:
    """With an overlay."""
    yield from made(datapaths, dataclasses.replace(settings, xdp_services=True), world, net)


@pytest.fixture
def native(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Iterator[XdpNode]:
    chosen = dataclasses.replace(settings, tunnel=False, xdp_services=True)
    yield from made(datapaths, chosen, world, net)


@pytest.fixture(params=["vxlan", "native"])
def either(
    request: pytest.FixtureRequest,
    datapaths: Datapaths,
    settings: Settings,
    world: World,
    net: Book,
) -> Iterator[XdpNode]:
    chosen = dataclasses.replace(settings, tunnel=request.param == "vxlan", xdp_services=True)
    yield from made(datapaths, chosen, world, net)


NUMBER = {"tcp": 6, "udp": 17}
PROTOCOLS = pytest.mark.parametrize("proto", ["tcp", "udp"])
SENDS = pytest.mark.xdp_sends
SIZES = pytest.mark.parametrize("size", [0, 1, 2, 777, 1400])


def segment(proto: str, sport: int, dport: int, flags: str = "S", size: int = 7) -> Packet:
    payload = Raw(bytes(i & 0xFF for i in range(size)))
    if proto == "tcp":
        return TCP(sport=sport, dport=dport, flags=flags, options=[("MSS", 1400)]) / payload
    return UDP(sport=sport, dport=dport) / payload


def port_of(node: Node) -> int:
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    return port


def without_port(key: SnatKey, entry: SnatEntry, port: int) -> tuple[SnatKey, SnatEntry]:
    """A row without time, and without the port that was chosen at random."""
    key = dataclasses.replace(key, local_port=0) if key.local_port == port else key
    return key, SnatEntry(entry.address, 0 if entry.port == port else entry.port, 0, 0)


def on_wire(layers: Packet) -> bytes:
    return bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)


@SENDS
@SIZES
@PROTOCOLS
def test_xdp_sends_there_and_back(native: XdpNode, net: Book, proto: str, size: int) -> None:
    """Every packet of the flow, with addresses, ports, hop limit and both checksums right."""
    native.service(NUMBER[proto], 80, (net.r, 8080))
    with native.expect(sent=4):
        for flags, back_flags in (("S", "SA"), ("PA", "PA")):
            sent = net.ip(net.world, net.vip, **net.ttl(9)) / segment(proto, 4000, 80, flags, size)
            out = native.arrives(sent)
            assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
            port = port_of(native)
            there = net.ip(net.node, net.r, **net.ttl(8))
            assert_packet(out.packet, on_wire(there / segment(proto, port, 8080, flags, size)))
            reply = segment(proto, 8080, port, back_flags, size)
            back = native.arrives(net.ip(net.r, net.node) / reply)
            here = net.ip(net.vip, net.world, **net.ttl(63))
            expected = on_wire(here / segment(proto, 80, 4000, back_flags, size))
            assert_packet(back.packet, expected)
    forwarded = [v.packets for k, v in native.tables.metrics.items() if k.reason == 0]
    assert sum(forwarded) >= 4


@SENDS
def test_checksum_of_zero(native: XdpNode) -> None:
    """IPv4's UDP may go without: then it stays so. One that comes out as zero is all ones."""
    net = native.book
    native.service(17, 80, (net.r, 8080))
    if net.family == 4:
        sent = net.ip(net.world, net.vip) / UDP(sport=1, dport=80, chksum=0) / Raw(b"x")
        out = native.arrives(sent)
        there = net.ip(net.node, net.r, **net.ttl(63))
        bare = UDP(sport=port_of(native), dport=8080, chksum=0) / Raw(b"x")
        assert_packet(out.packet, on_wire(there / bare))
        native.tables.snat.delete([k for k, _ in native.tables.snat.items()])
    native.arrives(net.ip(net.world, net.vip) / UDP(sport=2, dport=80) / Raw(b"\0\0"))
    port = next(e.port for k, e in native.tables.snat.items() if k.kind == SnatKind.FORWARD)
    there = net.ip(net.node, net.r, **net.ttl(63))
    plain = bytes(there / UDP(sport=port, dport=8080) / Raw(b"\0\0"))
    [at] = [len(plain) - 4]
    word = int.from_bytes(plain[at : at + 2], "big").to_bytes(2, "big")
    # A payload equal to the checksum of zeroes makes the sum come out as zero.
    sent = net.ip(net.world, net.vip) / UDP(sport=2, dport=80) / Raw(word)
    with native.expect(sent=1):
        out = native.arrives(sent)
    assert out.packet[-4:-2] == b"\xff\xff"
    assert_packet(out.packet, on_wire(there / UDP(sport=port, dport=8080) / Raw(word)))


@SENDS
@PROTOCOLS
def test_entries_are_those_of_tc(
    native: XdpNode, datapaths: Datapaths, settings: Settings, world: World, net: Book, proto: str
) -> None:
    """tc alone and XDP make the same rows of the same packets; each goes on with the other's."""
    native.service(NUMBER[proto], 80, (net.r, 8080))
    flows: list[dict[CtKey, CtEntry]] = []
    translations: list[set[tuple[SnatKey, SnatEntry]]] = []
    for xdp in (True, False):
        native.tables.ct.delete([key for key, _ in native.tables.ct.items()])
        native.tables.snat.delete([key for key, _ in native.tables.snat.items()])
        arrives = native.arrives if xdp else functools.partial(Node.arrives, native)
        with native.expect(sent=2 * xdp):
            arrives(net.ip(net.world, net.vip) / segment(proto, 4000, 80))
            port = port_of(native)
            arrives(net.ip(net.r, net.node) / segment(proto, 8080, port, "SA"))
        flows.append({k: dataclasses.replace(e, expires=0) for k, e in native.flows().items()})
        translations.append({without_port(k, e, port) for k, e in native.tables.snat.items()})
    assert flows[0] == flows[1]
    assert len(flows[0]) == 2
    assert translations[0] == translations[1]
    # The flow that tc opened goes on by XDP, under the same port.
    with native.expect(sent=1):
        out = native.arrives(net.ip(net.world, net.vip) / segment(proto, 4000, 80, "PA"))
    there = net.ip(net.node, net.r, **net.ttl(63)) / segment(proto, port, 8080, "PA")
    assert_packet(out.packet, on_wire(there))


@pytest.mark.parametrize(
    "what",
    [
        "local backend", "no backend", "no service", "options", "last hop", "too big",
        "fragment", "spoofed", "overlay", "cut short",
    ],
)  # fmt: skip
def test_what_xdp_leaves_to_tc(native: XdpNode, node: XdpNode, net: Book, what: str) -> None:
    """Unchanged, and with tc's answer: that is tested with tc."""
    tested = node if what == "overlay" else native
    tested.service(17, 80, (net.b if what == "local backend" else net.r, 8080))
    tested.service(17, 81, number=2)
    udp = UDP(sport=4000, dport={"no backend": 81, "no service": 82}.get(what, 80))
    size = 1500 if what == "too big" else 10
    source = net.node if what == "spoofed" else net.world
    fields = net.ttl(1) if what == "last hop" else {}
    ip = net.ip(source, net.vip, **fields)
    if what == "options":
        if net.family == 4:
            ip.ihl, ip.proto = 6, 17
            ip = ip / Raw(bytes(udp)[:4])  # where the ports would be without
        else:
            ip = ip / IPv6ExtHdrDestOpt()
    if what == "cut short":
        setattr(ip, "len" if net.family == 4 else "plen", 200)
    if what == "fragment":
        if net.family == 4:
            ip.flags = "MF"
        else:
            ip = ip / IPv6ExtHdrFragment(m=1)
    with tested.expect(sent=0, passed=1):
        tested.arrives(ip / udp / Raw(b"x" * size))


@SENDS
def test_direct_server_return(native: XdpNode, net: Book) -> None:
    """The first packet of a connection is tc's, which writes the frontend into it. The others are
    XDP's: the pod's node answers, so they keep the client's address."""
    native.service(6, 80, (net.r, 8080), flags=ServiceFlag.DSR)
    with native.expect(sent=0, passed=1):
        native.arrives(net.ip(net.world, net.vip) / segment("tcp", 4000, 80))
    with native.expect(sent=1):
        out = native.arrives(net.ip(net.world, net.vip) / segment("tcp", 4000, 80, "PA"))
    there = net.ip(net.world, net.r, **net.ttl(63))
    assert_packet(out.packet, on_wire(there / segment("tcp", 4000, 8080, "PA")))
    assert list(native.tables.snat.items()) == []


@pytest.mark.parametrize("receiver", ["pod", "node", "client of no service", "client"])
@SENDS
def test_replies_for_others(native: XdpNode, net: Book, receiver: str) -> None:
    """An answer to the node's address may be a masqueraded pod's, or the node's own."""
    to = {"pod": net.a, "node": net.node}.get(receiver, net.world)
    late = 2**31
    key = SnatKey(parse(net.r), parse(net.node), 8080, 61000, 6, SnatKind.REVERSE)
    native.tables.snat.update({key: SnatEntry(parse(to), 4000, 0, late)})
    low, high = sorted([(parse(net.r), 8080), (parse(to), 4000)])
    flags = CtFlag.REPLIED | (0 if receiver == "client of no service" else CtFlag.REV_NAT)
    if low[0] == parse(to):
        flags |= CtFlag.ORIGIN_IS_LOW
    flow = CtKey(low[0], high[0], low[1], high[1], 6)
    native.tables.ct.update({flow: CtEntry(late, 0, flags, 1, parse(net.vip), 80)})
    sent = receiver == "client"
    with native.expect(sent=sent, passed=not sent):
        native.arrives(net.ip(net.r, net.node) / TCP(sport=8080, dport=61000, flags="A"))


@SENDS
def test_a_backend_behind_another_device_is_tcs(native: XdpNode, net: Book) -> None:
    native.service(17, 80, (net.world2, 8080))
    route = [f"-{net.family}", "route", "replace", net.world2, "dev", "ov"]
    neighbour = [f"-{net.family}", "neigh", "replace", net.world2, "lladdr", PEER_MAC, "dev", "ov"]
    sent = net.ip(net.world, net.vip) / UDP(sport=1, dport=80)
    with native.expect(sent=1):
        native.arrives(sent)
    native.world.ns.run("ip", *route)
    native.world.ns.run("ip", *neighbour)
    try:
        with native.expect(sent=0, passed=1):
            assert native.arrives(sent).code == TC_ACT_REDIRECT
    finally:
        native.world.ns.run("ip", f"-{net.family}", "route", "del", net.world2, "dev", "ov")


def test_other_addresses_of_the_host_are_not_touched(native: XdpNode, net: Book) -> None:
    """Replies that are nobody's, connections that are the host's own."""
    native.service(6, 80, (net.r, 8080))
    with native.expect(sent=0, passed=3):
        native.arrives(net.ip(net.world, net.node) / TCP(sport=443, dport=61001, flags="SA"))
        native.arrives(net.ip(net.world, net.node) / TCP(sport=443, dport=22, flags="A"))
        native.arrives(net.ip(net.world, net.a) / TCP(sport=443, dport=22, flags="A"))
    assert native.flows() == {} or all(not e.service for e in native.flows().values())


def test_tagged_frames_are_tcs(native: XdpNode, net: Book) -> None:
    native.service(17, 80, (net.r, 8080))
    frame = Ether(src=PEER_MAC, dst=GATEWAY_MAC) / Dot1Q(vlan=5)
    out = native.run_xdp("ul", frame / net.ip(net.world, net.vip) / UDP(sport=1, dport=80))
    assert out.code == XDP_PASS
    assert native.flows() == {}


@SENDS
def test_a_listener_for_new_flows_hears_of_them(native: XdpNode, net: Book) -> None:
    """New flows are tc's while somebody listens: it tells of them. Established ones are XDP's."""
    native.service(17, 80, (net.r, 8080))
    native.datapath.set_event_mask(4)
    sent = net.ip(net.world, net.vip) / UDP(sport=1, dport=80)
    with native.expect(sent=1, passed=1):
        native.arrives(sent)
        native.arrives(sent)
    native.datapath.set_event_mask(0)


def test_switched_off(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> None:
    chosen = dataclasses.replace(settings, tunnel=False, masquerade=False)
    for node in made(datapaths, chosen, world, net):
        node.service(17, 80, (net.r, 8080))
        with node.expect(sent=0, passed=1):
            node.arrives(net.ip(net.world, net.vip) / UDP(sport=1, dport=80))
