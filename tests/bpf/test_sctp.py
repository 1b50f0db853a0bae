# SPDX-License-Identifier: Apache-2.0
"""SCTP in packets: Services and masquerading with the checksum kept right, life of associations,
refusals, fragments, policy."""

from __future__ import annotations

import random
import time

import pytest
from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw
from support import sctp
from support.packet_node import GATEWAY_MAC, HOST_MACS, PEER_MAC, POD_MACS, Book, Node
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet
from support.sctp import Sctp
from support.timing import SCALE

from weir.datapath.records import CtFlag, DropReason, Isolation, SnatKind

PORT, TARGET = 80, 8080
# The most that a test run takes in one piece: a page less headroom and tail.
TEST_RUN_MAX = 3400
# Chunks that open nothing and end nothing.
TALK = sctp.chunk(sctp.DATA, b"hello")


def over(net: Book, source: str, target: str, packet: Sctp | bytes, **fields: int | str) -> Packet:
    """The packet in an IP packet of its family."""
    name = "proto" if net.family == 4 else "nh"
    return net.ip(source, target, **{name: sctp.PROTOCOL}, **fields) / Raw(bytes(packet))


def to_pod(pod: str, layers: Packet) -> bytes:
    return bytes(Ether(dst=POD_MACS[pod], src=HOST_MACS[pod]) / layers)


def on_wire(layers: Packet) -> bytes:
    return bytes(Ether(src=GATEWAY_MAC, dst=PEER_MAC) / layers)


def test_our_own_checksum_is_the_standard_one() -> None:
    """The check value of CRC catalogues, and RFC 3720, B.4."""
    assert sctp.crc32c(b"123456789") == 0xE3069283
    assert sctp.crc32c(bytes(32)) == 0x8A9136AA
    assert sctp.crc32c(bytes(range(32))) == 0x46DD794E


def test_there_and_back(node: Node, net: Book) -> None:
    """a → VIP:80 becomes a → b:8080, and b's answer comes from the VIP; the rest stays."""
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    sent = Sctp(4000, PORT, sctp.init(), tag=0)
    out = node.from_pod("a", over(net, net.a, net.vip, sent))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("b", over(net, net.a, net.b, sent.but(dport=TARGET))))
    flags = sorted(
        entry.flags & (CtFlag.SERVICE | CtFlag.REV_NAT) for entry in node.flows().values()
    )
    assert flags == [CtFlag.SERVICE, CtFlag.REV_NAT]
    answer = Sctp(TARGET, 4000, sctp.init(kind=sctp.INIT_ACK))
    out = node.from_pod("b", over(net, net.b, net.a, answer))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, to_pod("a", over(net, net.vip, net.a, answer.but(sport=PORT))))


def test_new_backends_get_new_associations_only(node: Node, net: Book) -> None:
    """A new INIT on the same ports is the client's restart: its association stays as well."""
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET), number=1)
    first = Sctp(4000, PORT, sctp.init(), tag=0)
    node.from_pod("a", over(net, net.a, net.vip, first))
    node.service(sctp.PROTOCOL, PORT, (net.b, 9090), number=2)
    for sport, chunks, port in (
        (4000, TALK, TARGET),
        (4000, sctp.init(), TARGET),
        (4001, sctp.init(), 9090),
    ):
        sent = Sctp(sport, PORT, chunks)
        out = node.from_pod("a", over(net, net.a, net.vip, sent))
        assert_packet(out.packet, to_pod("b", over(net, net.a, net.b, sent.but(dport=port))))


def test_every_length(node: Node, net: Book) -> None:
    """Random contents and ports, of every length that a test run takes: both ends. Of them all, as
    our own CRC is slow, only on this machine's kernel; others get a sample of odd and even ones."""
    chance = random.Random(net.family)
    for number, length in enumerate(range(sctp.HEADER, TEST_RUN_MAX, 1 if SCALE == 1 else 41)):
        port, target, sport = (chance.randrange(1, 65536) for _ in range(3))
        body = chance.randbytes(length - sctp.HEADER)
        if number % 50 == 0:
            node.service(sctp.PROTOCOL, port, (net.b, target))
            current = port, target
        port, target = current
        sent = Sctp(sport, port, body, chance.getrandbits(32))
        out = node.run("from_pod", "pa", from_pod_frame(net, "a", net.vip, sent))
        assert out.packet[-length:] == bytes(sent.but(dport=target)), (length, port, target)
        answer = Sctp(target, sport, body, chance.getrandbits(32))
        out = node.run("from_pod", "pb", from_pod_frame(net, "b", net.a, answer))
        assert out.packet[-length:] == bytes(answer.but(sport=port)), (length, port, target)


