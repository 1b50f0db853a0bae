# SPDX-License-Identifier: Apache-2.0
"""Tells the local segment that this node has a load balancer's address now.

The programs answer who asks (`announced`); but neighbours that remember another node would go on
sending there. So an address that comes is told without being asked, by gratuitous ARP (RFC 5227)
or an unsolicited neighbour advertisement (RFC 4861, 7.2.6), and again a few times, since frames
get lost and the node that had it may have answered a last request in between.

Neighbours ask for an IPv6 address by its solicited-node multicast group, which the device takes
in only while somebody is in the group: that is us, with a socket an address.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping

from weir.agent.announced import Segment
from weir.api.address import Addr, is_ipv4, text

logger = logging.getLogger(__name__)

REPEAT_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0)
RETRY_SECONDS = 5.0
BROADCAST = b"\xff" * 6
ALL_NODES = bytes.fromhex("ff020000000000000000000000000001")
ALL_NODES_MAC = bytes.fromhex("333300000001")
GROUP_PREFIX = bytes.fromhex("ff0200000000000000000001ff")
ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0806, 0x86DD
ICMPV6 = 58
ADVERTISEMENT = 136
OVERRIDE = 0x2000_0000


class Herald:
    """`announcing`: what this node announces, as it is at present."""

    def __init__(self, announcing: Callable[[], Mapping[Addr, Segment]]) -> None:
        self._announcing = announcing
        self._told: dict[Addr, Segment] = {}
        self._due: dict[Addr, list[float]] = {}  # latest first
        self._groups: dict[Addr, socket.socket] = {}
        self._error = ""
        self.sent = 0

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled. `changed` returns an awaitable that ends when something may have."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self.converge(loop.time())
                nearest = min((times[-1] for times in self._due.values()), default=None)
                try:
                    async with asyncio.timeout_at(nearest):
                        await changed()
                except TimeoutError:
                    continue
        finally:
            self.close()

    def close(self) -> None:
        while self._groups:
            self._groups.popitem()[1].close()

    def converge(self, now: float) -> None:
        """Tell what is new, and again what is due. Does not wait for anything."""
        announcing = self._announcing()
        for addr in [addr for addr in self._told if announcing.get(addr) != self._told[addr]]:
            logger.info("%s: announced no more at %s", text(addr), self._told[addr].device)
            del self._told[addr]
            self._due.pop(addr, None)
            self._leave(addr)
        for addr, segment in announcing.items():
            if addr not in self._told:
                logger.info("%s: announced at %s", text(addr), segment.device)
                self._told[addr] = segment
                self._due[addr] = [now + seconds for seconds in reversed(REPEAT_SECONDS)]
        due = [addr for addr, times in self._due.items() if times[-1] <= now]
        if due:
            self._tell(due, now)

    def _tell(self, due: list[Addr], now: float) -> None:
        try:
            out = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
        except OSError as error:
            for addr in due:
                self._failed(addr, now, error)
            return
        with out:
            for addr in due:
                segment, times = self._told[addr], self._due[addr]
                try:
                    self._join(addr, segment)
                    for frame in frames(addr, segment.mac):
                        out.sendto(frame, (segment.device, 0))
                        self.sent += 1
                except OSError as error:
                    self._failed(addr, now, error)
                    continue
                while times and times[-1] <= now:
                    times.pop()
                if not times:
                    del self._due[addr]

    def _failed(self, addr: Addr, now: float, error: OSError) -> None:
        self._due[addr][-1] = now + RETRY_SECONDS
        words = f"{self._told[addr].device}: {error.strerror}"
        if words != self._error:  # once for all addresses
            logger.warning("announcing %s at %s; again and again", text(addr), words)
        self._error = words

    def _join(self, addr: Addr, segment: Segment) -> None:
        if is_ipv4(addr) or addr in self._groups:
            return
        member = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        try:
            request = solicited_node(addr) + struct.pack("@i", segment.ifindex)
            member.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
        except OSError:
            member.close()
            raise
        self._groups[addr] = member

    def _leave(self, addr: Addr) -> None:
        if addr in self._groups:
            self._groups.pop(addr).close()


def solicited_node(addr: Addr) -> bytes:
    """The multicast group that is asked for an IPv6 address (RFC 4291, 2.7.1)."""
    return GROUP_PREFIX + addr[13:]


def frames(addr: Addr, mac: bytes) -> list[bytes]:
    """Ethernet frames that tell that `addr` is at `mac`."""
    if is_ipv4(addr):
        # Some heed requests alone, some replies alone.
        return [_arp(addr, mac, operation) for operation in (1, 2)]
    return [_advertisement(addr, mac)]


def _arp(addr: Addr, mac: bytes, operation: int) -> bytes:
    ipv4 = addr[12:]
    # A reply that is not about its own sender's MAC is taken for an ordinary one.
    target = mac if operation == 2 else bytes(6)
    head = struct.pack("!6s6sH", BROADCAST, mac, ETHERTYPE_ARP)
    body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return head + body + mac + ipv4 + target + ipv4


def _advertisement(addr: Addr, mac: bytes) -> bytes:
    def message(checksum: int) -> bytes:
        fixed = struct.pack("!BBHI", ADVERTISEMENT, 0, checksum, OVERRIDE)
        return fixed + addr + struct.pack("!BB6s", 2, 1, mac)

    length = len(message(0))
    pseudo = addr + ALL_NODES + struct.pack("!II", length, ICMPV6)
    total = sum(struct.unpack("!36H", pseudo + message(0)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    ip = struct.pack("!IHBB", 6 << 28, length, ICMPV6, 255) + addr + ALL_NODES
    head = struct.pack("!6s6sH", ALL_NODES_MAC, mac, ETHERTYPE_IPV6)
    return head + ip + message(~total & 0xFFFF)
