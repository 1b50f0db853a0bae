# SPDX-License-Identifier: Apache-2.0
"""Services for clients outside, by the uplink: to backends here and elsewhere, and back."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6TimeExceeded
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support.datapaths import Datapaths
from support.packet_node import GATEWAY_MAC, HOST_MACS, PEER_MAC, POD_MACS, Book, Node, World
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet

from weir.datapath.records import (
    ClassNumber,
    CtFlag,
    DropReason,
    Isolation,
    RuntimeFeature,
    ServiceFlag,
    SnatKind,
)
from weir.datapath.settings import Settings

PROTOCOLS = pytest.mark.parametrize("proto", ["tcp", "udp"])
NUMBER = {"tcp": 6, "udp": 17}
CLOSED = Isolation(9, 0)


def to_pod(pod: str, layers: Packet) -> bytes:
    return bytes(Ether(dst=POD_MACS[pod], src=HOST_MACS[pod]) / layers)


def onward(layers: Packet) -> bytes:
    """What came from outside goes on: redirection writes new MAC addresses later."""
    return bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)


def answered(layers: Packet) -> bytes:
    return bytes(Ether(src=GATEWAY_MAC, dst=PEER_MAC) / layers)


def segment(proto: str, sport: int, dport: int, flags: str = "S") -> Packet:
    if proto == "tcp":
        return TCP(sport=sport, dport=dport, flags=flags) / Raw(b"payload")
    return UDP(sport=sport, dport=dport) / Raw(b"payload")


def snat_port(node: Node) -> int:
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    return port


@pytest.fixture
def native(datapaths: Datapaths, settings: Settings, world: World, net: Book) -> Any:
    """The node without an overlay: other nodes' pods are reached as the host routes."""
    chosen = dataclasses.replace(settings, tunnel=False, masquerade=False)
    made = Node(datapaths.get(chosen), world, net)
    yield made
    made.reader.close()


@PROTOCOLS
def test_local_backend(node: Node, net: Book, proto: str) -> None:
    """The pod sees the client's own address; its answers come from the frontend."""
    node.service(NUMBER[proto], 80, (net.b, 8080))
    sent = net.ip(net.world, net.vip) / segment(proto, 4000, 80)
    out = node.arrives(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("b", net.ip(net.world, net.b) / segment(proto, 4000, 8080)))
    node.isolate(b_egress=CLOSED)
    answer = node.from_pod("b", net.ip(net.b, net.world) / segment(proto, 8080, 4000, "SA"))
    assert (answer.code, answer.drops) == (TC_ACT_REDIRECT, {})
    expected = net.ip(net.vip, net.world, **net.ttl(63)) / segment(proto, 80, 4000, "SA")
    assert answer.packet[14:] == bytes(expected)
    leaves = node.leaves(expected)
    assert (leaves.code, leaves.packet[14:]) == (TC_ACT_OK, bytes(expected))
    assert list(node.tables.snat.items()) == []


def test_policy_is_about_the_client(node: Node, net: Book) -> None:
    node.service(6, 80, (net.b, 8080))
    node.isolate(b_ingress=CLOSED)
    sent = net.ip(net.world, net.vip) / TCP(sport=1, dport=80, flags="S")
    assert node.arrives(sent).drops == {DropReason.POLICY_INGRESS: 1}
    row = node.allow(1, ClassNumber.WORLD, proto=6, port=8080, bits=16)
    node.isolate(b_ingress=row)
    assert node.arrives(sent).drops == {}


