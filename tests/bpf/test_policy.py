# SPDX-License-Identifier: Apache-2.0
"""Policy and conntrack as packets see them. Each case runs for IPv4 and for IPv6."""

from __future__ import annotations

import dataclasses
import time

import pytest
from scapy.layers.inet import TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from support.packet_node import (
    CLASS_A,
    CLASS_B,
    CLASS_R,
    GATEWAY_MAC,
    HOST_MACS,
    PEER_MAC,
    POD_MACS,
    Book,
    Node,
)
from support.packets import TC_ACT_OK, TC_ACT_REDIRECT, TC_ACT_SHOT, assert_packet

from weir.api.address import Addr, parse
from weir.datapath.records import (
    CtFlag,
    DropReason,
    Endpoint,
    EventKind,
    Isolation,
    Prefix,
    PrefixKey,
)

SHUT_EGRESS = Isolation(201, 0)
SHUT_INGRESS = Isolation(202, 0)


def syn(sport: int = 4000, dport: int = 80) -> TCP:
    return TCP(sport=sport, dport=dport, flags="S", seq=100)


def ack(sport: int, dport: int) -> TCP:
    return TCP(sport=sport, dport=dport, flags="A", seq=1, ack=1)


def test_same_node_delivery(node: Node, net: Book) -> None:
    """a → b: into b's namespace, only the MAC addresses change."""
    layers = net.ip(net.a, net.b) / UDP(sport=4000, dport=53) / b"question"
    out = node.from_pod("a", layers)
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    assert_packet(out.packet, bytes(Ether(dst=POD_MACS["b"], src=HOST_MACS["b"]) / layers))
    [(key, entry)] = node.flows().items()
    assert {key.low, key.high} == {parse(net.a), parse(net.b)}
    assert (key.low_port, key.high_port, key.protocol) == (4000, 53, 17)
    assert entry.flags == CtFlag.ORIGIN_IS_LOW
    assert (
        node.from_pod("b", net.ip(net.b, net.a) / UDP(sport=53, dport=4000)).code == TC_ACT_REDIRECT
    )
    assert [e.flags for e in node.flows().values()] == [CtFlag.ORIGIN_IS_LOW | CtFlag.REPLIED]


@pytest.mark.parametrize(
    ("case", "code", "drops"),
    [
        ("open", TC_ACT_REDIRECT, {}),
        ("egress denied", TC_ACT_SHOT, {DropReason.POLICY_EGRESS: 1}),
        ("egress allowed", TC_ACT_REDIRECT, {}),
        ("ingress denied", TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1}),
        ("ingress allowed", TC_ACT_REDIRECT, {}),
        ("ingress from another", TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1}),
        ("ingress from all", TC_ACT_REDIRECT, {}),
        ("ingress port", TC_ACT_REDIRECT, {}),
        ("ingress port range", TC_ACT_REDIRECT, {}),
        ("ingress other port", TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1}),
        ("ingress other protocol", TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1}),
        ("ingress any port of protocol", TC_ACT_REDIRECT, {}),
    ],
)
def test_verdict(node: Node, net: Book, case: str, code: int, drops: dict[DropReason, int]) -> None:
    match case:
        case "egress denied":
            node.isolate(a_egress=SHUT_EGRESS)
        case "egress allowed":
            node.isolate(a_egress=node.allow(1, CLASS_B))
        case "ingress denied":
            node.isolate(b_ingress=SHUT_INGRESS)
        case "ingress allowed":
            node.isolate(b_ingress=node.allow(1, CLASS_A))
        case "ingress from another":
            node.isolate(b_ingress=node.allow(1, CLASS_R))
        case "ingress from all":
            node.isolate(b_ingress=node.allow(1, 0))
        case "ingress port":
            node.isolate(b_ingress=node.allow(1, CLASS_A, proto=6, port=80, bits=16))
        case "ingress port range":
            node.isolate(b_ingress=node.allow(1, CLASS_A, proto=6, port=64, bits=10))
        case "ingress other port":
            node.isolate(b_ingress=node.allow(1, CLASS_A, proto=6, port=81, bits=16))
        case "ingress other protocol":
            node.isolate(b_ingress=node.allow(1, CLASS_A, proto=17, port=80, bits=16))
        case "ingress any port of protocol":
            node.isolate(b_ingress=node.allow(1, CLASS_A, proto=6, port=0, bits=0))
    out = node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert (out.code, out.drops) == (code, drops)
    assert len(node.flows()) == (code == TC_ACT_REDIRECT)


