# SPDX-License-Identifier: Apache-2.0
"""Weir against the bridge plugin with the real kube-proxy: connects to Services, whole stacks.

Two network stacks cannot share nodes, so each gets the same cluster after the other, made by
`make cluster` and taken down again: here the rates are absolute ones, minutes apart. So Weir is
measured twice, before and after the peers, and its rate is the mean of the two; the figures of
the ratio against the pod's own address, which do not drift, are in `cluster_ip`.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median

from bench import cluster_ip, result
from bench.errors import BenchError
from e2e.cluster import up

ROOT = Path(__file__).resolve().parents[1]
WEIR = {"CNI": "weir", "KUBE_PROXY": "none"}
PEERS = {
    f"bridge + kube-proxy {mode}": {"CNI": "bridge", "KUBE_PROXY": mode}
    for mode in ("iptables", "nftables")
}


def make(target: str, variables: Mapping[str, str]) -> None:
    command = ["make", "--no-print-directory", target]
    command += [f"{name}={value}" for name, value in variables.items()]
    if subprocess.run(command, cwd=ROOT, env={**os.environ}, check=False).returncode:
        raise BenchError(f"{' '.join(command)} failed")


def rates(variables: Mapping[str, str]) -> dict[str, list[float]]:
    """Connections a second of each turn, by path and number of Services."""
    make("cluster", variables)
    try:
        return {r.text: r.values for r in cluster_ip.measure(from_outside=True)}
    finally:
        make("cluster-down", {})


def run() -> list[result.Result]:
    if up.is_up() or "KUBECONFIG" in os.environ:
        raise BenchError("this makes clusters of its own: run `make cluster-down` first")
    before = rates(WEIR)
    peers = {name: rates(variables) for name, variables in PEERS.items()}
    after = rates(WEIR)
    results = []
    for peer, theirs in peers.items():
        for text, values in theirs.items():
            runs = [median(before[text]), median(after[text])]
            weir, other = mean(runs), median(values)
            results.append(result.Result(text, weir, "1/s", peer, other, weir / other, len(values)))
    return results