@PROTOCOLS
def test_remote_backend(native: Node, net: Book, proto: str) -> None:
    """Under this node's address to the pod elsewhere, whose answer comes from the frontend."""
    node = native
    node.service(NUMBER[proto], 80, (net.r, 8080))
    sent = net.ip(net.world, net.vip) / segment(proto, 4000, 80)
    out = node.arrives(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    port = snat_port(node)
    there = net.ip(net.node, net.r, **net.ttl(63)) / segment(proto, port, 8080)
    assert_packet(out.packet, onward(there))
    flags = {e.flags & (CtFlag.SERVICE | CtFlag.SNAT | CtFlag.REV_NAT | CtFlag.UNJUDGED)
             for e in node.flows().values()}  # fmt: skip
    assert flags == {CtFlag.SERVICE | CtFlag.SNAT, CtFlag.REV_NAT | CtFlag.UNJUDGED}
    back = node.arrives(net.ip(net.r, net.node) / segment(proto, 8080, port, "SA"))
    assert (back.code, back.drops) == (TC_ACT_REDIRECT, {})
    here = net.ip(net.vip, net.world, **net.ttl(63)) / segment(proto, 80, 4000, "SA")
    assert_packet(back.packet, onward(here))
    assert node.leaves(here).packet[14:] == bytes(here)
    again = node.arrives(sent)
    assert_packet(again.packet, out.packet)


def test_remote_backend_by_the_overlay(node: Node, net: Book) -> None:
    node.service(6, 80, (net.r, 8080))
    out = node.arrives(net.ip(net.world, net.vip) / segment("tcp", 4000, 80))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    there = net.ip(net.node, net.r, **net.ttl(63)) / segment("tcp", snat_port(node), 8080)
    assert_packet(out.packet, onward(there))


@pytest.mark.parametrize("where", ["another node", "outside"])
def test_backend_that_is_no_pod(node: Node, net: Book, where: str) -> None:
    backend = net.node2 if where == "another node" else net.world2
    node.service(6, 80, (backend, 8080))
    out = node.arrives(net.ip(net.world, net.node, **net.ttl(9)) / segment("tcp", 4000, 80))
    assert (out.code, out.drops, list(node.tables.snat.items())) == (TC_ACT_OK, {}, [])
    node.service(6, 80, (backend, 8080), at=net.node)
    out = node.arrives(net.ip(net.world, net.node, **net.ttl(9)) / segment("tcp", 4000, 80))
    port = snat_port(node)
    there = net.ip(net.node, backend, **net.ttl(8)) / segment("tcp", port, 8080)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, onward(there))
    back = node.arrives(net.ip(backend, net.node) / segment("tcp", 8080, port, "SA"))
    here = net.ip(net.node, net.world, **net.ttl(63)) / segment("tcp", 80, 4000, "SA")
    assert_packet(back.packet, onward(here))


@PROTOCOLS
def test_backend_on_this_node_itself(node: Node, net: Book, proto: str) -> None:
    """Up the stack; the socket's answers get their source on the way out, once services are told
    to need it."""
    node.service(NUMBER[proto], 80, (net.node, 8080))
    out = node.arrives(net.ip(net.world, net.vip) / segment(proto, 4000, 80))
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    assert_packet(out.packet, onward(net.ip(net.world, net.node) / segment(proto, 4000, 8080)))
    answer = net.ip(net.node, net.world) / segment(proto, 8080, 4000, "SA")
    assert node.leaves(answer).packet[14:] == bytes(answer)
    node.datapath.set_features(RuntimeFeature.HOST_BACKENDS)
    expected = net.ip(net.vip, net.world) / segment(proto, 80, 4000, "SA")
    left = node.leaves(answer)
    assert (left.code, left.drops, left.packet[14:]) == (TC_ACT_OK, {}, bytes(expected))
    other = net.ip(net.node, net.world) / segment(proto, 8080, 4001, "SA")
    assert node.leaves(other).packet[14:] == bytes(other)


@PROTOCOLS
def test_a_port_that_asked_a_frontend_asks_the_pod_itself(
    node: Node, net: Book, proto: str
) -> None:
    """As clients do whose sockets choose the backend: answers come from what was asked last."""
    node.service(NUMBER[proto], 80, (net.b, 8080), at=net.node)
    answer = net.ip(net.b, net.world) / segment(proto, 8080, 4000, "SA")

    def answers_from() -> tuple[str, int]:
        frame = node.from_pod("b", answer).frame
        return frame[1].src, frame.sport

    node.arrives(net.ip(net.world, net.node) / segment(proto, 4000, 80))
    assert answers_from() == (net.node, 80)
    node.arrives(net.ip(net.world, net.b) / segment(proto, 4000, 8080))
    assert answers_from() == (net.b, 8080)
    node.arrives(net.ip(net.world, net.node) / segment(proto, 4000, 80))
    assert answers_from() == (net.node, 80)
    if proto == "tcp":  # what opens nothing takes nothing over
        node.arrives(net.ip(net.world, net.b) / segment(proto, 4000, 8080, "A"))
        assert answers_from() == (net.node, 80)
    node.isolate(b_ingress=CLOSED)
    out = node.arrives(net.ip(net.world, net.b) / segment(proto, 4000, 8080))
    assert out.drops == {DropReason.POLICY_INGRESS: 1}