def test_port_rules_never_match_icmp(node: Node, net: Book) -> None:
    node.isolate(b_ingress=node.allow(1, CLASS_A, proto=6, port=0, bits=0))
    out = node.from_pod("a", net.ip(net.a, net.b) / net.echo(5))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1})
    node.isolate(b_ingress=node.allow(1, CLASS_A))
    assert node.from_pod("a", net.ip(net.a, net.b) / net.echo(5)).code == TC_ACT_REDIRECT
    node.isolate(a_ingress=SHUT_INGRESS, b_ingress=SHUT_INGRESS)
    reply = node.from_pod("b", net.ip(net.b, net.a) / net.echo(5, reply=True))
    assert (reply.code, reply.drops) == (TC_ACT_REDIRECT, {})


def test_replies_pass_whatever_policy_says_of_them(node: Node, net: Book) -> None:
    node.isolate(a_ingress=SHUT_INGRESS, b_egress=SHUT_EGRESS)
    assert node.from_pod("a", net.ip(net.a, net.b) / syn()).code == TC_ACT_REDIRECT
    out = node.from_pod("b", net.ip(net.b, net.a) / TCP(sport=80, dport=4000, flags="SA"))
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    other = node.from_pod("b", net.ip(net.b, net.a) / syn(80, 4001))
    assert other.drops == {DropReason.POLICY_EGRESS: 1}


@pytest.mark.parametrize("first", ["opener", "replier"])
def test_policy_change_is_judged_from_the_openers_side(node: Node, net: Book, first: str) -> None:
    """Also when the first packet after the change is a reply."""
    node.isolate(b_ingress=node.allow(1, CLASS_A))
    forward = net.ip(net.a, net.b) / ack(4000, 80)
    backward = net.ip(net.b, net.a) / ack(80, 4000)
    assert node.from_pod("a", net.ip(net.a, net.b) / syn()).code == TC_ACT_REDIRECT
    assert node.from_pod("b", backward).code == TC_ACT_REDIRECT
    node.datapath.bump()
    for pod, packet in [("a", forward), ("b", backward)][:: 1 if first == "opener" else -1]:
        assert node.from_pod(pod, packet).code == TC_ACT_REDIRECT
    assert {e.generation for e in node.flows().values()} == {1}
    node.forbid()
    for pod, packet in [("a", forward), ("b", backward)][:: 1 if first == "opener" else -1]:
        out = node.from_pod(pod, packet)
        assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1})
    assert {e.generation for e in node.flows().values()} == {1}


def test_closed_connection_opens_anew(node: Node, net: Book) -> None:
    """A SYN on a closing entry is judged; on an open one it is that flow's."""
    node.from_pod("a", net.ip(net.a, net.b) / syn())
    node.from_pod("b", net.ip(net.b, net.a) / TCP(sport=80, dport=4000, flags="RA"))
    assert [e.flags & CtFlag.RESET for e in node.flows().values()] == [CtFlag.RESET]
    node.isolate(b_ingress=SHUT_INGRESS)
    out = node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert out.drops == {DropReason.POLICY_INGRESS: 1}


def test_flow_without_entry_goes_on_when_policy_allows(node: Node, net: Book) -> None:
    node.isolate(b_ingress=node.allow(1, CLASS_A))
    assert node.from_pod("a", net.ip(net.a, net.b) / ack(4000, 80)).code == TC_ACT_REDIRECT
    [entry] = node.flows().values()
    assert entry.flags & CtFlag.REPLIED


def test_lifetimes(node: Node, net: Book) -> None:
    def left() -> int:
        [entry] = node.flows().values()
        return round((entry.expires - time.monotonic()) / 10) * 10

    node.from_pod("a", net.ip(net.a, net.b) / syn())
    assert left() == 60
    node.from_pod("b", net.ip(net.b, net.a) / TCP(sport=80, dport=4000, flags="SA"))
    assert left() == 21600
    node.from_pod("a", net.ip(net.a, net.b) / TCP(sport=4000, dport=80, flags="FA"))
    assert left() == 3600
    node.from_pod("b", net.ip(net.b, net.a) / TCP(sport=80, dport=4000, flags="FA"))
    assert left() == 30


