# SPDX-License-Identifier: Apache-2.0
"""Destroys connected UDP sockets whose backend has gone.

A socket that connect() sent to a backend names no address in its calls, so no hook sees it again:
it would send into the void until its program gives up. SOCK_DESTROY (sock_diag) ends it: recv()
says ECONNABORTED, send() that there is no destination, and its program connects anew. Which sockets
that are tells `sock_nat` by cookie, so a socket that chose the same address itself is never one.

Numbers are those of <linux/sock_diag.h> and <linux/inet_diag.h>, which are ABI.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from weir.api.address import V4_PREFIX, Addr
from weir.cni.errors import WiringError
from weir.cni.netlink import DUMP, Message, Netlink, NetlinkError
from weir.cni.netns import inside, open_netns

logger = logging.getLogger(__name__)

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 20, 21
ESTABLISHED = 1
ANY_STATE = 0xFFFF_FFFF
SO_COOKIE = 57
# struct inet_diag_req_v2 and the head of inet_diag_msg; the identity is inet_diag_sockid.
REQUEST = struct.Struct("=BBBxI")
ANSWER = struct.Struct("=BBBB")
IDENTITY = struct.Struct(">HH16s16s4x8s")
GONE = frozenset({errno.ENOENT})
DISCARD = 9

Peer = tuple[Addr, int]


@dataclass(frozen=True, slots=True)
class Connected:
    """A connected UDP socket. `identity`: what the kernel finds it by."""

    cookie: int
    peer: Peer
    family: int
    identity: bytes


class SockDiag(Netlink):
    """A socket for questions about the sockets of the calling thread's network namespace."""

    def __init__(self) -> None:
        super().__init__(NETLINK_SOCK_DIAG)

    def connected_udp(self) -> Iterator[Connected]:
        for family in (socket.AF_INET, socket.AF_INET6):
            body = REQUEST.pack(family, socket.IPPROTO_UDP, 0, 1 << ESTABLISHED)
            body += bytes(IDENTITY.size)
            what = "list connected UDP sockets"
            try:
                yield from self._get(what, SOCK_DIAG_BY_FAMILY, DUMP, body, _connected)
            except NetlinkError as error:
                if error.errno not in {errno.ENOENT, errno.EAFNOSUPPORT}:  # a family it has not
                    raise

    def destroy(self, victim: Connected) -> None:
        """One that is gone already is fine."""
        body = REQUEST.pack(victim.family, socket.IPPROTO_UDP, 0, ANY_STATE) + victim.identity
        self.send([Message(f"destroy a UDP socket to {victim.peer}", SOCK_DESTROY, 0, body, GONE)])


def _connected(body: bytes) -> Connected:
    family = ANSWER.unpack_from(body)[0]
    identity = body[ANSWER.size : ANSWER.size + IDENTITY.size]
    _, port, _, raw, cookie = IDENTITY.unpack(identity)
    address = Addr(V4_PREFIX + raw[:4] if family == socket.AF_INET else raw)
    return Connected(int.from_bytes(cookie, "little"), (address, port), family, identity)


def can_destroy() -> bool:
    """Whether this kernel has SOCK_DESTROY for UDP (CONFIG_INET_DIAG_DESTROY, and udp_diag): tried
    with a socket of our own. It blocks."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own, SockDiag() as diag:
            own.connect(("127.0.0.1", DISCARD))
            cookie = int.from_bytes(own.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
            for found in list(diag.connected_udp()):
                if found.cookie == cookie:
                    diag.destroy(found)
            return own.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED
    except (OSError, NetlinkError) as error:
        logger.info("sockets to vanished backends cannot be destroyed: %s", error)
        return False


def destroy(victims: Mapping[int, Collection[Peer]], namespaces: Iterable[str]) -> int:
    """Destroys the connected UDP sockets with these cookies that are connected to these peers, in
    the node's own network namespace and those at the paths given. Returns how many. It blocks, and
    not for the main thread, as it enters namespaces."""
    done = _destroy_here(victims, "the node")
    for path in namespaces:
        if done == len(victims):
            break
        try:
            fd = open_netns(path)
        except WiringError as error:
            logger.debug("%s", error)
            continue
        try:
            with inside(fd):
                done += _destroy_here(victims, path)
        except WiringError as error:
            logger.warning("sockets in %s: %s", path, error)
        finally:
            os.close(fd)
    return done


def _destroy_here(victims: Mapping[int, Collection[Peer]], where: str) -> int:
    """As many as can be ended: nobody comes back for the others."""
    done = 0
    try:
        with SockDiag() as diag:
            found = [one for one in diag.connected_udp() if one.peer in victims.get(one.cookie, ())]
            for one in found:
                try:
                    diag.destroy(one)
                    done += 1
                except NetlinkError as error:
                    logger.warning("a socket of %s: %s", where, error)
    except (OSError, NetlinkError) as error:
        logger.warning("sockets of %s: %s", where, error)
    return done
