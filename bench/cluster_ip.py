# SPDX-License-Identifier: Apache-2.0
"""Connections from a pod to a ClusterIP against the same to the pod itself, as Services grow.

client (node1) --> ClusterIP:80 --> server (node1):7001     in turns with server (node1):7000
client (node1) --> ClusterIP:80 --> far (node2):7001        in turns with far (node2):7000
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from bench import cluster, load, outside, result

# Numbers of Services to measure at; SERVICES=10,1000 makes a shorter run.
SIZES = tuple(int(size) for size in os.environ.get("SERVICES", "10,10000").split(","))
SECONDS = 10.0
PLACES = {"client": "node1", "near": "node1", "far": "node2"}
TEXTS = {"near": "same node", "far": "other node"}


def measure(from_outside: bool = False) -> list[result.Rates]:
    """On the cluster that is up, whatever serves its ClusterIPs."""
    found = []
    with ExitStack() as stack:
        addresses = stack.enter_context(cluster.load_pods(PLACES))
        fill = stack.enter_context(cluster.filling(addresses["near"]))
        for where in TEXTS:
            cluster.create_services([where], addresses[where])
            stack.enter_context(cluster.server(where))
        outer = stack.enter_context(outside.place(addresses)) if from_outside else None
        for size in SIZES:
            name = fill(size)
            # The last one made answers: the node has taken in all of them.
            last = load.Target(cluster.cluster_ip(name), cluster.SERVICE_PORT)
            cluster.wait_for_answer("client", last, f"Service {name}")
            found += [measure_one(size, where, addresses[where]) for where in TEXTS]
            if outer is not None:
                found += outer.measure(size)
    return found


def measure_one(services: int, where: str, addr: str) -> result.Rates:
    targets = [
        load.Target(cluster.cluster_ip(where), cluster.SERVICE_PORT),
        load.Target(addr, cluster.DIRECT_PORT),
    ]
    cluster.wait_for_answer("client", targets[0], f"Service {where}")
    with cluster.quiet_cpu():
        by_service, direct = cluster.measure("client", "crr", targets, SECONDS)
    return result.Rates(f"connect to a ClusterIP, {TEXTS[where]}", services, by_service, direct)


def run() -> list[result.Result]:
    cluster.require_up()
    return [
        result.against(rates.text, "1/s", "the pod itself", rates.values, rates.direct)
        for rates in measure()
    ]