def test_expired_entry_is_none(node: Node, net: Book) -> None:
    node.from_pod("a", net.ip(net.a, net.b) / UDP(sport=1, dport=2))
    [(key, entry)] = node.flows().items()
    node.tables.ct.update({key: dataclasses.replace(entry, expires=1)})
    node.isolate(a_ingress=SHUT_INGRESS)
    out = node.from_pod("b", net.ip(net.b, net.a) / UDP(sport=2, dport=1))
    assert out.drops == {DropReason.POLICY_INGRESS: 1}


@pytest.mark.parametrize("who", ["spoofed", "other pod's", "link scope", "unspecified"])
def test_source_must_be_the_pods(node: Node, net: Book, who: str) -> None:
    link = "169.254.7.7" if net.family == 4 else "fe80::7"
    nothing = "0.0.0.0" if net.family == 4 else "::"
    source = {
        "spoofed": net.world,
        "other pod's": net.b,
        "link scope": link,
        "unspecified": nothing,
    }
    out = node.from_pod("a", net.ip(source[who], net.r) / UDP(sport=1, dport=2))
    quiet = who in {"link scope", "unspecified"}
    assert out.code == TC_ACT_SHOT
    assert out.drops == {DropReason.NOT_UNICAST if quiet else DropReason.SPOOFED_SOURCE: 1}
    assert len(node.reader.drain()) == (not quiet)


def test_arp_is_dropped_quietly(node: Node, net: Book) -> None:
    out = node.from_pod("a", ARP(pdst="10.0.1.1"))
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.UNSUPPORTED_L2: 1})
    assert node.reader.drain() == []


def test_unknown_peer(node: Node, net: Book) -> None:
    """An address of a pod CIDR that is not known yet passes only a rule without peers."""
    node.isolate(a_egress=node.allow(1, CLASS_R))
    out = node.from_pod("a", net.ip(net.a, net.unknown) / syn())
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.UNKNOWN_PEER: 1})
    node.isolate(a_egress=node.allow(1, 0))
    assert node.from_pod("a", net.ip(net.a, net.unknown) / syn()).code == TC_ACT_REDIRECT


def test_ip_block(node: Node, net: Book) -> None:
    bits = 96 + 24 if net.family == 4 else 64
    node.tables.prefixes.update(
        {PrefixKey(bits, Addr(parse(net.world)[: bits // 8] + bytes(16 - bits // 8))): Prefix(40)}
    )
    node.isolate(a_egress=node.allow(1, 40))
    out = node.from_pod("a", net.ip(net.a, net.world) / syn())
    assert (out.code, out.drops) == (TC_ACT_REDIRECT, {})
    node.tables.prefixes.delete([key for key, _ in node.tables.prefixes.items()])
    out = node.from_pod("a", net.ip(net.a, net.world) / syn(4001))
    assert out.drops == {DropReason.POLICY_EGRESS: 1}


def test_network_policies_never_come_between_a_pod_and_its_node(node: Node, net: Book) -> None:
    node.isolate(a_egress=SHUT_EGRESS, a_ingress=SHUT_INGRESS)
    out = node.from_pod("a", net.ip(net.a, net.node) / syn())
    assert (out.code, out.drops) == (TC_ACT_OK, {})
    assert [e.flags & CtFlag.UNJUDGED for e in node.flows().values()] == [0]
    frame = Ether(src=HOST_MACS["a"], dst=POD_MACS["a"]) / net.ip(net.node, net.a) / syn(5, 6)
    assert node.run("to_pod", "pa", frame).code == TC_ACT_OK
    # Some other address of the host: what was made here has no ingress device.
    frame = Ether(src=HOST_MACS["a"], dst=POD_MACS["a"]) / net.ip(net.world, net.a) / syn(7, 8)
    assert node.run("to_pod", "pa", frame).code == TC_ACT_OK
    reply = node.from_pod("a", net.ip(net.a, net.world) / ack(8, 7))
    assert reply.drops == {}


@pytest.mark.forwarded
def test_forwarded_to_pod_is_judged(node: Node, net: Book) -> None:
    node.isolate(a_ingress=SHUT_INGRESS)
    frame = Ether(src=HOST_MACS["a"], dst=POD_MACS["a"]) / net.ip(net.world, net.a) / syn(5, 6)
    out = node.run("to_pod", "pa", frame, ingress="ul")
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.POLICY_INGRESS: 1})


@pytest.mark.parametrize(
    "program", ["from_uplink", pytest.param("to_pod", marks=pytest.mark.forwarded)]
)
def test_ingress_from_world(node: Node, net: Book, program: str) -> None:
    node.isolate(a_ingress=SHUT_INGRESS)
    layers = net.ip(net.world, net.a) / syn()
    frame = Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers
    device, ingress = ("pa", "ul") if program == "to_pod" else ("ul", "")
    out = node.run(program, device, frame, ingress=ingress)
    assert out.drops == {DropReason.POLICY_INGRESS: 1}
    node.isolate()
    out = node.run(program, device, frame, ingress=ingress)
    assert (out.code, out.drops) == (TC_ACT_OK if program == "to_pod" else TC_ACT_REDIRECT, {})
    if program == "from_uplink":
        assert_packet(out.packet, bytes(Ether(dst=POD_MACS["a"], src=HOST_MACS["a"]) / layers))


@pytest.mark.parametrize("source", ["node", "a", "r"])
def test_uplink_brings_nothing_of_ours(node: Node, net: Book, source: str) -> None:
    """Neither this node's and its pods' addresses, nor, with an overlay, other nodes' pods."""
    out = node.arrives(net.ip(getattr(net, source), net.b) / syn())
    assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.SPOOFED_SOURCE: 1})


