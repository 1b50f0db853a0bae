# SPDX-License-Identifier: Apache-2.0
"""Connections from a pod to a ClusterIP against the same to the pod itself, as Services grow.

client (node1) --> ClusterIP:80 --> server (node1):7001     in turns with server (node1):7000
client (node1) --> ClusterIP:80 --> far (node2):7001        in turns with far (node2):7000
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from bench import cluster, load, result

# Numbers of Services to measure at; SERVICES=10,1000 makes a shorter run.
SIZES = tuple(int(size) for size in os.environ.get("SERVICES", "10,10000").split(","))
SECONDS = 10.0
PLACES = {"client": "node1", "near": "node1", "far": "node2"}
TEXTS = {"near": "same node", "far": "other node"}


@dataclass(frozen=True, slots=True)
class Rates:
    """Connections a second of each turn, by ClusterIP and by the pod's address."""

    services: int
    where: str
    by_service: list[float]
    direct: list[float]


def fill_name(number: int) -> str:
    return f"fill-{number}"


def measure() -> list[Rates]:
    """On the cluster that is up, whatever serves its ClusterIPs."""
    found = []
    with cluster.load_pods(PLACES) as addresses:
        for where in TEXTS:
            cluster.create_services([where], addresses[where])
        with cluster.server("near"), cluster.server("far"):
            made = 0
            for size in SIZES:
                names = [fill_name(number) for number in range(made, size)]
                cluster.create_services(names, addresses["near"])
                made = size
                # The last one made answers: the node has taken in all of them.
                last = load.Target(cluster.cluster_ip(names[-1]), cluster.SERVICE_PORT)
                cluster.wait_for_answer("client", last, f"Service {names[-1]}")
                found += [measure_one(size, where, addresses[where]) for where in TEXTS]
    return found


def measure_one(services: int, where: str, addr: str) -> Rates:
    targets = [
        load.Target(cluster.cluster_ip(where), cluster.SERVICE_PORT),
        load.Target(addr, cluster.DIRECT_PORT),
    ]
    cluster.wait_for_answer("client", targets[0], f"Service {where}")
    with cluster.quiet_cpu():
        by_service, direct = cluster.measure("client", "crr", targets, SECONDS)
    return Rates(services, TEXTS[where], by_service, direct)


def run() -> list[result.Result]:
    cluster.require_up()
    return [
        result.against(
            f"connect to a ClusterIP, {rates.where}, {rates.services} services",
            "1/s",
            "the pod itself",
            rates.by_service,
            rates.direct,
        )
        for rates in measure()
    ]