@PROTOCOLS
def test_a_port_that_asked_a_frontend_asks_the_host_itself(
    node: Node, net: Book, proto: str
) -> None:
    node.service(NUMBER[proto], 80, (net.node, 8080))
    node.datapath.set_features(RuntimeFeature.HOST_BACKENDS)
    answer = net.ip(net.node, net.world) / segment(proto, 8080, 4000, "SA")
    node.arrives(net.ip(net.world, net.vip) / segment(proto, 4000, 80))
    assert node.leaves(answer).frame[1].src == net.vip
    out = node.arrives(net.ip(net.world, net.node) / segment(proto, 4000, 8080))
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    assert node.leaves(answer).packet[14:] == bytes(answer)
    node.arrives(net.ip(net.world, net.vip) / segment(proto, 4000, 80))
    assert node.leaves(answer).frame[1].src == net.vip


@pytest.mark.parametrize("flags", ["S", "A"])
def test_no_backend_is_refused_on_the_wire(node: Node, net: Book, flags: str) -> None:
    node.service(6, 80)
    fields = {"id": 0} if net.family == 4 else {}
    tcp = TCP(sport=4000, dport=80, flags=flags, seq=1000, ack=77)
    out = node.arrives(net.ip(net.world, net.vip, **fields) / tcp)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    reset = (
        TCP(sport=80, dport=4000, flags="RA", seq=0, ack=1001, window=0)
        if flags == "S"
        else TCP(sport=80, dport=4000, flags="R", seq=77, ack=0, window=0)
    )
    assert_packet(out.packet, answered(net.ip(net.vip, net.world, **fields) / reset))


def unreachable(net: Book, source: str, destination: str, quoted: Packet) -> Packet:
    """As the kernel would; the quoted part is not longer than ours makes it."""
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    fields = {"id": 0} if net.family == 4 else {}
    length = 28 if net.family == 4 else 48
    return net.ip(source, destination, **fields) / error / Raw(bytes(quoted)[:length])


def test_no_backend_is_unreachable_for_datagrams(node: Node, net: Book) -> None:
    node.service(17, 53)
    sent = net.ip(net.world, net.vip) / UDP(sport=4000, dport=53) / Raw(b"x" * 50)
    out = node.arrives(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    assert_packet(out.packet, answered(unreachable(net, net.vip, net.world, sent)))


def test_no_local_backend_is_silent(node: Node, net: Book) -> None:
    node.service(6, 80, flags=ServiceFlag.LOCAL)
    sent = net.ip(net.world, net.vip) / TCP(sport=1, dport=80, flags="S")
    out = node.arrives(sent)
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.NO_LOCAL_BACKEND: 1})
    [event] = node.reader.drain()
    assert event.reason == DropReason.NO_LOCAL_BACKEND


def test_scopes(native: Node, net: Book) -> None:
    """With policy Local, what comes by the wire has a row of its own, other nodes' clients too:
    upstream's suite wants them to find no endpoint where there is none."""
    node = native
    node.service(6, 80, (net.b, 1), flags=ServiceFlag.EXTERNAL_ROW)
    node.service(6, 80, (net.b, 2), scope=1, number=2, flags=ServiceFlag.LOCAL)
    seen = {
        name: node.arrives(
            net.ip(getattr(net, name), net.vip) / TCP(sport=1, dport=80, flags="S")
        ).frame.dport
        for name in ("world", "r", "unknown", "node2")
    }
    assert set(seen.values()) == {2}, seen
    inside = node.from_pod("a", net.ip(net.a, net.vip) / TCP(sport=1, dport=80, flags="S"))
    assert inside.frame.dport == 1


