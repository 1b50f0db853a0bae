# SPDX-License-Identifier: Apache-2.0
"""Two nodes with real devices, the real programs and tables that a test fills by hand.

pod a, pod b -- node 1 -- wire -- node 2 -- pod r
                            |
                          world
"""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from dataclasses import dataclass

from support.datapaths import SMALL, clear, place
from support.namespaces import NetNs
from weir.api.address import Addr, parse
from weir.datapath.datapath import Datapath
from weir.datapath.records import (
    Address,
    AddressFlag,
    Backend,
    BackendKey,
    DropReason,
    Endpoint,
    Isolation,
    PrefixKey,
    Route,
    RouteFlag,
    Service,
    ServiceKey,
)
from weir.datapath.settings import Settings

ADDRESS = {
    4: {"a": "10.0.1.2", "b": "10.0.1.3", "r": "10.0.2.2", "node1": "192.0.2.1",
        "node2": "192.0.2.2", "world": "192.0.2.9", "vip": "10.96.0.10"},
    6: {"a": "fd00:1::2", "b": "fd00:1::3", "r": "fd00:2::2", "node1": "2001:db8::1",
        "node2": "2001:db8::2", "world": "2001:db8::9", "vip": "fd00:96::10"},
}  # fmt: skip
POD_CIDR = {4: {1: "10.0.1.0", 2: "10.0.2.0"}, 6: {1: "fd00:1::", 2: "fd00:2::"}}
BITS = {4: 24, 6: 64}
GATEWAY = {4: "169.254.1.1", 6: "fe80::1"}
OVERLAY_MTU = 1430
TIMEOUT_S = 3.0


def link(ns: NetNs, name: str) -> tuple[int, bytes]:
    [found] = json.loads(ns.run("ip", "-j", "link", "show", "dev", name))
    return found["ifindex"], bytes.fromhex(found["address"].replace(":", ""))


class Host:
    """One node: its namespace, installation and pods."""

    def __init__(self, number: int, stack: ExitStack, tunnel: bool) -> None:
        self.number = number
        self.ns = NetNs()
        stack.callback(self.ns.close)
        self.ns.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        self.tunnel = tunnel
        self.root, self.cgroup = stack.enter_context(place())
        self.stack = stack
        self.pods: dict[str, NetNs] = {}

    def open(self) -> None:
        """After the uplink is there: the overlay device, programs, routes."""
        overlay = 0
        if self.tunnel:
            self.ns.run("ip", "link", "add", "weir_vxlan", "type", "vxlan", "external", "dstport",
                        "8472", "nolearning")  # fmt: skip
            self.ns.run(
                "ip", "link", "set", "weir_vxlan", "up", "mtu", str(OVERLAY_MTU), "arp", "off"
            )
            overlay, _ = link(self.ns, "weir_vxlan")
        settings = Settings(
            node_ipv4=parse(ADDRESS[4][f"node{self.number}"]),
            node_ipv6=parse(ADDRESS[6][f"node{self.number}"]),
            overlay_ifindex=overlay, overlay_mtu=OVERLAY_MTU, tunnel=self.tunnel, masquerade=True,
        )  # fmt: skip
        self.datapath = Datapath.open(self.root, self.cgroup, settings, SMALL)
        self.stack.callback(Datapath.remove, self.root)
        self.stack.callback(self.datapath.close)
        clear(self.datapath)
        other = 3 - self.number
        with self.ns.entered():
            self.datapath.attach_uplink("uplink")
            if self.tunnel:
                self.datapath.attach_overlay("weir_vxlan")
        for family in (4, 6):
            me, them = (ADDRESS[family][f"node{n}"] for n in (self.number, other))
            cidr = f"{POD_CIDR[family][other]}/{BITS[family]}"
            way = ["dev", "weir_vxlan", "src", me] if self.tunnel else ["via", them]
            self.ns.run("ip", f"-{family}", "route", "add", cidr, *way)
            tables = self.datapath.tables
            tables.addresses.update({
                parse(me): Address(0, AddressFlag.LOCAL_HOST),
                parse(them): Address(2, AddressFlag.REMOTE_NODE),
            })  # fmt: skip
            flag = RouteFlag.TUNNEL if self.tunnel else RouteFlag.NO_MASQUERADE
            node = parse(ADDRESS[4][f"node{other}"])
            tables.routes.update({
                self.prefix(family, self.number): Route(
                    Addr(bytes(16)), RouteFlag.POD_CIDR | RouteFlag.LOCAL
                ),
                self.prefix(family, other): Route(node, RouteFlag.POD_CIDR | flag),
            })  # fmt: skip
            if self.tunnel:
                tables.routes.update({PrefixKey(128, parse(them)): Route(node, RouteFlag.TUNNEL)})

    @staticmethod
    def prefix(family: int, number: int) -> PrefixKey:
        bits = BITS[family] + (96 if family == 4 else 0)
        return PrefixKey(bits, parse(POD_CIDR[family][number]))

    def add_pod(self, name: str, number: int) -> None:
        pod = NetNs()
        self.stack.callback(pod.close)
        self.pods[name] = pod
        device = f"weir{name}"
        self.ns.run("ip", "link", "add", device, "type", "veth", "peer", "name", "eth0",
                    "netns", pod.path)  # fmt: skip
        pod_index, mac = link(pod, "eth0")
        index, host_mac = link(self.ns, device)
        assert pod_index
        for ns, dev in ((pod, "eth0"), (self.ns, device)):
            ns.run("sysctl", "-qw", f"net.ipv6.conf.{dev}.accept_dad=0")
            ns.run("ip", "link", "set", dev, "up")
        for family in (4, 6):
            address, gateway = ADDRESS[family][name], GATEWAY[family]
            full = "32" if family == 4 else "128"
            nodad = ["nodad"] if family == 6 else []
            pod.run("ip", "addr", "add", f"{address}/{full}", "dev", "eth0", *nodad)
            pod.run("ip", f"-{family}", "route", "add", gateway, "dev", "eth0")
            pod.run("ip", f"-{family}", "route", "add", "default", "via", gateway, "dev", "eth0")
            pod.run("ip", "neigh", "add", gateway, "lladdr", host_mac.hex(":"), "dev", "eth0",
                    "nud", "permanent")  # fmt: skip
            self.ns.run("ip", f"-{family}", "route", "add", f"{address}/{full}", "dev", device)
            self.ns.run("ip", "neigh", "add", address, "lladdr", mac.hex(":"), "dev", device,
                        "nud", "permanent")  # fmt: skip
        self.wire(name, number, index, mac, host_mac)
        with self.ns.entered():
            self.datapath.attach_pod(device)

    def wire(self, name: str, number: int, index: int, mac: bytes, host_mac: bytes) -> None:
        for family in (4, 6):
            address = parse(ADDRESS[family][name])
            row = Endpoint(index, number, Isolation(), Isolation(), mac, host_mac)
            self.datapath.tables.endpoints.update({address: row})

    def drops(self) -> dict[DropReason, int]:
        rows = self.datapath.tables.metrics.items()
        quiet = {
            DropReason.NONE, DropReason.NOT_UNICAST, DropReason.UNSUPPORTED_L2, DropReason.TOO_BIG,
        }  # fmt: skip
        return {DropReason(k.reason): v.packets for k, v in rows if k.reason not in quiet}


