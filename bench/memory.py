# SPDX-License-Identifier: Apache-2.0
"""Resident memory of Weir's processes on the cluster that is up, small and with 10,000 Services.

The largest of the processes of each kind, as /proc says it. After the Services are there it takes
the last figure once it stopped growing.
"""

from __future__ import annotations

import time
from pathlib import Path

from bench import cluster, load, result
from bench.errors import BenchError
from e2e.cluster import host

SERVICES = 10_000
PROCESSES = {"agent": "weir.agent", "operator": "weir.operator"}
SETTLE_S = 5.0
KIB_PER_MIB = 1024


def resident_mib(module: str) -> float:
    """Of the largest process that runs `python -m MODULE`, with its children's not counted."""
    found = []
    for pid in host.processes(host.cluster_cgroup()):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it ended meanwhile
            continue
        if module in words and "VmRSS:" in status:
            found.append(int(status.partition("VmRSS:")[2].split()[0]) / KIB_PER_MIB)
    if not found:
        raise BenchError(f"no process of {module} runs in the cluster: is Weir installed?")
    return max(found)


def settled_mib(module: str) -> float:
    """The figure once it grew by less than one part in a hundred in SETTLE_S seconds."""
    before = resident_mib(module)
    while True:
        time.sleep(SETTLE_S)
        now = resident_mib(module)
        if now < before * 1.01:
            return now
        before = now


def figures(services: int) -> list[result.Result]:
    return [
        result.alone(f"RSS of the {name}, {services} services", "MiB", [settled_mib(module)])
        for name, module in PROCESSES.items()
    ]


def run() -> list[result.Result]:
    cluster.require_up()
    results = figures(0)
    with (
        cluster.load_pods({"client": "node1", "near": "node1"}) as addresses,
        cluster.filling(addresses["near"]) as fill,
    ):
        name = fill(SERVICES)
        with cluster.server("near"):
            last = load.Target(cluster.cluster_ip(name), cluster.SERVICE_PORT)
            cluster.wait_for_answer("client", last, f"Service {name}")
        results += figures(SERVICES)
    return results