def test_a_pods_source_comes_by_the_overlay_alone(node: Node, net: Book) -> None:
    node.service(6, 80, (net.b, 8080), at=net.node)
    for source in (net.r, net.unknown):
        out = node.arrives(net.ip(source, net.node) / TCP(sport=1, dport=80, flags="S"))
        assert out.drops == {DropReason.SPOOFED_SOURCE: 1}


def test_connections_outlive_their_service(node: Node, net: Book) -> None:
    node.service(6, 80, (net.b, 8080))
    node.arrives(net.ip(net.world, net.vip) / TCP(sport=1, dport=80, flags="S"))
    node.tables.services.delete([key for key, _ in node.tables.services.items()])
    going_on = node.arrives(net.ip(net.world, net.vip) / TCP(sport=1, dport=80, flags="A"))
    assert going_on.frame.dport == 8080
    new = node.arrives(net.ip(net.world, net.vip) / TCP(sport=2, dport=80, flags="S"))
    assert (new.code, new.frame.dport) == (TC_ACT_OK, 80)


def test_too_big_for_the_way_to_the_backend(node: Node, net: Book) -> None:
    """The client is told the size, about the packet as it sent it."""
    node.service(17, 53, (net.r, 5353))
    header = 28 if net.family == 4 else 48
    flags = {"flags": "DF"} if net.family == 4 else {}

    def packet(size: int) -> Packet:
        payload = UDP(sport=4000, dport=53) / Raw(b"x" * (size - header))
        return net.ip(net.world, net.vip, **flags) / payload

    assert node.arrives(packet(1400)).drops == {}
    sent = packet(1401)
    out = node.arrives(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.TOO_BIG: 1})
    if net.family == 4:
        error = ICMP(type=3, code=4, nexthopmtu=1400)
        answer = net.ip(net.node, net.world, id=0) / error / Raw(bytes(sent)[:28])
    else:
        error = ICMPv6PacketTooBig(mtu=1400)
        answer = net.ip(net.node, net.world) / error / Raw(bytes(sent)[:48])
    assert_packet(out.packet, answered(answer))


def test_hop_limit(native: Node, net: Book) -> None:
    node = native
    node.service(17, 53, (net.r, 5353))
    sent = net.ip(net.world, net.vip, **net.ttl(1)) / UDP(sport=4000, dport=53)
    out = node.arrives(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.TTL_EXCEEDED: 1})
    if net.family == 4:
        answer = net.ip(net.node, net.world, id=0) / ICMP(type=11) / Raw(bytes(sent)[:28])
    else:
        answer = net.ip(net.node, net.world) / ICMPv6TimeExceeded() / Raw(bytes(sent)[:48])
    assert_packet(out.packet, answered(answer))


def error(net: Book) -> Packet:
    return ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)


def datagram(net: Book, source: str, sport: int, target: str, dport: int, **fields: int) -> Packet:
    udp = UDP(sport=sport, dport=dport, chksum=0x1234)
    return net.ip(source, target, **fields) / udp / Raw(b"q")


@pytest.mark.parametrize("by", ["backend", "router"])
def test_error_from_the_backends_side(native: Node, net: Book, by: str) -> None:
    node = native
    node.service(17, 53, (net.r, 5353))
    node.arrives(datagram(net, net.world, 4000, net.vip, 53))
    seen = datagram(net, net.node, snat_port(node), net.r, 5353)
    source = net.r if by == "backend" else net.world2
    out = node.arrives(net.ip(source, net.node) / error(net) / Raw(bytes(seen)))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    sent = datagram(net, net.world, 4000, net.vip, 53)
    expected = net.ip(net.vip if by == "backend" else source, net.world, **net.ttl(63))
    assert_packet(out.packet, onward(expected / error(net) / Raw(bytes(sent))))