@dataclass
class Net:
    one: Host
    two: Host
    world: NetNs

    def where(self, name: str) -> NetNs:
        places = {"world": self.world, "node1": self.one.ns, "node2": self.two.ns}
        return {**places, **self.one.pods, **self.two.pods}[name]


def build(stack: ExitStack, tunnel: bool) -> Net:
    world = NetNs()
    stack.callback(world.close)
    world.run("ip", "link", "add", "bridge0", "type", "bridge")
    world.run("ip", "link", "set", "bridge0", "up")
    hosts = [Host(number, stack, tunnel) for number in (1, 2)]
    for family in (4, 6):
        nodad = ["nodad"] if family == 6 else []
        world.run(
            "ip",
            "addr",
            "add",
            f"{ADDRESS[family]['world']}/{BITS[family]}",
            "dev",
            "bridge0",
            *nodad,
        )
    for host in hosts:
        port = f"port{host.number}"
        host.ns.run("ip", "link", "add", "uplink", "type", "veth", "peer", "name", port, "netns",
                    world.path)  # fmt: skip
        world.run("ip", "link", "set", port, "master", "bridge0", "up")
        host.ns.run("ip", "link", "set", "uplink", "up")
        for family in (4, 6):
            nodad = ["nodad"] if family == 6 else []
            address = ADDRESS[family][f"node{host.number}"]
            host.ns.run("ip", "addr", "add", f"{address}/{BITS[family]}", "dev", "uplink", *nodad)
        host.open()
    hosts[0].add_pod("a", 16)
    hosts[0].add_pod("b", 17)
    hosts[1].add_pod("r", 18)
    for host in hosts:
        for family in (4, 6):
            for name, number in (("a", 16), ("b", 17), ("r", 18)):
                row = {parse(ADDRESS[family][name]): Address(number)}
                host.datapath.tables.addresses.update(row)
    return Net(hosts[0], hosts[1], world)


def sock(ns: NetNs, family: int, kind: socket.SocketKind, protocol: int = 0) -> socket.socket:
    with ns.entered():
        family_number = socket.AF_INET if family == 4 else socket.AF_INET6
        made = socket.socket(family_number, kind, protocol)
    made.settimeout(TIMEOUT_S)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return made


def service(host: Host, family: int, protocol: int, port: int, *backends: tuple[str, int],
            address: str = "vip") -> None:  # fmt: skip
    """A Service at the address of that name, as the host's programs see it."""
    tables = host.datapath.tables
    number = port << 8 | family
    for slot, (name, backend_port) in enumerate(backends):
        row = {BackendKey(number, slot): Backend(parse(ADDRESS[family][name]), backend_port)}
        tables.backends.update(row)
    key = ServiceKey(parse(ADDRESS[family][address]), port, protocol, 0)
    tables.services.update({key: Service(number, len(backends), 0, 0)})
