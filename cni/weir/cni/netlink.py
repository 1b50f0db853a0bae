# SPDX-License-Identifier: Apache-2.0
"""The few rtnetlink messages that a pod's wiring needs, typed, and many to a send.

A general netlink library costs ten times as long per pod as the kernel's own work and brings
no types; what is used of the protocol here fits in one module. Numbers are those of
<linux/rtnetlink.h> and its neighbours, which are ABI.

The kernel handles the messages of one send in order and goes on after one that fails, so
each carries the errors that do not matter to it (`Message.fine`).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from weir.api import address
from weir.api.address import Addr
from weir.cni.errors import WiringError

REQUEST, ACK, EXCL, CREATE, REPLACE = 0x1, 0x4, 0x200, 0x400, 0x100
DUMP = 0x300
NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
NEWADDR, GETADDR = 20, 22
NEWROUTE, GETROUTE = 24, 26
NEWNEIGH, GETNEIGH = 28, 30
IFF_UP = 0x1
NESTED = 0x8000
NLMSG_ERROR, NLMSG_DONE = 2, 3
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
ERROR_CAPPED, ERROR_HAS_TEXT = 0x100, 0x200
TABLE_MAIN, PROTOCOL_BOOT, UNICAST = 254, 3, 1
SCOPE_UNIVERSE, SCOPE_LINK = 0, 253
ROUTE_ONLINK = 4
NUD_PERMANENT = 0x80
IFA_F_NODAD = 0x02
IFA_F_NOPREFIXROUTE = 0x200

HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
IFINFO = struct.Struct("=BxHiII")
IFADDR = struct.Struct("=BBBBI")
RTMSG = struct.Struct("=BBBBBBBBI")
NDMSG = struct.Struct("=BxxxiHBB")
U32 = struct.Struct("=I")
RECEIVE = 1 << 18
TIMEOUT_SECONDS = 10

# attribute numbers, by the message they belong to
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_LINKINFO, IFLA_AF_SPEC = 1, 3, 4, 5, 18, 26
IFLA_NET_NS_FD, INFO_KIND, INFO_DATA, VETH_INFO_PEER = 28, 1, 2, 1
INET_CONF, INET6_ADDR_GEN_MODE, ADDR_GEN_NONE = 1, 8, 1
CONF_PROXY_ARP, CONF_ACCEPT_REDIRECTS, CONF_SEND_REDIRECTS, CONF_RP_FILTER = 3, 4, 6, 8
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
RTA_DST, RTA_OIF, RTA_GATEWAY = 1, 4, 5
NDA_DST, NDA_LLADDR = 1, 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Message:
    """One request. `what` names operation and object in errors."""

    what: str
    kind: int
    flags: int
    body: bytes
    fine: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Link:
    """`peer` is the other end's index when the link is one end of a veth pair."""

    index: int
    name: str
    mac: bytes
    mtu: int
    up: bool
    peer: int


@dataclass(frozen=True, slots=True)
class Route:
    """`bits` of 128; `gateway` None for a route straight to the device."""

    destination: Addr
    bits: int
    gateway: Addr | None
    ifindex: int


@dataclass(frozen=True, slots=True)
class Neighbour:
    address: Addr
    mac: bytes
    permanent: bool
    ifindex: int


class NetlinkError(WiringError):
    """The kernel refused a message; `errno` is its reason, the details have its own words."""

    def __init__(self, what: str, number: int, words: str = "") -> None:
        super().__init__(f"cannot {what}", details=words or os.strerror(number))
        self.what = what
        self.errno = number


def attribute(number: int, data: bytes) -> bytes:
    pad = -len(data) % 4
    return ATTRIBUTE.pack(4 + len(data), number) + data + b"\0" * pad


def nested(number: int, *attributes: bytes) -> bytes:
    return attribute(number | NESTED, b"".join(attributes))


def attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, number = ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[number & 0x3FFF] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def create_veth(
    name: str, mac: bytes, mtu: int, peer_name: str, peer_mac: bytes, netns_fd: int
) -> Message:
    """A veth pair, both ends down, the peer in the namespace behind `netns_fd`."""
    ends = attribute(IFLA_MTU, U32.pack(mtu))
    peer = IFINFO.pack(0, 0, 0, 0, 0) + ends + attribute(IFLA_IFNAME, peer_name.encode() + b"\0")
    peer += attribute(IFLA_ADDRESS, peer_mac) + attribute(IFLA_NET_NS_FD, U32.pack(netns_fd))
    info = nested(
        IFLA_LINKINFO,
        attribute(INFO_KIND, b"veth"),
        nested(INFO_DATA, attribute(VETH_INFO_PEER, peer)),
    )
    body = IFINFO.pack(0, 0, 0, 0, 0) + ends + attribute(IFLA_IFNAME, name.encode() + b"\0")
    body += attribute(IFLA_ADDRESS, mac) + info
    return Message(f"create the veth pair {name}/{peer_name}", NEWLINK, CREATE | EXCL, body)