def test_stray_pod_address(node: Node, net: Book) -> None:
    for out in (
        node.arrives(net.ip(net.world, net.stray) / syn()),
        node.from_pod("a", net.ip(net.a, net.stray) / syn()),
    ):
        assert (out.code, out.drops) == (TC_ACT_SHOT, {DropReason.NO_ENDPOINT: 1})


def test_hosts_own_traffic_is_left_alone(node: Node, net: Book) -> None:
    layers = net.ip(net.world, net.node) / syn()
    out = node.arrives(layers)
    assert out.code == TC_ACT_OK
    assert_packet(out.packet, bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers))
    assert node.flows() == {}


def test_events(node: Node, net: Book) -> None:
    """A drop and a new flow tell classes, rule and rule set; nobody listening, nothing."""
    node.isolate(b_ingress=node.allow(9, CLASS_A, rule=77, proto=6, port=80, bits=16))
    node.from_pod("a", net.ip(net.a, net.b) / syn())
    node.from_pod("a", net.ip(net.a, net.b) / syn(4000, 81))
    allowed, dropped = node.reader.drain()
    assert (allowed.kind, allowed.rule, allowed.rule_set) == (EventKind.ALLOW, 77, 9)
    assert (dropped.kind, dropped.reason) == (EventKind.DROP, DropReason.POLICY_INGRESS)
    assert (dropped.source, dropped.destination) == (parse(net.a), parse(net.b))
    assert (dropped.source_port, dropped.destination_port, dropped.protocol) == (4000, 81, 6)
    assert (dropped.source_class, dropped.destination_class) == (CLASS_A, CLASS_B)
    assert (dropped.direction, dropped.rule, dropped.rule_set) == (1, 0, 9)
    assert (dropped.ifindex, dropped.tcp_flags) == (node.index["pa"], 2)
    node.datapath.set_event_mask(0)
    node.from_pod("a", net.ip(net.a, net.b) / syn(4000, 81))
    assert node.reader.drain() == []


def test_self(node: Node, net: Book) -> None:
    """A pod always reaches itself."""
    node.isolate(a_egress=SHUT_EGRESS, a_ingress=SHUT_INGRESS)
    out = node.from_pod("a", net.ip(net.a, net.a) / syn() / Raw(b"x"))
    assert out.drops == {}


def test_endpoint_record_is_an_ethernet_header(node: Node) -> None:
    """deliver_to_pod stores mac and host_mac in one go."""
    names = list(Endpoint.__dataclass_fields__)
    assert names[-2:] == ["mac", "host_mac"]