def from_pod_frame(net: Book, pod: str, target: str, packet: Sctp) -> bytes:
    layers = over(net, getattr(net, pod), target, packet)
    return bytes(Ether(src=POD_MACS[pod], dst=HOST_MACS[pod]) / layers)


def test_padding_after_the_packet_does_not_count(node: Node, net: Book) -> None:
    """Short Ethernet frames are filled up; that is not part of the packet."""
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    sent = Sctp(4000, PORT, sctp.chunk(sctp.DATA))
    out = node.run("from_pod", "pa", from_pod_frame(net, "a", net.vip, sent) + bytes(20))
    expected = to_pod("b", over(net, net.a, net.b, sent.but(dport=TARGET)))
    assert_packet(out.packet, expected + bytes(20))


def test_checksum_that_the_device_fills_in_stays_empty(node: Node, net: Book) -> None:
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    sent = Sctp(4000, PORT, TALK, checksum=bytes(4))
    out = node.from_pod("a", over(net, net.a, net.vip, sent))
    assert_packet(out.packet, to_pod("b", over(net, net.a, net.b, sent.but(dport=TARGET))))


@pytest.mark.parametrize("checksum", [None, b"\x01\x02\x03\x04"], ids=["right", "wrong"])
def test_another_address_alone_changes_no_checksum(
    node: Node, net: Book, checksum: bytes | None
) -> None:
    """It has no pseudo header. A wrong one stays wrong."""
    node.service(sctp.PROTOCOL, PORT, (net.b, PORT))
    sent = Sctp(4000, PORT, TALK, checksum=checksum)
    out = node.from_pod("a", over(net, net.a, net.vip, sent))
    assert_packet(out.packet, to_pod("b", over(net, net.a, net.b, sent)))


def test_a_wrong_checksum_stays_wrong(node: Node, net: Book) -> None:
    """A packet that was damaged on its way must not be made good."""
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    damaged = Sctp(4000, PORT, TALK, checksum=b"\x01\x02\x03\x04")
    out = node.from_pod("a", over(net, net.a, net.vip, damaged))
    right = bytes(damaged.but(dport=TARGET))
    assert out.packet[-len(right) + 8 :][4:] == right[12:]
    good = bytes(Sctp(4000, TARGET, TALK))
    assert out.packet[-len(good) :] != good


