# SPDX-License-Identifier: Apache-2.0
"""Packets of those who mean harm, or who come too late: what must not reach anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from support.datapaths import Datapaths
from support.packet_node import GATEWAY_MAC, PEER_MAC, Book, Node, World
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, XDP_PASS

from weir.api.address import parse
from weir.datapath.records import DropReason, ServiceFlag, SnatKind
from weir.datapath.settings import Settings


@pytest.fixture(params=[True, False], ids=["vxlan", "native"])
def tunnel(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.fixture
def either(
    tunnel: bool, datapaths: Datapaths, settings: Settings, world: World, net: Book
) -> Iterator[Node]:
    chosen = dataclasses.replace(settings, tunnel=tunnel, xdp_services=True)
    made = Node(datapaths.get(chosen), world, net)
    yield made
    made.reader.close()


@pytest.mark.parametrize("backend", ["pod here", "elsewhere"])
def test_a_loopback_frontend_is_for_sockets_alone(either: Node, net: Book, backend: str) -> None:
    """A host port of 127.0.0.1 is none for neighbours and pods that put it into a packet."""
    loopback = "127.0.0.1" if net.family == 4 else "::1"
    either.service(6, 80, (net.b if backend == "pod here" else net.r, 8080), at=loopback)
    segment = TCP(sport=4000, dport=80, flags="S")
    asks = Ether(src=PEER_MAC, dst=GATEWAY_MAC) / net.ip(net.world, loopback) / segment
    out = either.run("from_uplink", "ul", asks)
    assert (out.code, out.packet) == (TC_ACT_OK, bytes(asks))
    either.datapath.set_event_mask(0)
    out = either.run_xdp("ul", asks)
    assert (out.code, out.packet) == (XDP_PASS, bytes(asks))
    out = either.from_pod("a", net.ip(net.a, loopback) / segment)
    assert out.drops == {DropReason.NOT_UNICAST: 1}
    assert either.flows() == {}


UNROUTED = {
    4: ["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "169.254.7.7"],
    6: ["::1", "::", "ff02::1", "ff0e::1", "fe80::7"],
}


@pytest.mark.parametrize("target", ["pod", "backend here", "backend elsewhere", "no backend"])
def test_sources_that_are_never_routed_reach_no_backend(
    either: Node, net: Book, target: str
) -> None:
    """Answers could go nowhere, or to the wrong one: to loopback, that is the backend itself."""
    if target != "pod":
        backends = {"backend here": [(net.b, 8080)], "backend elsewhere": [(net.r, 8080)]}
        either.service(17, 80, *backends.get(target, []), at=net.node)
    to, port = (net.b, 8080) if target == "pod" else (net.node, 80)
    for source in UNROUTED[net.family]:
        asks = net.ip(source, to) / UDP(sport=4000, dport=port)
        assert either.arrives(asks).drops == {DropReason.SPOOFED_SOURCE: 1}, source
        either.datapath.set_event_mask(0)
        frame = Ether(src=PEER_MAC, dst=GATEWAY_MAC) / asks
        out = either.run_xdp("ul", frame)
        assert (out.code, out.packet) == (XDP_PASS, bytes(frame)), source
    assert either.flows() == {}


def test_sources_that_are_never_routed_reach_the_host(either: Node, net: Book) -> None:
    """Neighbour discovery and DHCP, for two, come from such."""
    for source in UNROUTED[net.family]:
        out = either.arrives(net.ip(source, net.node) / UDP(sport=4000, dport=68))
        assert (out.code, out.drops) == (TC_ACT_OK, {}), source


def test_routers_may_have_such_addresses(node: Node, net: Book) -> None:
    """Those of a VPN's tunnel often do, and tell what fits into it."""
    node.from_pod("b", net.ip(net.b, net.world) / UDP(sport=4000, dport=53, chksum=1))
    quoted = net.ip(net.b, net.world) / UDP(sport=4000, dport=53, chksum=1)
    error = ICMP(type=3, code=4, nexthopmtu=1300) if net.family == 4 else ICMPv6PacketTooBig()
    router = UNROUTED[net.family][-1]
    out = node.arrives(net.ip(router, net.b) / error / Raw(bytes(quoted)))
    assert (out.code, out.drops, out.frame[1].src) == (TC_ACT_REDIRECT, {}, router)


