# SPDX-License-Identifier: Apache-2.0
"""Runs in test pods beside probe.py: who of hundreds of targets answers, in one go.

A thread for each question, as probe.py has, would take longer than the packets. Here one loop asks
all targets at once, and one loop serves all ports; an answered TCP connection is reset, so that no
TIME_WAIT is left. Standard library only; probe.py loads it where PROBE_MORE names it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import socket
import struct
import threading
import time
from typing import Any

# One letter for each outcome, as `arena.py` reads them.
ANSWER, TIMEOUT, REFUSED, UNREACHABLE, OTHER = "o", ".", "r", "u", "e"
UDP_REPEATS = 3  # within the time limit: a datagram may be lost to neighbour discovery
_RESET = struct.pack("ii", 1, 0)
_UNREACHABLE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM}


def outcome_of(error: int) -> str:
    if error == 0:
        return ANSWER
    if error == errno.ECONNREFUSED:
        return REFUSED
    return UNREACHABLE if error in _UNREACHABLE else OTHER


class Questions:
    """The targets that have not answered yet, by file descriptor."""

    def __init__(self, targets: list[tuple[str, str, int]]) -> None:
        self.outcomes = [TIMEOUT] * len(targets)
        self.open: dict[int, tuple[int, socket.socket, bool]] = {}
        self.poll = select.epoll()
        for number, (protocol, host, port) in enumerate(targets):
            self.start(number, protocol == "udp", host, port)

    def start(self, number: int, udp: bool, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = socket.SOCK_DGRAM if udp else socket.SOCK_STREAM
        client = socket.socket(family, kind | socket.SOCK_NONBLOCK)
        state = client.connect_ex((host, port))
        if state not in {0, errno.EINPROGRESS}:
            self.outcomes[number] = outcome_of(state)
            client.close()
            return
        self.open[client.fileno()] = (number, client, udp)
        self.poll.register(client.fileno(), select.EPOLLIN if udp else select.EPOLLOUT)
        if udp:
            send(client)

    def repeat(self) -> None:
        for _, client, udp in self.open.values():
            if udp:
                send(client)

    def take(self, seconds: float) -> None:
        """Note who answers within that time."""
        for descriptor, _ in self.poll.poll(max(0.0, seconds)):
            number, client, udp = self.open.pop(descriptor)
            error = client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if udp and not error:
                try:
                    client.recv(2048)
                except OSError as problem:
                    error = problem.errno or errno.EIO
            self.outcomes[number] = outcome_of(error)
            self.end(client, udp)

    def end(self, client: socket.socket, udp: bool) -> None:
        if not udp:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        client.close()

    def close(self) -> None:
        for _, client, udp in self.open.values():
            self.end(client, udp)
        self.poll.close()


def send(client: socket.socket) -> None:
    with contextlib.suppress(OSError):  # an error of an earlier one; the poll tells
        client.send(b"ask")


def matrix(targets: list[tuple[str, str, int]], timeout_s: float = 0.3) -> str:
    """Ask all at once; a letter for each."""
    questions = Questions(targets)
    start = time.monotonic()
    repeats = 1
    while questions.open and (passed := time.monotonic() - start) < timeout_s:
        following = timeout_s * repeats / UDP_REPEATS
        if passed >= following:
            questions.repeat()
            repeats += 1
        questions.take(min(following, timeout_s) - passed)
    questions.close()
    return "".join(questions.outcomes)


def becomes(target: tuple[str, str, int], letter: str, deadline_s: float) -> dict[str, Any]:
    """Ask until that is the outcome."""
    start = time.monotonic()
    timeout_s = 0.15 if letter == TIMEOUT else 0.06
    while (last := matrix([target], timeout_s)) != letter:
        if time.monotonic() - start > deadline_s:
            break
        time.sleep(0.01)
    return {"last": last, "seconds": round(time.monotonic() - start, 3)}


def listen(ports: list[int]) -> None:
    """Serve these ports in TCP and UDP, from a thread."""
    servers: dict[int, socket.socket] = {}
    poll = select.epoll()
    for port in ports:
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            server = socket.socket(socket.AF_INET6, kind | socket.SOCK_NONBLOCK)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            server.bind(("::", port))
            if kind == socket.SOCK_STREAM:
                server.listen(4096)
            else:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            servers[server.fileno()] = server
            poll.register(server.fileno(), select.EPOLLIN)
    threading.Thread(target=serve, args=(poll, servers), daemon=True).start()


def serve(poll: select.epoll, servers: dict[int, socket.socket]) -> None:
    name = os.environ.get("PROBE_NAME", "")
    answer = json.dumps({"name": name}).encode()
    while True:
        for descriptor, _ in poll.poll():
            server = servers[descriptor]
            with contextlib.suppress(OSError):
                if server.type == socket.SOCK_STREAM:
                    server.accept()[0].close()
                else:  # answers from the address that was asked
                    _, control, _, peer = server.recvmsg(2048, socket.CMSG_SPACE(20))
                    server.sendmsg([answer], control[:1], 0, peer)


ACTIONS = {"matrix": matrix, "becomes": becomes}
if ports := json.loads(os.environ.get("PROBE_PORTS", "[]")):
    listen(ports)
