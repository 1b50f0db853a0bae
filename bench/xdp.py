# SPDX-License-Identifier: Apache-2.0
"""XDP on the uplink against tc there: the blocklist at several sizes, and a NodePort's packets.

By BPF_PROG_TEST_RUN, which times the program alone: what the kernel spends on an skb before tc
runs, and XDP saves, is not in it. A forwarded packet is another one afterwards, so those runs are
single ones, whose clock costs some 50 ns; the rows of a packet that is no IP tell how much.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from statistics import median

from scapy.layers.inet import TCP
from scapy.layers.l2 import ARP, Ether
from support.datapaths import place
from support.packet_node import BOOKS, GATEWAY_MAC, PEER_MAC, Node, World

from bench import load, result
from bench.errors import BenchError
from weir.api.address import Addr, parse
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.records import Blocked, PrefixKey, RuntimeFeature, SnatKind
from weir.datapath.settings import Settings

SIZES = (0, 10_000, 100_000)
REPEAT = 10_000
BATCHES = 15
SINGLE_RUNS = 3_000
V4 = parse("0.0.0.0")[:12]
SETTINGS = Settings(
    node_ipv4=parse(BOOKS[4].node), node_ipv6=parse(BOOKS[6].node), xdp_services=True
)
Send = Callable[[bytes, int], libbpf.RunResult]


def prefixes(count: int, kept_out: set[int]) -> dict[PrefixKey, Blocked]:
    """Of /17 to /32, spread over all addresses; none has one of those kept out."""
    spread = random.Random(1)
    found: dict[PrefixKey, Blocked] = {}
    while len(found) < count:
        shift = 32 - spread.randint(17, 32)
        number = spread.getrandbits(32) >> shift
        if number not in {address >> shift for address in kept_out}:
            address = Addr(V4 + (number << shift).to_bytes(4, "big"))
            found[PrefixKey(128 - shift, address)] = Blocked(1)
    return found


def from_anywhere(count: int) -> list[bytes]:
    """Packets of as many sources, so that no lookup finds the last one's way in the caches."""
    spread = random.Random(2)
    plain = bytearray(frame(BOOKS[4].ip("0.0.0.0", BOOKS[4].node) / TCP(sport=1, dport=2)))
    source = slice(26, 30)
    made = []
    for _ in range(count):
        plain[source] = spread.randbytes(4)
        made.append(bytes(plain))
    return made


def sends(node: Node) -> dict[str, Send]:
    """The two ways of a packet that comes in by the uplink, each run in the node's namespace."""
    index = node.index["ul"]

    def xdp(data: bytes, repeat: int) -> libbpf.RunResult:
        program = node.datapath.programs["xdp_uplink"]
        with node.world.ns.entered():
            return libbpf.run_xdp(program, data, ifindex=index, repeat=repeat)

    def tc(data: bytes, repeat: int) -> libbpf.RunResult:
        program = node.datapath.programs["from_uplink"]
        with node.world.ns.entered():
            return libbpf.run_program(program, data, ifindex=index, repeat=repeat)

    return {"XDP": xdp, "tc": tc}


def frame(layers: object) -> bytes:
    return bytes(Ether(src=PEER_MAC, dst=GATEWAY_MAC) / layers)


def blocklist(node: Node) -> Iterator[result.Result]:
    """A packet of a blocked source and one of another, and the time that it takes to fill."""
    table = node.tables.blocked
    book = node.book
    one = {PrefixKey(128, parse(book.world2)): Blocked(1)}
    dropped = frame(book.ip(book.world2, book.node) / TCP(sport=1, dport=2))
    passed = frame(book.ip(book.world, book.node) / TCP(sport=1, dport=2, flags="S"))
    node.datapath.set_event_mask(0)
    kept_out = {
        int.from_bytes(parse(text)[12:], "big") for text in (book.world, book.world2, book.node)
    }
    for size in SIZES:
        rows = prefixes(size, kept_out)
        started = time.perf_counter()
        table.update(rows)
        filled = time.perf_counter() - started
        table.update(one)
        if size:
            name = f"fill the blocklist with {size:,} prefixes"
            yield result.alone(name, "ms", [filled * 1000])
        for what, data, codes in (("dropped", dropped, {1, 2}), ("passed", passed, {2, 0})):
            times: dict[str, list[float]] = {"XDP": [], "tc": []}
            for _ in range(BATCHES):
                for way, send in sends(node).items():
                    done = send(data, REPEAT)
                    if done.retval not in codes:
                        raise BenchError(f"{way}: a packet to be {what} returned {done.retval}")
                    times[way].append(done.duration_ns)
            name = f"packet {what}, {size:,} prefixes blocked, XDP"
            yield result.against(name, "ns", "from_uplink", times["XDP"], times["tc"])
        alone = [sends(node)["XDP"](data, 1).duration_ns for data in from_anywhere(SINGLE_RUNS)]
        name = f"packet of any source, {size:,} prefixes blocked, XDP, single run"
        yield result.alone(name, "ns", alone)
        table.delete(list(rows))
    # As on a node: XDP has looked, tc need not.
    row = node.datapath.runtime()
    node.tables.runtime.update({0: type(row)(0, 0, RuntimeFeature.XDP_BLOCKS)})


def node_port(node: Node) -> Iterator[result.Result]:
    """An established connection to a backend on another node, there and back."""
    book = node.book
    node.service(6, 80, (book.r, 8080))
    ways = sends(node)
    opening = frame(book.ip(book.world, book.vip) / TCP(sport=4000, dport=80, flags="S"))
    ways["tc"](opening, 1)
    [port] = {e.port for k, e in node.tables.snat.items() if k.kind == SnatKind.FORWARD}
    there = TCP(sport=4000, dport=80, flags="A") / bytes(64)
    back = TCP(sport=8080, dport=port, flags="A") / bytes(64)
    packets = {
        "no IP": (frame(ARP()), {"XDP": 2, "tc": 0}),
        "NodePort to another node": (
            frame(book.ip(book.world, book.vip) / there), {"XDP": 3, "tc": 7},
        ),
        "NodePort's answer": (
            frame(book.ip(book.r, book.node) / back), {"XDP": 3, "tc": 7},
        ),
    }  # fmt: skip
    for what, (data, wanted) in packets.items():
        times: dict[str, list[float]] = {"XDP": [], "tc": []}
        for _ in range(SINGLE_RUNS):
            for way, send in ways.items():
                done = send(data, 1)
                if done.retval != wanted[way]:
                    raise BenchError(f"{way}: {what}: returned {done.retval}")
                times[way].append(done.duration_ns)
        blocks = range(0, SINGLE_RUNS, SINGLE_RUNS // BATCHES)
        middle = {
            way: [median(values[i : i + SINGLE_RUNS // BATCHES]) for i in blocks]
            for way, values in times.items()
        }
        yield result.against(
            f"{what}, single run, XDP", "ns", "from_uplink", middle["XDP"], middle["tc"]
        )


def run() -> list[result.Result]:
    os.sched_setaffinity(0, {load.CPU})
    world = World()
    with place() as (root, cgroup):
        datapath = Datapath.open(root, cgroup, SETTINGS)
        try:
            node = Node(datapath, world, BOOKS[4])
            found = [*blocklist(node), *node_port(node)]
            node.reader.close()
        finally:
            datapath.close()
            Datapath.remove(root)
            world.ns.close()
    return found