def delete_link(name: str) -> Message:
    """No such link is fine."""
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    return Message(f"delete the link {name}", DELLINK, 0, body, frozenset({errno.ENODEV}))


def set_up(index: int) -> Message:
    body = IFINFO.pack(0, 0, index, IFF_UP, IFF_UP)
    return Message(f"set the link with index {index} up", SETLINK, 0, body)


def quiet_host_end(name: str) -> Message:
    """No redirects either way, no proxy ARP, no reverse path filter of its own."""
    conf = (CONF_PROXY_ARP, CONF_ACCEPT_REDIRECTS, CONF_SEND_REDIRECTS, CONF_RP_FILTER)
    ipv4 = nested(socket.AF_INET, nested(INET_CONF, *(attribute(c, U32.pack(0)) for c in conf)))
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    return Message(f"set {name}'s IPv4 options", SETLINK, 0, body + nested(IFLA_AF_SPEC, ipv4))


def no_generated_address(name: str) -> Message:
    """No IPv6 link-local address. Kernels without IPv6 refuse the family, which is fine."""
    mode = attribute(INET6_ADDR_GEN_MODE, bytes([ADDR_GEN_NONE]))
    body = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0")
    body += nested(IFLA_AF_SPEC, nested(socket.AF_INET6, mode))
    fine = frozenset({errno.EAFNOSUPPORT, errno.EINVAL})
    return Message(f"set {name}'s IPv6 options", SETLINK, 0, body, fine)


def add_address(index: int, addr: Addr) -> Message:
    """The address alone, of full length, without duplicate detection and prefix route."""
    family, raw = _split(addr)
    flags = IFA_F_NOPREFIXROUTE | (0 if family == socket.AF_INET else IFA_F_NODAD)
    body = IFADDR.pack(family, len(raw) * 8, flags & 0xFF, SCOPE_UNIVERSE, index)
    body += attribute(IFA_LOCAL, raw) + attribute(IFA_ADDRESS, raw)
    body += attribute(IFA_FLAGS, U32.pack(flags))
    return Message(f"add the address {address.text(addr)}", NEWADDR, CREATE | REPLACE, body)


def add_neighbour(index: int, addr: Addr, mac: bytes) -> Message:
    family, raw = _split(addr)
    body = NDMSG.pack(family, index, NUD_PERMANENT, 0, 0)
    body += attribute(NDA_DST, raw) + attribute(NDA_LLADDR, mac)
    what = f"add the neighbour {address.text(addr)}"
    return Message(what, NEWNEIGH, CREATE | REPLACE, body)


def add_route(index: int, route: Route) -> Message:
    """A device route, or one by a gateway that is taken to be on the link."""
    family, raw = _split(route.destination)
    bits = route.bits - (address.V4_BITS if family == socket.AF_INET else 0)
    scope = SCOPE_UNIVERSE if route.gateway or family == socket.AF_INET6 else SCOPE_LINK
    flags = ROUTE_ONLINK if route.gateway else 0
    body = RTMSG.pack(family, bits, 0, 0, TABLE_MAIN, PROTOCOL_BOOT, scope, UNICAST, flags)
    body += attribute(RTA_DST, raw) if bits else b""
    body += attribute(RTA_OIF, U32.pack(index))
    if route.gateway:
        body += attribute(RTA_GATEWAY, _split(route.gateway)[1])
    what = f"add the route to {address.text(route.destination)}/{bits}"
    return Message(what, NEWROUTE, CREATE | REPLACE, body)


