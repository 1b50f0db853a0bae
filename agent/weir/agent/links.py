# SPDX-License-Identifier: Apache-2.0
"""The node's side of rtnetlink: addresses, the VXLAN device and our host routes.

Builds on the messages of weir.cni.netlink. Routes carry a protocol number of our own, so that
comparing with the kernel never touches anybody else's.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from weir.agent.routes import HostRoute
from weir.api import address
from weir.api.address import Addr, Cidr, cidr
from weir.cni import netlink
from weir.cni.netlink import Message, Netlink

PROTOCOL = 87
"""Of our routes (`ip route` shows `proto 87`)."""
OVERLAY = "weir_vxlan"
VXLAN_PORT = 8472

DELROUTE = 25
IFF_NOARP = 0x80
IFLA_VXLAN_LEARNING, IFLA_VXLAN_PORT, IFLA_VXLAN_COLLECT_METADATA = 7, 15, 25
RTA_PREFSRC = 7
SCOPE_GLOBAL = 0
GROUPS = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """A global address of a device."""

    ifindex: int
    address: Addr
    bits: int = 128  # of its network

    @property
    def network(self) -> Cidr:
        return cidr(self.address, self.bits)


@dataclass(frozen=True, slots=True)
class KernelRoute:
    """A unicast route of the main table."""

    destination: Cidr
    via: Addr | None
    source: Addr | None
    ifindex: int
    ours: bool


class NodeNetlink(Netlink):
    def __enter__(self) -> NodeNetlink:
        return self

    def global_addresses(self) -> list[LinkAddress]:
        body = netlink.IFADDR.pack(0, 0, 0, 0, 0)
        return list(
            self._get("list addresses", netlink.GETADDR, netlink.DUMP, body, _global_address)
        )

    def kernel_routes(self) -> list[KernelRoute]:
        body = netlink.RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)
        return list(self._get("list routes", netlink.GETROUTE, netlink.DUMP, body, _kernel_route))


def create_overlay(mtu: int) -> Message:
    """One device for all tunnels; programs set each packet's tunnel key."""
    data = netlink.nested(
        netlink.INFO_DATA,
        netlink.attribute(IFLA_VXLAN_PORT, struct.pack("!H", VXLAN_PORT)),
        netlink.attribute(IFLA_VXLAN_COLLECT_METADATA, b"\1"),
        netlink.attribute(IFLA_VXLAN_LEARNING, b"\0"),
    )
    info = netlink.nested(
        netlink.IFLA_LINKINFO, netlink.attribute(netlink.INFO_KIND, b"vxlan"), data
    )
    flags = IFF_NOARP | netlink.IFF_UP
    body = netlink.IFINFO.pack(0, 0, 0, flags, flags)
    body += netlink.attribute(netlink.IFLA_IFNAME, OVERLAY.encode() + b"\0")
    body += netlink.attribute(netlink.IFLA_MTU, netlink.U32.pack(mtu)) + info
    kind = netlink.NEWLINK
    return Message(f"create the device {OVERLAY}", kind, netlink.CREATE | netlink.EXCL, body)


def set_mtu(index: int, mtu: int, *, up: bool = False) -> Message:
    """Up only where asked for: a pod's host end must not be before its programs are attached."""
    flags = netlink.IFF_UP if up else 0
    body = netlink.IFINFO.pack(0, 0, index, flags, flags)
    body += netlink.attribute(netlink.IFLA_MTU, netlink.U32.pack(mtu))
    return Message(f"set the MTU of the link with index {index}", netlink.SETLINK, 0, body)


def add_host_route(route: HostRoute, ifindex: int) -> Message:
    family, body = _route(route.destination, route.via, ifindex)
    if route.source is not None:
        body += netlink.attribute(RTA_PREFSRC, _raw(route.source))
    what = f"add the route to {route.destination.text()}"
    scope = netlink.SCOPE_UNIVERSE
    if route.via is None and family == socket.AF_INET:
        scope = netlink.SCOPE_LINK
    return Message(
        what, netlink.NEWROUTE, netlink.CREATE | netlink.REPLACE, _header(route, scope) + body
    )