def fragments(net: Book, source: str, target: str, packet: Sctp, first: int) -> list[Packet]:
    """The packet in two parts, the first of so many bytes."""
    data = bytes(packet)
    head, rest = Raw(data[:first]), Raw(data[first:])
    if net.family == 4:
        common = {"proto": sctp.PROTOCOL, "id": 7}
        return [
            net.ip(source, target, flags="MF", **common) / head,
            net.ip(source, target, frag=first // 8, **common) / rest,
        ]
    return [
        net.ip(source, target) / IPv6ExtHdrFragment(offset=0, m=1, id=7, nh=132) / head,
        net.ip(source, target) / IPv6ExtHdrFragment(offset=first // 8, m=0, id=7, nh=132) / rest,
    ]


AUTH = sctp.chunk(15, bytes(24))


@pytest.mark.parametrize(
    ("chunks", "first"),
    [
        pytest.param(sctp.chunk(sctp.DATA, bytes(100)), 24, id="one chunk"),
        pytest.param(sctp.chunk(sctp.DATA, bytes(101)), 112, id="only padding is missing"),
        pytest.param(AUTH + sctp.chunk(sctp.DATA, bytes(range(200))), 48, id="authenticated"),
        pytest.param(sctp.chunk(sctp.DATA) * 3 + sctp.chunk(sctp.DATA, bytes(90)), 64, id="four"),
    ],
)
def test_fragments(node: Node, net: Book, chunks: bytes, first: int) -> None:
    """What a sender does when the path turned out smaller than a chunk: the checksum is of the
    whole, whose length the chunk that is cut tells."""
    whole = Sctp(4000, PORT, chunks)
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    sent = fragments(net, net.a, net.vip, whole, first)
    expected = fragments(net, net.a, net.b, whole.but(dport=TARGET), first)
    for part, arrives in zip(sent, expected, strict=True):
        out = node.from_pod("a", part)
        assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
        assert_packet(out.packet, to_pod("b", arrives))


@pytest.mark.parametrize(
    ("chunks", "first"),
    [
        pytest.param(sctp.chunk(sctp.DATA, bytes(100)), 8, id="not even a checksum"),
        pytest.param(sctp.chunk(sctp.DATA) * 9, 32, id="cut between chunks"),
        pytest.param(sctp.chunk(sctp.DATA) * 9, 40, id="many chunks"),
    ],
)
def test_fragments_that_tell_no_length(node: Node, net: Book, chunks: bytes, first: int) -> None:
    """They cannot get another port. With the same port they pass."""
    whole = Sctp(4000, PORT, chunks)
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    out = node.from_pod("a", fragments(net, net.a, net.vip, whole, first)[0])
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.FRAGMENT: 1})
    node.tables.ct.delete(list(node.flows()))
    node.service(sctp.PROTOCOL, PORT, (net.b, PORT))
    sent = fragments(net, net.a, net.vip, whole, first)
    expected = fragments(net, net.a, net.b, whole, first)
    for part, arrives in zip(sent, expected, strict=True):
        assert_packet(node.from_pod("a", part).packet, to_pod("b", arrives))


def unreachable(net: Book, source: str, target: str, quoted: bytes) -> Packet:
    error = ICMP(type=3, code=3) if net.family == 4 else ICMPv6DestUnreach(code=4)
    fields = {"id": 0} if net.family == 4 else {}
    return net.ip(source, target, **fields) / error / Raw(quoted)


@pytest.mark.parametrize("length", [8, 12, 40], ids=["ports and tag", "header", "with chunks"])
def test_error_about_a_service_flow(node: Node, net: Book, length: int) -> None:
    """The backend's error quotes what the client sent: to the VIP, by its port. The quoted
    checksum is not looked at by receivers and stays."""
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    sent = Sctp(4000, PORT, TALK, checksum=b"\x01\x02\x03\x04")
    node.from_pod("a", over(net, net.a, net.vip, sent))
    header = 20 if net.family == 4 else 40
    quoted = bytes(over(net, net.a, net.b, sent.but(dport=TARGET)))[: header + length]
    original = bytes(over(net, net.a, net.vip, sent))[: header + length]
    out = node.from_pod("b", unreachable(net, net.b, net.a, quoted))
    assert out.drops == {}
    assert_packet(out.packet, to_pod("a", unreachable(net, net.vip, net.a, original)))


