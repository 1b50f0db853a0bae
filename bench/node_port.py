# SPDX-License-Identifier: Apache-2.0
"""Connections from outside by NodePort and LoadBalancer address, against the node's own process.

On the cluster that is up, which must be the local one; `outside` says how.
"""

from __future__ import annotations

from bench import cluster, cluster_ip, load, outside, result


def run() -> list[result.Result]:
    cluster.require_up()
    found = []
    with (
        cluster.load_pods(cluster_ip.PLACES) as addresses,
        cluster.filling(addresses["near"]) as fill,
        cluster.server("near"),
        cluster.server("far"),
        outside.place(addresses) as outer,
    ):
        for size in cluster_ip.SIZES:
            name = fill(size)
            last = load.Target(cluster.cluster_ip(name), cluster.SERVICE_PORT)
            cluster.wait_for_answer("client", last, f"Service {name}")
            found += outer.measure(size)
    return [
        result.against(rates.text, "1/s", "a process on the node", rates.values, rates.direct)
        for rates in found
    ]
