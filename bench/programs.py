# SPDX-License-Identifier: Apache-2.0
"""What each program costs a packet, on every path, by the kernel's own run statistics.

Three nodes with real agents (support.service_world) and real traffic: UDP round trips of one
client, so the figures are of established flows, and connect() calls for the socket programs. The
statistics time each single run of a program, their clock's own cost of some 20 ns included.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.namespaces import NetNs
from support.service_oracle import Backend, Case, Client, Kind
from support.service_world import POD_TARGET, ServiceWorld, Ways, node_address, service_world

from bench import load, result
from bench.errors import BenchError
from weir.datapath import libbpf

BATCHES = 7
SECONDS = 0.4
CALLS = 5_000
OUTSIDE_PORT = 9000
BPF, ENABLE_STATS = 321, 32  # the system call's number on x86-64, and its command
CONNECTS = """
import socket, sys
for _ in range(int(sys.argv[3])):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect((sys.argv[1], int(sys.argv[2])))
"""


@dataclass(frozen=True, slots=True)
class Way:
    """Packets from a client, and the programs on their way: (node, program)."""

    name: str
    client: Client
    address: str
    port: int
    programs: tuple[tuple[int, str], ...]


def ways(world: ServiceWorld) -> list[Way]:
    pod, outside, host = Client.POD_PACKETS, Client.OUTSIDE, Client.HOST

    def service(kind: Kind, backend: Backend, client: Client) -> tuple[str, int]:
        return world.target(Case(kind, local=False, family=4, protocol="udp", client=client,
                                 backend=backend))  # fmt: skip

    near, far = (world.addresses[name][4] for name in ("near", "far"))
    outer = node_address(254, 4)
    return [
        Way("pod to pod, same node", pod, near, POD_TARGET, ((1, "from_pod"),)),
        Way("pod to pod, other node", pod, far, POD_TARGET,
            ((1, "from_pod"), (1, "to_overlay"), (2, "from_overlay"))),
        Way("pod to ClusterIP in packets, same node", pod,
            *service(Kind.CLUSTER_IP, Backend.NEAR, pod), ((1, "from_pod"),)),
        Way("pod to the outside, masqueraded", pod, outer, OUTSIDE_PORT,
            ((1, "from_pod"), (1, "to_uplink"), (1, "from_uplink"))),
        Way("host to pod", host, near, POD_TARGET, ((1, "to_pod"), (1, "from_pod"))),
        Way("NodePort, backend on the node", outside,
            *service(Kind.NODE_PORT, Backend.NEAR, outside),
            ((1, "from_uplink"), (1, "from_pod"), (1, "to_uplink"))),
        Way("NodePort, backend on another node, there and back", outside,
            *service(Kind.NODE_PORT, Backend.FAR, outside),
            ((1, "from_uplink"), (1, "to_overlay"), (1, "from_overlay"))),
    ]  # fmt: skip


@contextmanager
def statistics() -> Iterator[None]:
    """The kernel counts runs and time of all programs for as long as a descriptor is open."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(8)  # type 0: run time
    fd = libc.syscall(BPF, ENABLE_STATS, attributes, 8)
    if fd < 0:
        raise BenchError(f"BPF statistics: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        os.close(fd)


def program(world: ServiceWorld, node: int, name: str) -> int:
    found = list((world.nodes[node].pins / "progs").glob(f"*/{name}"))
    if len(found) != 1:
        raise BenchError(f"node {node} has {len(found)} programs named {name}")
    fd = libbpf.get_pinned(found[0])
    if fd is None:
        raise BenchError(f"{found[0]} is gone")
    return fd


def counters(fd: int) -> tuple[int, int]:
    """(nanoseconds, runs) of a program."""
    rows = dict(
        line.split(":\t", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    )
    return int(rows["run_time_ns"]), int(rows["run_cnt"])


def namespace(world: ServiceWorld, client: Client) -> NetNs:
    if client is Client.OUTSIDE:
        return world.nodes[1].outside
    return world.nodes[1].node if client is Client.HOST else world.pods["self"]


def send(world: ServiceWorld, way: Way) -> None:
    target = load.Target(way.address, way.port)
    with namespace(world, way.client).entered():
        command = [str(load.build()), *load.client_arguments("urr", SECONDS, [target])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        raise BenchError(f"{way.name}: {done.stderr.strip()}")


def connect(world: ServiceWorld, cgroup: Path) -> None:
    address, port = world.target(
        Case(Kind.CLUSTER_IP, False, 4, "udp", Client.POD, Backend.NEAR)
    )  # fmt: skip
    join = f'echo $$ >{cgroup}/cgroup.procs; exec "$@"'
    command = ["sh", "-c", join, "sh", sys.executable, "-c", CONNECTS]
    with world.pods["self"].entered():
        subprocess.run([*command, address, str(port), str(CALLS)], check=True, timeout=60)


def figures(world: ServiceWorld) -> Iterator[result.Result]:
    wanted: list[tuple[str, tuple[tuple[int, str], ...], Way | None]] = [
        (way.name, way.programs, way) for way in ways(world)
    ]
    wanted.append(("connect() to a ClusterIP", ((1, "sock_connect4"),), None))
    cgroup = Path(str(world.nodes[1].config["paths"]["cgroup"]))  # type: ignore[index]
    for name, programs, way in wanted:
        fds = {key: program(world, *key) for key in programs}
        means: dict[tuple[int, str], list[float]] = {key: [] for key in programs}
        for _ in range(BATCHES):
            before = {key: counters(fd) for key, fd in fds.items()}
            connect(world, cgroup) if way is None else send(world, way)
            for key, fd in fds.items():
                spent, runs = (a - b for a, b in zip(counters(fd), before[key], strict=True))
                if runs < CALLS / 10:
                    raise BenchError(f"{name}: {key[1]} ran {runs} times only")
                means[key].append(spent / runs)
        for key, values in means.items():
            os.close(fds[key])
            yield result.alone(f"{key[1]}: {name}", "ns", values)


def run() -> list[result.Result]:
    with (
        tempfile.TemporaryDirectory(prefix="weir-bench-") as folder,
        service_world(Path(folder), Ways("vxlan")) as world,
        load.server([OUTSIDE_PORT], [world.nodes[1].outside.path]),
        statistics(),
    ):
        return list(figures(world))
