# SPDX-License-Identifier: Apache-2.0
"""Weir's policy against kube-router's firewall: connects, and from a policy's change to its effect.

Each gets a cluster of its own, made by `make cluster` and taken down again, as in `kube_proxy`:
Weir; bridge + kube-proxy nftables with kube-router's firewall in each node; Weir again.

    client (node1) --> near (node1), far (node2)       TCP connects, one after the other
    client (node1) --> near (node1)                    a datagram of a new flow each millisecond

There are 10 or 1,000 policies in the namespace. Either all but one select pods that are not there,
or all select the two servers. Each lets in one set of labels; the client's is the last one's, which
is changed to shut it out and to let it in again. Timed from the request to the API server to the
last datagram that was answered, or to the first.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from typing import Any

from bench import cluster, load, result
from bench.errors import BenchError
from bench.kube_proxy import WEIR, make
from e2e.cluster import up

SIZES = tuple(int(size) for size in os.environ.get("POLICIES", "10,1000").split(","))
PEER = "bridge + kube-router"
PEER_CLUSTER = {"CNI": "bridge", "KUBE_PROXY": "nftables", "NETPOL": "kube-router"}
PLACES = {"client": "node1", "near": "node1", "far": "node2"}
TEXTS = {"near": "same node", "far": "other node"}
SELECTED = {False: "of other pods", True: "of the server"}
GATE = "gate"
PATH = f"/apis/networking.k8s.io/v1/namespaces/{cluster.NAMESPACE}/networkpolicies"
SECONDS = 10.0
CHANGES = 10  # each way
GAP_MS = 1
QUIET_S = 1.0  # without an answer: it is shut out
EFFECT_S = 60.0
PROBE_S = 3600.0
Json = dict[str, Any]


def policy(name: str, server: str, client: str) -> Json:
    """Lets pods with the label load=CLIENT in to those with serves=SERVER, and nobody else."""
    peer = {"podSelector": {"matchLabels": {"load": client}}}
    spec = {
        "podSelector": {"matchLabels": {"serves": server}},
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [peer]}],
    }
    meta = {"name": name, "namespace": cluster.NAMESPACE}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta,
            "spec": spec}  # fmt: skip


def policies(count: int, of_server: bool) -> list[Json]:
    server = "load" if of_server else "nothing"
    others = [policy(f"p{n}", server, f"client-{n}") for n in range(count - 1)]
    return [*others, policy(GATE, "load", "client")]


class Probe:
    """A client that sends all the time, and when it sent what was answered."""

    def __init__(self, target: load.Target) -> None:
        arguments = load.probe_arguments(PROBE_S, GAP_MS, target)
        command = cluster.kubectl_command("exec", "-i", "-n", cluster.NAMESPACE, "client", "--",
                                          "/tmp/load", *arguments)  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answered: list[int] = []
        self._news = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._news:
                self._answered.append(int(line))
                self._news.notify_all()

    def let_in(self, since: int) -> float:
        """Milliseconds until something was sent that was answered."""
        with self._news:
            found = self._news.wait_for(lambda: self._after(since), EFFECT_S)
            if not found:
                raise BenchError(f"nothing came through within {EFFECT_S:.0f} s")
            return (min(found) - since) / 1e6

    def shut_out(self, since: int) -> float:
        """Milliseconds until the last one was sent that was answered."""
        deadline = time.monotonic() + EFFECT_S
        with self._news:
            while self._news.wait(QUIET_S):
                if time.monotonic() > deadline:
                    raise BenchError(f"still let through after {EFFECT_S:.0f} s")
            return (max(self._after(since), default=since) - since) / 1e6

    def _after(self, since: int) -> list[int]:
        """Answers come nearly in the order of what was sent."""
        found = []
        for sent in reversed(self._answered):
            if sent < since - QUIET_S * 1e9:
                break
            if sent > since:
                found.append(sent)
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(EFFECT_S)


def put(path: Path, client: str) -> int:
    """Changes whom the gate lets in. When, in nanoseconds of CLOCK_MONOTONIC."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        body = json.dumps(policy(GATE, "load", client)).encode()
        head = f"PUT {PATH}/{GATE} HTTP/1.0\r\nContent-Type: application/json\r\n"
        head += f"Host: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        start = time.monotonic_ns()
        connection.sendall(head.encode() + body)
        answer = connection.makefile("rb").readline().decode()
    if " 200 " not in answer:
        raise BenchError(f"changing policy {GATE}: {answer.strip()}")
    return start


def create(manifests: list[Json]) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    cluster.kubectl("create", "-f", "-", text=text)


def effects(near: str, path: Path) -> dict[str, list[float]]:
    """Milliseconds of each change."""
    found: dict[str, list[float]] = {"shut out": [], "let in": []}
    probe = Probe(load.Target(near, cluster.DIRECT_PORT))
    try:
        probe.let_in(time.monotonic_ns())
        for _ in range(CHANGES):
            found["shut out"].append(probe.shut_out(put(path, "nobody")))
            found["let in"].append(probe.let_in(put(path, "client")))
            time.sleep(QUIET_S)
    finally:
        probe.close()
    return found


def measure() -> dict[str, tuple[str, list[float]]]:
    """On the cluster that is up, whoever enforces policy there: (unit, values) by name."""
    found: dict[str, tuple[str, list[float]]] = {}
    with ExitStack() as stack:
        addresses = stack.enter_context(cluster.load_pods(PLACES))
        path = stack.enter_context(cluster.api_socket())
        for pod in TEXTS:
            cluster.kubectl("label", "-n", cluster.NAMESPACE, "pod", pod, "serves=load")
            stack.enter_context(cluster.server(pod))
        targets = [load.Target(addresses[pod], cluster.DIRECT_PORT) for pod in TEXTS]
        for size in SIZES:
            for of_server, text in SELECTED.items():
                create(policies(size, of_server))
                for target in targets:
                    cluster.wait_for_answer("client", target, f"{size} policies {text}")
                case = f"{size} policies {text}"
                for name, values in effects(addresses["near"], path).items():
                    found[f"{name} after a change, {case}"] = ("ms", values)
                with cluster.quiet_cpu():
                    rates = cluster.measure("client", "crr", targets, SECONDS)
                for where, values in zip(TEXTS.values(), rates, strict=True):
                    found[f"connect, {where}, {case}"] = ("1/s", values)
                cluster.kubectl("delete", "--raw", PATH)  # all at once
    return found


def on_cluster(variables: Mapping[str, str]) -> dict[str, tuple[str, list[float]]]:
    make("cluster", variables)
    try:
        return measure()
    finally:
        make("cluster-down", {})


def run() -> list[result.Result]:
    if up.is_up() or "KUBECONFIG" in os.environ:
        raise BenchError("this makes clusters of its own: run `make cluster-down` first")
    before = on_cluster(WEIR)
    peer = on_cluster(PEER_CLUSTER)
    after = on_cluster(WEIR)
    results = []
    for name, (unit, values) in peer.items():
        mine = mean([median(before[name][1]), median(after[name][1])])
        other = median(values)
        ratio = mine / other if other else None
        results.append(result.Result(name, mine, unit, PEER, other, ratio, len(values)))
    return results
