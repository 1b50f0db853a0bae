# SPDX-License-Identifier: Apache-2.0
"""SCTP packets too long for a test run, up to the longest there are, through attached programs."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw
from support import sctp
from support.sctp import Sctp
from support.two_nodes import ADDRESS, TIMEOUT_S, Net, build, link, service

ETHERTYPE = {4: 0x0800, 6: 0x86DD}
HEADER = {4: 20, 6: 40}
MTU = 65535


@pytest.fixture(scope="module")
def net(private_mounts: None) -> Iterator[Net]:
    with ExitStack() as stack:
        made = build(stack, tunnel=False)
        for name, pod in made.one.pods.items():
            made.one.ns.run("ip", "link", "set", f"weir{name}", "mtu", str(MTU))
            pod.run("ip", "link", "set", "eth0", "mtu", str(MTU))
        yield made


class Wire:
    """A pod's end of its link: whole frames of one IP version."""

    def __init__(self, net: Net, pod: str, family: int) -> None:
        self.family, self.address = family, ADDRESS[family][pod]
        with net.where(pod).entered():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self.socket.bind(("eth0", ETHERTYPE[family]))
        self.socket.settimeout(TIMEOUT_S)
        _, mac = link(net.where(pod), "eth0")
        _, gateway = link(net.one.ns, f"weir{pod}")
        self.ethernet = gateway + mac + ETHERTYPE[family].to_bytes(2, "big")

    def send(self, target: str, packet: Sctp) -> None:
        if self.family == 4:
            ip = IP(src=self.address, dst=target, proto=sctp.PROTOCOL)
        else:
            ip = IPv6(src=self.address, dst=target, nh=sctp.PROTOCOL)
        self.socket.send(self.ethernet + bytes(ip / Raw(bytes(packet))))

    def receive(self) -> bytes:
        """The next SCTP packet that reaches the pod."""
        while True:
            frame, source = self.socket.recvfrom(MTU + 14)
            protocol = frame[23] if self.family == 4 else frame[20]
            if source[2] != socket.PACKET_OUTGOING and protocol == sctp.PROTOCOL:
                return frame[14 + HEADER[self.family] :]


def lengths(family: int) -> list[int]:
    """Those that use each constant of the datapath's table, at either end, and random ones."""
    longest = MTU - HEADER[family]
    each_digit = [d * 16**k + extra for k in range(4) for d in range(1, 16) for extra in (0, 2)]
    chance = random.Random(family)
    some = [chance.randrange(sctp.HEADER, longest) for _ in range(100)]
    return [n for n in [*each_digit, *some, longest] if sctp.HEADER <= n <= longest]


@pytest.mark.parametrize("family", [4, 6], ids=["v4", "v6"])
def test_checksum_of_every_length(net: Net, family: int) -> None:
    chance = random.Random(family)
    client, server = Wire(net, "a", family), Wire(net, "b", family)
    with client.socket, server.socket:
        for length in lengths(family):
            port, target, sport = (chance.randrange(1, 65536) for _ in range(3))
            service(net.one, family, sctp.PROTOCOL, port, ("b", target))
            sent = Sctp(sport, port, chance.randbytes(length - sctp.HEADER))
            client.send(ADDRESS[family]["vip"], sent)
            assert server.receive() == bytes(sent.but(dport=target)), length
            answer = Sctp(target, sport, chance.randbytes(length - sctp.HEADER))
            server.send(ADDRESS[family]["a"], answer)
            assert client.receive() == bytes(answer.but(sport=port)), length