@pytest.mark.parametrize("by", ["client", "router"])
@pytest.mark.parametrize("backend", ["here", "elsewhere"])
def test_error_from_the_clients_side(native: Node, net: Book, by: str, backend: str) -> None:
    node = native
    target = net.b if backend == "here" else net.r
    node.service(17, 53, (target, 5353))
    node.arrives(datagram(net, net.world, 4000, net.vip, 53))
    seen = datagram(net, net.vip, 53, net.world, 4000)
    source = net.world if by == "client" else net.world2
    out = node.arrives(net.ip(source, net.vip) / error(net) / Raw(bytes(seen)))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    if backend == "here":
        sent = datagram(net, net.b, 5353, net.world, 4000)
        expected = to_pod("b", net.ip(source, net.b) / error(net) / Raw(bytes(sent)))
    else:
        sent = datagram(net, net.r, 5353, net.node, snat_port(node))
        outer = net.ip(net.node if by == "client" else source, net.r, **net.ttl(63))
        expected = onward(outer / error(net) / Raw(bytes(sent)))
    assert_packet(out.packet, expected)


def test_error_about_no_flow_is_the_hosts(node: Node, net: Book) -> None:
    node.service(17, 53, (net.b, 5353))
    seen = datagram(net, net.vip, 53, net.world, 4000)
    out = node.arrives(net.ip(net.world, net.vip) / error(net) / Raw(bytes(seen)))
    assert (out.code, out.drops) == (TC_ACT_OK, {})


def test_snat_runs_out_of_ports(native: Node, net: Book) -> None:
    """Four ports a backend here: the fifth client is refused one, counted, and not mixed up."""
    node = native
    node.service(17, 53, (net.r, 5353))
    ports = {
        node.arrives(datagram(net, net.world, 4000 + n, net.vip, 53)).frame.sport for n in range(4)
    }
    assert ports == {61000, 61001, 61002, 61003}
    out = node.arrives(datagram(net, net.world, 5000, net.vip, 53))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.SNAT_NO_PORT: 1})


def test_ended_connections_give_their_port(native: Node, net: Book) -> None:
    """With all four ports taken, a fifth client gets that of the one connection that has ended,
    and never that of one opened anew since."""
    node = native
    node.service(6, 80, (net.r, 8080))

    def asks(sport: int, flags: str) -> int:
        return int(
            node.arrives(net.ip(net.world, net.vip) / segment("tcp", sport, 80, flags)).frame.sport
        )

    def answers(port: int, flags: str) -> None:
        node.arrives(net.ip(net.r, net.node) / segment("tcp", 8080, port, flags))

    ports = {sport: asks(sport, "S") for sport in range(4000, 4004)}
    for sport, port in ports.items():
        answers(port, "SA")
        asks(sport, "A")
    for sport in (4001, 4002):
        asks(sport, "FA")
        answers(ports[sport], "FA")
        asks(sport, "A")
    assert asks(4002, "S") == ports[4002]
    assert asks(5000, "S") == ports[4001]
    out = node.arrives(net.ip(net.world, net.vip) / segment("tcp", 5001, 80))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.SNAT_NO_PORT: 1})
    back = node.arrives(net.ip(net.r, net.node) / segment("tcp", 8080, ports[4001], "SA"))
    assert back.frame.dport == 5000


@PROTOCOLS
@pytest.mark.parametrize("backend", ["here", "elsewhere"])
def test_one_client_port_to_two_frontends_of_a_backend(
    native: Node, net: Book, proto: str, backend: str
) -> None:
    """Answers come from the one that was asked last: the other's flow is over, if not forgotten."""
    node, target = native, net.b if backend == "here" else net.r
    for number, port in enumerate((80, 81), 1):
        node.service(NUMBER[proto], port, (target, 8080), number=number)
    for port in (80, 81, 80):
        asked = node.arrives(net.ip(net.world, net.vip) / segment(proto, 4000, port))
        assert asked.drops == {}
        answer = segment(proto, 8080, asked.frame.sport, "SA")
        if backend == "here":
            out = node.from_pod("b", net.ip(net.b, net.world) / answer)
        else:
            out = node.arrives(net.ip(net.r, net.node) / answer)
        assert (out.drops, out.frame.sport, out.frame.dport) == ({}, port, 4000)


