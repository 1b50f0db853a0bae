# SPDX-License-Identifier: Apache-2.0
"""What policy costs a packet in from_pod: new flows between two pods with 0, 1 and 1,000 rules.

By BPF_PROG_TEST_RUN. A new flow is new once, so all runs are single ones, whose clock costs some
50 ns; what took turns with them has that too. Both pods are on the node, so each new flow is judged
twice: egress of the one, ingress of the other.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from statistics import median

from bench import load, result
from bench.errors import BenchError
from bench.from_pod import checksum
from bench.namespaces import Namespace
from bench.weir_node import CLIENT_CLASS, SERVER_CLASS, WeirNode, weir_node
from weir.agent.ports import PortPrefix, prefixes
from weir.cni.endpoint import LocalEndpoint
from weir.datapath import libbpf
from weir.datapath.records import (
    Isolation,
    IsolationFlag,
    PolicyKey,
    PolicyLevel,
    PolicyOrder,
    PolicyVerdict,
    Verdict,
)

UDP = 17
RULES = 1000
PORT = 20_000  # within the last rule of each
BATCHES = 15
RUNS = 300
TC_ACT_REDIRECT = 7
FIRST_RULE_SET = 1000


@dataclass(frozen=True, slots=True)
class Case:
    """Rules by their ports, for the one peer; `tiers`: of a ClusterNetworkPolicy."""

    name: str
    ranges: tuple[tuple[int, int], ...]
    tiers: bool = False

    def matches(self) -> Iterator[tuple[int, PortPrefix]]:
        """With the rule's place. A port prefix has one row."""
        seen: set[PortPrefix] = set()
        for order, (first, last) in enumerate(self.ranges):
            for match in prefixes(UDP, first, last):
                if match not in seen:
                    seen.add(match)
                    yield order, match

    def rows(self, rule_set: int, peer: int) -> dict[PolicyKey, PolicyVerdict]:
        tier = PolicyLevel.ADMIN if self.tiers else 0
        found = {}
        for order, match in self.matches():
            key = PolicyKey(rule_set, peer, match.port, match.protocol, match.bits | tier)
            place = order if self.tiers else int(PolicyOrder.NETWORK_POLICY)
            found[key] = PolicyVerdict(1, place, Verdict.ALLOW)
        return found

    def isolation(self, rule_set: int) -> Isolation:
        levels = 0
        for _, match in self.matches():
            levels |= 1 << match.bits
        if self.tiers:
            levels |= IsolationFlag.ORDERED | IsolationFlag.DEFAULT_ALLOW
        return Isolation(rule_set, levels) if levels else Isolation()


PORTS = tuple((port, port) for port in range(PORT - RULES + 1, PORT + 1))
WIDE = tuple((first, first + 18) for first in range(PORT - 20 * RULES + 20, PORT + 20, 20))
CASES = (
    Case("no rules", ()),
    Case("1 rule", ((PORT, PORT),)),
    Case("1,000 rules of a port", PORTS),
    Case("1,000 rules of a port range", WIDE),
    Case("1,000 rules of a ClusterNetworkPolicy", PORTS, tiers=True),
)


def datagram(source: LocalEndpoint, to: LocalEndpoint, port: int) -> bytes:
    addresses = b"".join(end.addresses[0][-4:] for end in (source, to))
    udp = struct.pack("!HHHH", port, PORT, 8, 0)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 1, 0x4000, 64, UDP, 0) + addresses
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return source.host_mac + source.mac + b"\x08\x00" + head + udp


class Bed:
    def __init__(self, node: WeirNode) -> None:
        self._node = node
        self.client = node.add_pod(Namespace(), "10.99.0.2", CLIENT_CLASS)
        self.server = node.add_pod(Namespace(), "10.99.0.3", SERVER_CLASS)
        self._program = node.datapath.programs["from_pod"]
        self._ports = count(1024)
        for number, case in enumerate(CASES):
            for rule_set, peer in self._sides(number):
                node.datapath.tables.policy.update(case.rows(rule_set, peer))

    @staticmethod
    def _sides(number: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rule set, peer) of the client's egress and of the server's ingress."""
        first = FIRST_RULE_SET + 2 * number
        return (first, SERVER_CLASS), (first + 1, CLIENT_CLASS)

    def isolate(self, number: int) -> None:
        case, ((out, _), (in_, _)) = CASES[number], self._sides(number)
        endpoints = self._node.datapath.tables.endpoints
        for end in (self.client, self.server):
            row = endpoints.get(end.addresses[0])
            if row is None:
                raise BenchError("an endpoint has no row")
            row = replace(row, egress=case.isolation(out), ingress=case.isolation(in_))
            endpoints.update({end.addresses[0]: row})

    def send(self, data: bytes) -> int:
        """Nanoseconds."""
        done = self._node.inside(
            lambda: libbpf.run_program(self._program, data, ifindex=self.client.ifindex)
        )
        if done.retval != TC_ACT_REDIRECT:
            raise BenchError(f"from_pod did not deliver: returned {done.retval}")
        return done.duration_ns

    def new_flows(self) -> float:
        packets = [datagram(self.client, self.server, next(self._ports)) for _ in range(RUNS)]
        return median([self.send(packet) for packet in packets])

    def established(self) -> float:
        packet = datagram(self.client, self.server, 999)
        return median([self.send(packet) for _ in range(RUNS)])


def run() -> list[result.Result]:
    os.sched_setaffinity(0, {load.CPU})
    if BATCHES * RUNS * len(CASES) > 65536 - 1024:
        raise BenchError("there are not so many ports")
    new: list[list[float]] = [[] for _ in CASES]
    established = []
    with weir_node() as node:
        bed = Bed(node)
        for _ in range(BATCHES):
            for number in range(len(CASES)):
                bed.isolate(number)
                new[number].append(bed.new_flows())
            bed.established()  # judged again, as policy changed
            established.append(bed.established())
    without, *others = new
    name = "from_pod, new flow, "
    return [
        result.against(f"{name}{CASES[0].name}", "ns", "established", without, established),
        *(
            result.against(f"{name}{case.name}", "ns", CASES[0].name, mine, without)
            for case, mine in zip(CASES[1:], others, strict=True)
        ),
    ]
