# SPDX-License-Identifier: Apache-2.0
"""What one packet of an established flow between two isolated pods costs in from_pod.

By BPF_PROG_TEST_RUN, which times the program alone. A repeat sees the packet as the last run
left it, so the hop limit starts at 255 and a batch stays below that; each batch ends with a check
that the packet was still delivered, not dropped early.
"""

from __future__ import annotations

import os
import struct

from bench import load, result
from bench.errors import BenchError
from bench.namespaces import Namespace
from bench.weir_node import CLIENT_CLASS, SERVER_CLASS, weir_node
from weir.cni.endpoint import LocalEndpoint
from weir.datapath import libbpf

PORT = 7000
CLIENT_PORT = 40000
REPEAT = 200
BATCHES = 300
PAYLOAD = bytes(64)
TC_ACT_REDIRECT = 7
SYN, SYN_ACK, ACK = 0x02, 0x12, 0x10


def checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def packet(source: LocalEndpoint, to: LocalEndpoint, ports: tuple[int, int], flags: int) -> bytes:
    """An Ethernet frame as the pod sends it; the TCP checksum is left to the device."""
    addresses = b"".join(end.addresses[0][-4:] for end in (source, to))
    tcp = struct.pack("!HHIIBBHHH", *ports, 1, 1, 5 << 4, flags, 65535, 0, 0) + PAYLOAD
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 1, 0x4000, 255, 6, 0) + addresses
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    return source.host_mac + source.mac + b"\x08\x00" + head + tcp


def run() -> list[result.Result]:
    os.sched_setaffinity(0, {load.CPU})
    with weir_node() as node:
        node.allow(CLIENT_CLASS, SERVER_CLASS, PORT)
        client = node.add_pod(Namespace(), "10.99.0.2", CLIENT_CLASS)
        server = node.add_pod(Namespace(), "10.99.0.3", SERVER_CLASS)
        program = node.datapath.programs["from_pod"]

        def send(at: LocalEndpoint, data: bytes, repeat: int = 1) -> int:
            """Nanoseconds a run."""
            done = node.inside(
                lambda: libbpf.run_program(program, data, ifindex=at.ifindex, repeat=repeat)
            )
            if done.retval != TC_ACT_REDIRECT:
                raise BenchError(f"from_pod did not deliver: returned {done.retval}")
            return done.duration_ns

        there, back = (CLIENT_PORT, PORT), (PORT, CLIENT_PORT)
        send(client, packet(client, server, there, SYN))
        send(server, packet(server, client, back, SYN_ACK))
        send(client, packet(client, server, there, ACK))
        data = packet(client, server, there, ACK)
        times = [send(client, data, REPEAT) for _ in range(BATCHES)]
    return [result.alone("from_pod, established flow, policy on", "ns", times)]
