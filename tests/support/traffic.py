# SPDX-License-Identifier: Apache-2.0
"""Traffic between namespaces, a policy about it, and waiting for it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from support.namespaces import NetNs
from weir.api.v1 import weir_pb2 as pb

DENIED_SECONDS = 0.4


class Echo:
    """Answers TCP connections and UDP packets in a pod, until closed."""

    def __init__(self, pod: NetNs, port: int, family: int = socket.AF_INET6) -> None:
        with pod.entered():
            self.tcp = socket.create_server(("::", port), family=family, dualstack_ipv6=True)
            self.udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            self.udp.bind(("::", port))
        for work in (self._tcp, self._udp):
            threading.Thread(target=work, daemon=True).start()

    def _tcp(self) -> None:
        while True:
            try:
                connection, _ = self.tcp.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(4096):
                    connection.sendall(data)
            except OSError:
                return

    def _udp(self) -> None:
        while True:
            try:
                data, peer = self.udp.recvfrom(4096)
                self.udp.sendto(data, peer)
            except (OSError, TypeError):  # shut down: no peer
                return

    def close(self) -> None:
        for listener in (self.tcp, self.udp):
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def connects(source: NetNs, address: str, port: int, seconds: float = DENIED_SECONDS) -> bool:
    """Whether a TCP connection carries a byte there and back."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with source.entered():
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(seconds)
    with client:
        try:
            client.connect((address, port))
            client.sendall(b"x")
            return client.recv(1) == b"x"
        except OSError:
            return False


def deny_all(name: str, subject: int, *allowed: int) -> pb.Resource:
    rules = [pb.Rule(index=0, peers=allowed)] if allowed else []
    policy = pb.Policy(namespace="ns", name=name, subject=subject, ingress=True, rules=rules)
    return pb.Resource(name=f"policy/ns/{name}", policy=policy)


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