def delete_host_route(route: KernelRoute) -> Message:
    """Only ours: the protocol is part of what the kernel matches."""
    _, body = _route(route.destination, route.via, route.ifindex)
    wanted = HostRoute(route.destination, route.via, None)
    fine = frozenset({errno.ESRCH, errno.ENODEV})
    what = f"delete the route to {route.destination.text()}"
    # RT_SCOPE_NOWHERE: any scope.
    return Message(what, DELROUTE, 0, _header(wanted, 255) + body, fine)


def monitor() -> socket.socket:
    """Readable whenever links, addresses or routes change; what it reads does not matter."""
    listener = socket.socket(
        socket.AF_NETLINK,
        socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
        socket.NETLINK_ROUTE,
    )
    listener.bind((0, GROUPS))
    return listener


def _header(route: HostRoute, scope: int) -> bytes:
    family = socket.AF_INET if route.destination.is_ipv4 else socket.AF_INET6
    bits = route.destination.bits - (address.V4_BITS if family == socket.AF_INET else 0)
    flags = netlink.ROUTE_ONLINK if route.via is not None else 0
    return netlink.RTMSG.pack(
        family, bits, 0, 0, netlink.TABLE_MAIN, PROTOCOL, scope, netlink.UNICAST, flags
    )


def _route(destination: Cidr, via: Addr | None, ifindex: int) -> tuple[int, bytes]:
    body = netlink.attribute(netlink.RTA_DST, _raw(destination.address))
    body += netlink.attribute(netlink.RTA_OIF, netlink.U32.pack(ifindex))
    if via is not None:
        body += netlink.attribute(netlink.RTA_GATEWAY, _raw(via))
    return (socket.AF_INET if destination.is_ipv4 else socket.AF_INET6), body


def _raw(addr: Addr) -> bytes:
    return addr[12:] if address.is_ipv4(addr) else addr


def _join(raw: bytes) -> Addr:
    return Addr(address.V4_PREFIX + raw if len(raw) == 4 else raw)


def _global_address(body: bytes) -> LinkAddress | None:
    family, bits, _, scope, index = netlink.IFADDR.unpack_from(body)
    found = netlink.attributes(body[netlink.IFADDR.size :])
    raw = found.get(netlink.IFA_LOCAL) or found.get(netlink.IFA_ADDRESS)
    if not raw or scope != SCOPE_GLOBAL:
        return None
    return LinkAddress(
        index, _join(raw), bits + (address.V4_BITS if family == socket.AF_INET else 0)
    )


def _kernel_route(body: bytes) -> KernelRoute | None:
    family, bits, _, _, table, protocol, _, kind, _ = netlink.RTMSG.unpack_from(body)
    found = netlink.attributes(body[netlink.RTMSG.size :])
    if table != netlink.TABLE_MAIN or kind != netlink.UNICAST or netlink.RTA_OIF not in found:
        return None
    v4 = family == socket.AF_INET
    destination = _join(found.get(netlink.RTA_DST, bytes(4 if v4 else 16)))
    via = found.get(netlink.RTA_GATEWAY)
    source = found.get(RTA_PREFSRC)
    return KernelRoute(
        cidr(destination, bits + (address.V4_BITS if v4 else 0)),
        _join(via) if via else None,
        _join(source) if source else None,
        netlink.U32.unpack(found[netlink.RTA_OIF])[0],
        protocol == PROTOCOL,
    )


def default_devices(routes: list[KernelRoute]) -> Iterator[int]:
    """Indexes of devices with a default route."""
    for route in routes:
        length = address.V4_BITS if route.destination.is_ipv4 else 0
        if route.destination.bits == length:
            yield route.ifindex