@pytest.mark.parametrize("chunks", [sctp.init(), b""], ids=["INIT", "header alone"])
def test_no_backend_port_unreachable(node: Node, net: Book, chunks: bytes) -> None:
    """As kube-proxy refuses it. Of an INIT the tag is quoted too: Linux believes no less."""
    node.service(sctp.PROTOCOL, PORT)
    sent = over(net, net.a, net.vip, Sctp(4000, PORT, chunks, tag=0))
    out = node.from_pod("a", sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    header = 20 if net.family == 4 else 40
    quoted = bytes(sent)[: header + (20 if chunks else 12)]
    assert_packet(out.packet, to_pod("a", unreachable(net, net.vip, net.a, quoted)))


def test_masquerade_and_back(node: Node, net: Book) -> None:
    sent = Sctp(4000, 443, sctp.init(), tag=0)
    out = node.leaves(over(net, net.a, net.world, sent))
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    assert_packet(out.packet, on_wire(over(net, net.node, net.world, sent.but(sport=port))))
    answer = Sctp(443, port, sctp.init(kind=sctp.INIT_ACK))
    reply = node.arrives(over(net, net.world, net.node, answer))
    assert (reply.code, reply.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(reply.packet, to_pod("a", over(net, net.world, net.a, answer.but(dport=4000))))


@pytest.mark.parametrize("client", ["outside", "host"])
def test_backend_elsewhere(node: Node, net: Book, client: str) -> None:
    """Under this node's address: both ports change at once, there and back, also after the
    Service is gone."""
    node.service(sctp.PROTOCOL, PORT, (net.node2, TARGET))
    source = net.world if client == "outside" else net.node
    hop = net.ttl(63)

    def goes(chunks: bytes) -> bytes:
        sent = over(net, source, net.vip, Sctp(4000, PORT, chunks))
        out = node.arrives(sent) if client == "outside" else node.leaves(sent)
        assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
        return out.packet[14:]

    there = goes(sctp.init())
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    changed = Sctp(port, TARGET, sctp.init())
    assert there == bytes(over(net, net.node, net.node2, changed, **hop))
    answer = Sctp(TARGET, port, sctp.init(kind=sctp.INIT_ACK))
    out = node.arrives(over(net, net.node2, net.node, answer))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT if client == "outside" else TC_ACT_OK, {})
    back = over(
        net, net.vip, source, answer.but(sport=PORT, dport=4000),
        **(hop if client == "outside" else {}),
    )  # fmt: skip
    assert out.packet[14:] == bytes(back)
    if client == "outside":
        node.tables.services.delete([key for key, _ in node.tables.services.items()])
        talk = Sctp(port, TARGET, TALK)
        assert goes(TALK) == bytes(over(net, net.node, net.node2, talk, **hop))


@pytest.mark.parametrize("client", ["outside", "host"])
def test_others_are_refused_too(node: Node, net: Book, client: str) -> None:
    node.service(sctp.PROTOCOL, PORT)
    source = net.world if client == "outside" else net.node
    sent = over(net, source, net.vip, Sctp(4000, PORT, sctp.init(), tag=0))
    out = node.arrives(sent) if client == "outside" else node.leaves(sent)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {DropReason.NO_BACKEND: 1})
    quoted = bytes(sent)[: (20 if net.family == 4 else 40) + 20]
    assert out.packet[14:] == bytes(unreachable(net, net.vip, source, quoted))


def test_cut_headers(node: Node, net: Book) -> None:
    for length in (0, 8, 11):
        out = node.from_pod("a", over(net, net.a, net.b, bytes(length)))
        assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.MALFORMED: 1})
    assert node.from_pod("a", over(net, net.a, net.b, Sctp(1, 2))).code == TC_ACT_REDIRECT


CLIENT, SERVER = "client", "server"
OPENED = [(CLIENT, sctp.INIT), (SERVER, sctp.INIT_ACK), (CLIENT, sctp.COOKIE_ECHO)]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        pytest.param(OPENED[:1], 60, id="opening"),
        pytest.param(OPENED, 210, id="established"),
        pytest.param([*OPENED, (CLIENT, sctp.DATA), (SERVER, sctp.SHUTDOWN)], 210, id="draining"),
        pytest.param([*OPENED, (CLIENT, sctp.ABORT)], 30, id="aborted by the client"),
        pytest.param([*OPENED, (SERVER, sctp.ABORT)], 30, id="aborted by the server"),
        pytest.param([OPENED[0], (SERVER, sctp.ABORT)], 30, id="refused"),
        pytest.param([*OPENED, (CLIENT, sctp.SHUTDOWN_COMPLETE)], 30, id="client ended"),
        pytest.param(
            [*OPENED, (CLIENT, sctp.SHUTDOWN_ACK), (SERVER, sctp.SHUTDOWN_COMPLETE)], 30,
            id="server ended",
        ),
    ],
)  # fmt: skip
def test_life_of_an_association(
    node: Node, net: Book, said: list[tuple[str, int]], seconds: int
) -> None:
    """How long the flow is remembered after its last packet."""
    for who, kind in said:
        if who == CLIENT:
            node.from_pod("a", over(net, net.a, net.b, Sctp(4000, PORT, sctp.chunk(kind))))
        else:
            node.from_pod("b", over(net, net.b, net.a, Sctp(PORT, 4000, sctp.chunk(kind))))
    now = time.clock_gettime(time.CLOCK_MONOTONIC)
    [entry] = node.flows().values()
    assert entry.expires - now == pytest.approx(seconds, abs=2)


