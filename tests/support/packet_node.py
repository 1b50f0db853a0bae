# SPDX-License-Identifier: Apache-2.0
"""The packet ring's world: one node with two pods, in both address families.

    pod a (dev pa) --+                       +-- uplink (dev ul) -- world
                     +-- node 1 (the tested)-+
    pod b (dev pb) --+                       +-- overlay (dev ov) -- node 2 -- pod r

The devices exist in a network namespace of the test, so that interface numbers and the FIB
are real; packets only pass through BPF_PROG_TEST_RUN.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from support.kernel import KERNEL, XDP_INGRESS_KERNEL
from support.namespaces import NetNs
from weir.api.address import Addr, parse
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.records import (
    Address,
    AddressFlag,
    Backend,
    BackendKey,
    CtEntry,
    CtKey,
    DropReason,
    Endpoint,
    Isolation,
    PolicyKey,
    PolicyLevel,
    PolicyOrder,
    PolicyVerdict,
    PrefixKey,
    Route,
    RouteFlag,
    Service,
    ServiceKey,
    Verdict,
)

DEVICES = ("pa", "pb", "ul", "ov")
GATEWAY_MAC = "02:00:00:00:00:01"
PEER_MAC = "02:00:00:00:00:02"
POD_MACS = {"a": "02:00:00:00:01:0a", "b": "02:00:00:00:01:0b"}
HOST_MACS = {"a": "02:00:00:00:02:0a", "b": "02:00:00:00:02:0b"}
CLASS_A, CLASS_B, CLASS_R, CLASS_NODE = 16, 17, 18, 19
ORDER = PolicyOrder.NETWORK_POLICY
RULES_A_EGRESS, RULES_B_INGRESS, RULES_A_INGRESS, RULES_B_EGRESS = 101, 102, 103, 104


@dataclass(frozen=True)
class Book:
    """Addresses of one family."""

    family: int
    a: str
    b: str
    r: str
    unknown: str
    stray: str
    node: str
    node2: str
    world: str
    world2: str
    vip: str
    pod_cidr: tuple[str, int]
    remote_cidr: tuple[str, int]

    def ip(self, source: str, destination: str, **fields: Any) -> Packet:
        layer = IP if self.family == 4 else IPv6
        return layer(src=source, dst=destination, **fields)

    def ttl(self, value: int) -> dict[str, int]:
        return {"ttl": value} if self.family == 4 else {"hlim": value}

    def echo(self, identifier: int, reply: bool = False) -> Packet:
        if self.family == 4:
            return ICMP(type=0 if reply else 8, id=identifier, seq=1) / b"ping"
        layer = ICMPv6EchoReply if reply else ICMPv6EchoRequest
        return layer(id=identifier, seq=1, data=b"ping")

    @property
    def icmp_proto(self) -> int:
        return 1 if self.family == 4 else 58


BOOKS = {
    4: Book(
        family=4, a="10.0.1.2", b="10.0.1.3", r="10.0.2.2", unknown="10.0.2.99",
        stray="10.0.1.99", node="192.0.2.1", node2="192.0.2.2", world="198.51.100.9",
        world2="203.0.113.5",
        vip="10.96.0.10", pod_cidr=("10.0.1.0", 24), remote_cidr=("10.0.2.0", 24),
    ),
    6: Book(
        family=6, a="fd00:1::2", b="fd00:1::3", r="fd00:2::2", unknown="fd00:2::99",
        stray="fd00:1::99", node="2001:db8::1", node2="2001:db8::2", world="2001:db8:f::9",
        world2="2001:db8:e::5",
        vip="fd00:96::10", pod_cidr=("fd00:1::", 64), remote_cidr=("fd00:2::", 64),
    ),
}  # fmt: skip


class World:
    """Devices of the tested node. `index`: of each by its name."""

    def __init__(self) -> None:
        self.ns = NetNs()
        for name in DEVICES:
            self.ns.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
            self.ns.run("ip", "link", "set", "dev", f"{name}-peer", "up")
            self.ns.run("ip", "link", "set", "dev", name, "up")
        self.ns.run("ip", "link", "set", "dev", "ul", "address", GATEWAY_MAC)
        self.ns.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for book, bits, gateway in (
            (BOOKS[4], "24", "192.0.2.254"),
            (BOOKS[6], "64", "2001:db8::fe"),
        ):
            nodad = ["nodad"] if book.family == 6 else []
            self.ns.run("ip", "addr", "add", f"{book.node}/{bits}", "dev", "ul", *nodad)
            self.ns.run("ip", f"-{book.family}", "route", "add", "default", "via", gateway)
            neighbour = [gateway, "lladdr", PEER_MAC, "dev", "ul"]
            self.ns.run("ip", f"-{book.family}", "neigh", "add", *neighbour)
        with self.ns.entered():
            self.index = {name: socket.if_nametoindex(name) for name in DEVICES}


def cidr(text: tuple[str, int], family: int) -> PrefixKey:
    return PrefixKey(text[1] + (96 if family == 4 else 0), parse(text[0]))


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


@dataclass
class Outcome:
    """What a run did to a packet."""

    code: int
    packet: bytes
    drops: dict[DropReason, int]
    duration_ns: int

    @property
    def frame(self) -> Packet:
        return Ether(self.packet)


class Node:
    """The tested node: its tables filled for one family, and its programs."""

    def __init__(self, datapath: Datapath, world: World, book: Book) -> None:
        self.datapath = datapath
        self.tables = datapath.tables
        self.world = world
        self.book = book
        self.index = world.index
        self.isolate()
        self.tables.addresses.update({
            parse(book.a): Address(CLASS_A),
            parse(book.b): Address(CLASS_B),
            parse(book.r): Address(CLASS_R),
            parse(book.node): Address(CLASS_NODE, AddressFlag.LOCAL_HOST),
            parse(book.node2): Address(CLASS_NODE, AddressFlag.REMOTE_NODE),
        })  # fmt: skip
        node2 = parse(book.node2)
        self.tables.routes.update({
            cidr(book.pod_cidr, book.family): Route(
                Addr(bytes(16)), RouteFlag.POD_CIDR | RouteFlag.LOCAL
            ),
            cidr(book.remote_cidr, book.family): Route(
                node2, RouteFlag.POD_CIDR | RouteFlag.TUNNEL
            ),
        })  # fmt: skip
        self.reader = datapath.events()
        datapath.set_event_mask(2 | 4)

    def isolate(
        self, a_egress: Isolation | None = None, a_ingress: Isolation | None = None,
        b_egress: Isolation | None = None, b_ingress: Isolation | None = None,
    ) -> None:  # fmt: skip
        """Writes both endpoints with these policies."""
        none = Isolation()
        for pod, number, egress, ingress in (
            ("a", CLASS_A, a_egress, a_ingress),
            ("b", CLASS_B, b_egress, b_ingress),
        ):
            self.tables.endpoints.update({
                parse(getattr(self.book, pod)): Endpoint(
                    self.index[f"p{pod}"], number, egress or none, ingress or none,
                    mac(POD_MACS[pod]), mac(HOST_MACS[pod]),
                )
            })  # fmt: skip

    def allow(self, rule_set: int, peer: int, rule: int = 7, proto: int = 0, port: int = 0,
              bits: int = PolicyLevel.ANY_PROTOCOL) -> Isolation:  # fmt: skip
        """One row that allows, and the isolation that makes use of it."""
        key = PolicyKey(rule_set, peer, port, proto, bits)
        self.tables.policy.update({key: PolicyVerdict(rule, ORDER, Verdict.ALLOW)})
        return Isolation(rule_set, 1 << bits)

    def forbid(self) -> None:
        """Takes all rules away, as a policy change does."""
        self.tables.policy.delete([key for key, _ in self.tables.policy.items()])
        self.datapath.bump()

    def service(
        self, proto: int, port: int, *backends: tuple[str, int], number: int = 1, at: str = "",
        scope: int = 0, flags: int = 0, affinity_seconds: int = 0, identity: int = 1,
    ) -> None:  # fmt: skip
        """`at`: the frontend's address, the cluster IP unless told."""
        for slot, (address, backend_port) in enumerate(backends):
            backend = Backend(parse(address), backend_port)
            self.tables.backends.update({BackendKey(number, slot): backend})
        key = ServiceKey(parse(at or self.book.vip), port, proto, scope)
        row = Service(number, len(backends), flags, affinity_seconds, identity)
        self.tables.services.update({key: row})

    def run(
        self, program: str, device: str, packet: Packet | bytes, ingress: str = "", repeat: int = 1
    ) -> Outcome:
        """`ingress`: the device by which a packet came that leaves by another."""
        before = self.drops()
        with self.world.ns.entered():
            result = libbpf.run_program(
                self.datapath.programs[program], bytes(packet), ifindex=self.index[device],
                ingress_ifindex=self.index[ingress] if ingress else 0, repeat=repeat,
            )  # fmt: skip
        code = result.retval - (1 << 32) if result.retval >= 1 << 31 else result.retval
        changed = {k: v - before.get(k, 0) for k, v in self.drops().items()}
        drops = {DropReason(k): v for k, v in changed.items() if v}
        return Outcome(code, result.packet, drops, result.duration_ns)

    def run_xdp(self, device: str, packet: Packet | bytes, repeat: int = 1) -> Outcome:
        """One run of the uplink's XDP program on a packet that came in by `device` (by the
        loopback before XDP_INGRESS_KERNEL)."""
        ifindex = self.index[device] if KERNEL >= XDP_INGRESS_KERNEL else 0
        before = self.drops()
        with self.world.ns.entered():
            result = libbpf.run_xdp(
                self.datapath.programs["xdp_uplink"], bytes(packet), ifindex=ifindex,
                repeat=repeat,
            )  # fmt: skip
        changed = {k: v - before.get(k, 0) for k, v in self.drops().items()}
        drops = {DropReason(k): v for k, v in changed.items() if v}
        return Outcome(result.retval, result.packet, drops, result.duration_ns)

    def drops(self) -> dict[int, int]:
        found: dict[int, int] = {}
        for key, value in self.tables.metrics.items():
            if key.reason:
                found[key.reason] = found.get(key.reason, 0) + value.packets
        return found

    def from_pod(self, pod: str, layers: Packet) -> Outcome:
        frame = Ether(src=POD_MACS[pod], dst=HOST_MACS[pod]) / layers
        return self.run("from_pod", f"p{pod}", frame)

    def arrives(self, layers: Packet, program: str = "from_uplink", device: str = "ul") -> Outcome:
        return self.run(program, device, Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)

    def leaves(self, layers: Packet, program: str = "to_uplink", device: str = "ul") -> Outcome:
        return self.run(program, device, Ether(src=GATEWAY_MAC, dst=PEER_MAC) / layers)

    def flows(self) -> dict[CtKey, CtEntry]:
        return dict(self.tables.ct.items())