@pytest.mark.parametrize("who", ["node", "pod", "new pod"])
def test_clients_inside_get_no_direct_return(
    either: Node, tunnel: bool, net: Book, who: str
) -> None:
    """The backend may be on the client's own node, which takes its own address for a lie."""
    either.service(6, 80, (net.r, 8080), flags=ServiceFlag.DSR, at=net.node)
    client = {"node": net.node2, "pod": net.r, "new pod": net.unknown}[who]
    out = either.arrives(net.ip(client, net.node) / TCP(sport=4000, dport=80, flags="S"))
    if tunnel and who != "node":
        assert out.drops == {DropReason.SPOOFED_SOURCE: 1}
        return
    assert (out.code, out.drops, out.frame[1].src) == (TC_ACT_REDIRECT, {}, net.node)


def test_an_answer_for_a_pod_that_is_gone(either: Node, net: Book) -> None:
    """Not back to the network, for which the address may be this node's."""
    segment = TCP(sport=4000, dport=80, flags="S")
    either.from_pod("a", net.ip(net.a, net.world) / segment)
    assert either.leaves(net.ip(net.a, net.world) / segment).code == TC_ACT_OK
    [port] = {e.port for k, e in either.tables.snat.items() if k.kind == SnatKind.FORWARD}
    either.tables.endpoints.delete([parse(net.a)])
    out = either.arrives(net.ip(net.world, net.node) / TCP(sport=80, dport=port, flags="SA"))
    assert out.drops == {DropReason.NO_ENDPOINT: 1}


def test_answers_do_not_look_like_the_overlay(
    datapaths: Datapaths, settings: Settings, world: World, net: Book
) -> None:
    """Its port is not given away: what comes there is the device's."""
    chosen = dataclasses.replace(settings, overlay_port=settings.snat_port_first)
    node = Node(datapaths.get(chosen), world, net)
    for sport in range(4000, 4003):
        assert node.leaves(net.ip(net.a, net.world) / UDP(sport=sport, dport=53)).drops == {}
    out = node.leaves(net.ip(net.a, net.world) / UDP(sport=4003, dport=53))
    taken = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    node.reader.close()
    assert chosen.overlay_port not in taken
    assert out.drops == {DropReason.SNAT_NO_PORT: 1}


def test_a_lie_leaves_nothing_behind(node: Node, net: Book) -> None:
    """Else who lies about its source could choose a pod's backend, or have it refused."""
    node.service(6, 80, (net.r, 8080), flags=ServiceFlag.DSR, at=net.node)
    node.service(6, 81, number=2, at=net.node)
    for port in (80, 81):
        out = node.arrives(net.ip(net.unknown, net.node) / TCP(sport=1, dport=port, flags="S"))
        assert out.drops == {DropReason.SPOOFED_SOURCE: 1}
    assert node.flows() == {}


def test_a_backends_answers_come_by_the_overlay_alone(node: Node, net: Book) -> None:
    """Else anybody beside the nodes could answer a client in a pod's name."""
    node.service(6, 80, (net.r, 8080))
    node.arrives(net.ip(net.world, net.vip) / TCP(sport=4000, dport=80, flags="S"))
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    answer = net.ip(net.r, net.node) / TCP(sport=8080, dport=port, flags="A")
    assert node.arrives(answer).drops == {DropReason.SPOOFED_SOURCE: 1}
    # What is too big for it comes as the pod's node routes, where routers may cut.
    out = node.arrives(answer / Raw(bytes(1400)))
    assert out.drops == ({} if net.family == 4 else {DropReason.SPOOFED_SOURCE: 1})


def test_from_the_frontend_is_not_to_it(either: Node, net: Book) -> None:
    """What claims to be a service's answer to this node is not sent to its backend."""
    either.service(6, 80, (net.b, 8080))
    asked = either.leaves(net.ip(net.node, net.vip) / TCP(sport=4000, dport=80, flags="S"))
    assert asked.frame[1].dst == net.b
    out = either.arrives(net.ip(net.vip, net.node) / TCP(sport=80, dport=4000, flags="A"))
    assert (out.code, out.frame[1].dst) == (TC_ACT_OK, net.node)