def test_a_question_keeps_its_port_for_less_than_a_stream(native: Node, net: Book) -> None:
    node = native
    node.service(17, 53, (net.r, 5353))

    def seconds_left() -> int:
        [row] = [e for k, e in node.tables.snat.items() if k.kind == SnatKind.REVERSE]
        return row.expires - int(time.clock_gettime(time.CLOCK_MONOTONIC))

    def ages(seconds: int) -> None:
        rows = {k: e for k, e in node.tables.snat.items() if k.kind == SnatKind.REVERSE}
        aged = {k: dataclasses.replace(e, expires=e.expires - seconds) for k, e in rows.items()}
        node.tables.snat.update(aged)

    def asks() -> int:
        return int(node.arrives(datagram(net, net.world, 4000, net.vip, 53)).frame.sport)

    port = asks()
    assert 28 <= seconds_left() <= 31
    ages(5)
    asks()
    assert 28 <= seconds_left() <= 31
    node.arrives(datagram(net, net.r, 5353, net.node, port))
    asks()
    assert 28 <= seconds_left() <= 31
    ages(5)
    asks()
    assert 198 <= seconds_left() <= 201
    ages(100)
    node.arrives(datagram(net, net.r, 5353, net.node, port))
    assert 198 <= seconds_left() <= 201


def test_what_is_encapsulated_is_the_stacks(datapaths: Datapaths, settings: Settings, world: World,
                                            net: Book) -> None:  # fmt: skip
    """Not a word about it from the uplink, even if its port is a service's; to a pod it is a
    packet like any other."""
    node = Node(datapaths.get(dataclasses.replace(settings, overlay_port=8472)), world, net)
    node.service(17, 8472, (net.b, 5353), at=net.node)
    outer = UDP(sport=40000, dport=8472, chksum=0) / Raw(bytes(50))
    assert node.arrives(net.ip(net.world, net.node) / outer).code == TC_ACT_OK
    assert not list(node.tables.ct.items())
    node.isolate(b_ingress=CLOSED)
    out = node.arrives(net.ip(net.world, net.b) / outer)
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1})
    node.reader.close()


def test_affinity(node: Node, net: Book) -> None:
    """All of a client's connections, to all of a port's addresses, until it stays away."""
    backends = [(net.b, 8000 + n) for n in range(50)]
    node.service(6, 80, *backends, affinity_seconds=100, identity=5)
    node.service(6, 81, *backends, affinity_seconds=100, identity=5, number=2)

    def port(source: str, sport: int, dport: int) -> int:
        sent = net.ip(source, net.vip) / TCP(sport=sport, dport=dport, flags="S")
        if source == net.a:
            return int(node.from_pod("a", sent).frame.dport)
        return int(node.arrives(sent).frame.dport)

    for client in (net.world, net.a):
        chosen = {port(client, sport, dport) for sport in range(1, 20) for dport in (80, 81)}
        assert len(chosen) == 1
    rows = dict(node.tables.affinity.items())
    assert len(rows) == 2
    old = {k: dataclasses.replace(v, last_used=v.last_used - 101) for k, v in rows.items()}
    node.tables.affinity.update(old)
    after = {port(net.world, 100, 80)}
    for _ in range(5):
        node.tables.affinity.delete(list(rows))
        after.add(port(net.world, 101 + _, 80))
    assert len(after) > 1


def test_affinity_does_not_lead_away_from_a_local_service(native: Node, net: Book) -> None:
    node = native
    node.service(6, 80, (net.r, 8080), affinity_seconds=100)
    node.service(6, 81, (net.b, 8081), affinity_seconds=100, number=2, flags=ServiceFlag.LOCAL)
    first = node.arrives(net.ip(net.world, net.vip) / TCP(sport=1, dport=80, flags="S"))
    assert first.frame.dport == 8080
    second = node.arrives(net.ip(net.world, net.vip) / TCP(sport=1, dport=81, flags="S"))
    assert second.frame.dport == 8081