class Netlink:
    """A netlink socket of the calling thread's network namespace, whichever thread uses it later.
    `protocol`: NETLINK_ROUTE, or that of a subclass."""

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.settimeout(TIMEOUT_SECONDS)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, messages: Sequence[Message]) -> None:
        """All of them in one send. NetlinkError of the first that failed; the others are done.

        Only the last one asks for an answer: errors come anyway, and each answer would cost a
        system call and a fight for the interpreter lock.
        """
        first = self._sequence + 1
        last = self._sequence + len(messages)
        parts = []
        for message in messages:
            self._sequence += 1
            length = HEADER.size + len(message.body)
            flags = REQUEST | message.flags | (ACK if self._sequence == last else 0)
            parts.append(HEADER.pack(length, message.kind, flags, self._sequence, 0))
            parts.append(message.body + b"\0" * (-len(message.body) % 4))
        failed = None
        self._transmit(b"".join(parts))
        answered = False
        while not answered:
            for kind, flags, sequence, body in self._receive():
                if kind != NLMSG_ERROR or sequence < first:
                    continue
                answered = sequence == last
                message = messages[sequence - first]
                number = -struct.unpack_from("=i", body)[0]
                if number and number not in message.fine and failed is None:
                    failed = NetlinkError(message.what, number, _words(flags, body, number))
        if failed is not None:
            raise failed

    def link(self, name: str) -> Link | None:
        """The link of that name, or None."""
        body = IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b"\0")
        try:
            return next(self._get(f"look up the link {name}", GETLINK, 0, body, _link), None)
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise

    def links(self) -> list[Link]:
        return list(self._get("list links", GETLINK, DUMP, IFINFO.pack(0, 0, 0, 0, 0), _link))

    def addresses(self, index: int) -> set[Addr]:
        """The addresses of full length on a link."""
        body = IFADDR.pack(0, 0, 0, 0, 0)
        found = self._get("list addresses", GETADDR, DUMP, body, _address)
        return {addr for owner, addr in found if owner == index}

    def routes(self) -> set[Route]:
        """Unicast routes of the main table."""
        body = RTMSG.pack(0, 0, 0, 0, 0, 0, 0, 0, 0)
        return set(self._get("list routes", GETROUTE, DUMP, body, _route))

    def neighbours(self) -> set[Neighbour]:
        body = NDMSG.pack(0, 0, 0, 0, 0)
        return set(self._get("list neighbours", GETNEIGH, DUMP, body, _neighbour))

    def _get(
        self,
        what: str,
        kind: int,
        flags: int,
        body: bytes,
        parse: Callable[[bytes], T | None],
    ) -> Iterator[T]:
        """The answers to a request: one, or all of a dump."""
        self._sequence += 1
        head = HEADER.pack(HEADER.size + len(body), kind, REQUEST | flags, self._sequence, 0)
        self._transmit(head + body)
        while True:
            for answer, answer_flags, sequence, data in self._receive():
                if sequence != self._sequence:
                    continue
                if answer == NLMSG_ERROR:
                    number = -struct.unpack_from("=i", data)[0]
                    raise NetlinkError(what, number, _words(answer_flags, data, number))
                if answer == NLMSG_DONE:
                    return
                parsed = parse(data)
                if parsed is not None:
                    yield parsed
                if flags != DUMP:
                    return

    def _transmit(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            raise NetlinkError("send to netlink", error.errno or errno.EIO) from error

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        try:
            data = self._socket.recv(RECEIVE)
        except OSError as error:
            raise NetlinkError("receive from netlink", error.errno or errno.ETIMEDOUT) from error
        offset = 0
        while offset + HEADER.size <= len(data):
            length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
            if length < HEADER.size:
                break
            yield kind, flags, sequence, data[offset + HEADER.size : offset + length]
            offset += (length + 3) & ~3


def _split(addr: Addr) -> tuple[int, bytes]:
    if address.is_ipv4(addr):
        return socket.AF_INET, addr[12:]
    return socket.AF_INET6, addr


def _join(raw: bytes) -> Addr:
    return Addr(address.V4_PREFIX + raw if len(raw) == 4 else raw)


def _words(flags: int, body: bytes, number: int) -> str:
    """The kernel's own words for an error, after strerror."""
    text = os.strerror(number) if number else ""
    if not flags & ERROR_HAS_TEXT:
        return text
    skip = 4 + HEADER.size
    if not flags & ERROR_CAPPED:
        skip = 4 + HEADER.unpack_from(body, 4)[0]
    words = attributes(body[(skip + 3) & ~3 :]).get(1, b"")
    return f"{text}: {words.rstrip(bytes(1)).decode(errors='replace')}" if words else text


def _link(body: bytes) -> Link | None:
    _, _, index, flags, _ = IFINFO.unpack_from(body)
    found = attributes(body[IFINFO.size :])
    return Link(
        index=index,
        name=found[IFLA_IFNAME].rstrip(b"\0").decode(),
        mac=found.get(IFLA_ADDRESS, b""),
        mtu=U32.unpack(found[IFLA_MTU])[0],
        up=bool(flags & IFF_UP),
        peer=U32.unpack(found[IFLA_LINK])[0] if IFLA_LINK in found else 0,
    )


def _address(body: bytes) -> tuple[int, Addr] | None:
    _, bits, _, _, index = IFADDR.unpack_from(body)
    found = attributes(body[IFADDR.size :])
    raw = found.get(IFA_LOCAL) or found.get(IFA_ADDRESS, b"")
    return (index, _join(raw)) if raw and bits == len(raw) * 8 else None


def _route(body: bytes) -> Route | None:
    family, bits, _, _, table, _, _, kind, _ = RTMSG.unpack_from(body)
    found = attributes(body[RTMSG.size :])
    if table != TABLE_MAIN or kind != UNICAST or RTA_OIF not in found:
        return None
    empty = bytes(4 if family == socket.AF_INET else 16)
    gateway = found.get(RTA_GATEWAY)
    return Route(
        destination=_join(found.get(RTA_DST, empty)),
        bits=bits + (address.V4_BITS if family == socket.AF_INET else 0),
        gateway=_join(gateway) if gateway else None,
        ifindex=U32.unpack(found[RTA_OIF])[0],
    )


def _neighbour(body: bytes) -> Neighbour | None:
    _, index, state, _, _ = NDMSG.unpack_from(body)
    found = attributes(body[NDMSG.size :])
    if NDA_DST not in found or NDA_LLADDR not in found:
        return None
    permanent = bool(state & NUD_PERMANENT)
    return Neighbour(_join(found[NDA_DST]), found[NDA_LLADDR], permanent, index)