def test_a_closed_association_is_opened_anew(node: Node, net: Book) -> None:
    """The client's ports again, after ABORT: the flow is another, and policy is asked again."""
    for kind in (sctp.INIT, sctp.ABORT):
        node.from_pod("a", over(net, net.a, net.b, Sctp(4000, PORT, sctp.chunk(kind))))
    node.isolate(a_egress=Isolation(9, 0))
    late = over(net, net.a, net.b, Sctp(4000, PORT, sctp.chunk(sctp.DATA)))
    assert node.from_pod("a", late).drops == {}
    again = over(net, net.a, net.b, Sctp(4000, PORT, sctp.init()))
    assert node.from_pod("a", again).drops == {DropReason.POLICY_EGRESS: 1}


def test_the_clients_side_of_a_service_ends_too(node: Node, net: Book) -> None:
    """Replies never carry the VIP: what the client itself says has to do."""
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET))
    for kind, seconds in (
        (sctp.INIT, 60), (sctp.COOKIE_ECHO, 210), (sctp.SHUTDOWN_ACK, 30),
    ):  # fmt: skip
        node.from_pod("a", over(net, net.a, net.vip, Sctp(4000, PORT, sctp.chunk(kind))))
        now = time.clock_gettime(time.CLOCK_MONOTONIC)
        [service] = [e for e in node.flows().values() if e.flags & CtFlag.SERVICE]
        assert service.expires - now == pytest.approx(seconds, abs=2)


@pytest.mark.parametrize(
    ("proto", "port", "bits", "allowed"),
    [
        pytest.param(sctp.PROTOCOL, PORT, 16, True, id="SCTP and the port"),
        pytest.param(sctp.PROTOCOL, 0, 0, True, id="SCTP, all ports"),
        pytest.param(sctp.PROTOCOL, 64, 10, True, id="SCTP, ports 64 to 127"),
        pytest.param(sctp.PROTOCOL, PORT + 1, 16, False, id="another port"),
        pytest.param(6, PORT, 16, False, id="TCP"),
        pytest.param(17, PORT, 16, False, id="UDP"),
    ],
)
def test_policy(node: Node, net: Book, proto: int, port: int, bits: int, allowed: bool) -> None:
    node.isolate(b_ingress=node.allow(1, 0, proto=proto, port=port, bits=bits))
    out = node.from_pod("a", over(net, net.a, net.b, Sctp(4000, PORT, sctp.init(), tag=0)))
    assert out.drops == ({} if allowed else {DropReason.POLICY_INGRESS: 1})


@pytest.mark.parametrize("length", [64, 1400, 3200])
def test_cost_of_another_port(node: Node, net: Book, length: int) -> None:
    """Against UDP, whose checksum a helper mends, and against SCTP with the port as it is."""
    node.datapath.set_event_mask(0)
    node.service(sctp.PROTOCOL, PORT, (net.b, TARGET), number=1)
    node.service(sctp.PROTOCOL, TARGET, (net.b, TARGET), number=2)
    node.service(17, PORT, (net.b, TARGET), number=3)
    body = bytes(length - sctp.HEADER)
    packets = {
        "SCTP, another port": over(net, net.a, net.vip, Sctp(4000, PORT, body)),
        "SCTP, the same port": over(net, net.a, net.vip, Sctp(4000, TARGET, body)),
        "UDP, another port": net.ip(net.a, net.vip) / UDP(sport=4000, dport=PORT) / Raw(body),
    }
    best = {}
    for name, packet in packets.items():
        frame = bytes(Ether(src=POD_MACS["a"], dst=HOST_MACS["a"]) / packet)
        assert node.run("from_pod", "pa", frame).drops == {}
        # A run sees what the last one left: translated, with the pod's address.
        best[name] = time_of_translation(node, frame)
    print(f"IPv{net.family}, {length} bytes:", best)
    if SCALE == 1:  # an emulated CPU says nothing about time
        assert best["SCTP, another port"] <= best["UDP, another port"] + 800


def time_of_translation(node: Node, frame: bytes) -> int:
    """Nanoseconds of one run on a fresh packet, the best of many."""
    runs = 2000 if SCALE == 1 else 20
    return min(node.run("from_pod", "pa", frame).duration_ns for _ in range(runs))
