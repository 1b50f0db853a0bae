# SPDX-License-Identifier: Apache-2.0
"""Traffic that must never fail beside traffic that must never get through, and policies to change
meanwhile, which are written once and made as a NetworkPolicy or as a ClusterNetworkPolicy."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from e2e.suite.arena import cluster_policy
from e2e.suite.cli import weir
from e2e.suite.kubectl import Manifest, eventually
from e2e.suite.policies import PROPAGATION_S, Target, policy, targets
from e2e.suite.probes import Flow, Probe
from e2e.suite.world import MORE_TCP, UDP, World

KINDS = ("NetworkPolicy", "ClusterNetworkPolicy")
OPEN, CLOSED = MORE_TCP[0], MORE_TCP[3]  # by both states, by neither
HAMMER_S = float(os.environ.get("HAMMER_S") or 6)
STALL_MS = 900  # as in test_resilience: a lost SYN is sent again after a second
# Of what no policy denied: a busy machine loses a datagram, and one SYN of a connection.
LOST_ALONE, SLOW_MS = 1, 2500
INTERVAL_S = 0.05
FLIPS_A_MINUTE = 1000
PROMPT_S = 1.0

Peer = tuple[Manifest, Manifest]  # selectors of namespaces and of their pods
Rules = list[tuple[list[Peer], list[int | tuple[int, int]]]]  # who, and to which ports


CLIENT: dict[str, str] = {"app": "client"}


def by_name(space: str) -> Manifest:
    return {"matchLabels": {"kubernetes.io/metadata.name": space}}


def of(space: str, **labels: str) -> Peer:
    """Pods with these labels in that namespace."""
    return by_name(space), {"matchLabels": labels}


def only(
    kind: str,
    space: str,
    name: str,
    subject: dict[str, str],
    rules: Rules,
    direction: str = "ingress",
) -> Manifest:
    """A policy of that kind: those peers to those ports, and no other pod."""
    other_end = "from" if direction == "ingress" else "to"
    if kind == "NetworkPolicy":
        made = [
            {
                other_end: [
                    {"namespaceSelector": spaces, "podSelector": pods} for spaces, pods in peers
                ],
                "ports": [namespaced_port(port) for port in ports],
            }
            for peers, ports in rules
        ]
        return policy(space, name, subject, **{direction: made})
    listed: list[Manifest] = [
        {
            "action": "Accept",
            other_end: [
                {"pods": {"namespaceSelector": spaces, "podSelector": pods}}
                for spaces, pods in peers
            ],
            "protocols": [cluster_port(port) for port in ports],
        }
        for peers, ports in rules
    ]
    listed.append({"action": "Deny", other_end: [{"namespaces": {}}]})
    selected = {"namespaceSelector": by_name(space), "podSelector": {"matchLabels": subject}}
    spec = {"tier": "Admin", "priority": 10, "subject": {"pods": selected}, direction: listed}
    return cluster_policy(f"{space}-{name}", spec)


def namespaced_port(port: int | tuple[int, int]) -> Manifest:
    if isinstance(port, tuple):
        return {"protocol": "TCP", "port": port[0], "endPort": port[1]}
    return {"protocol": "UDP" if port == UDP else "TCP", "port": port}


def cluster_port(port: int | tuple[int, int]) -> Manifest:
    if isinstance(port, tuple):
        return {"tcp": {"destinationPort": {"range": {"start": port[0], "end": port[1]}}}}
    return {"udp" if port == UDP else "tcp": {"destinationPort": {"number": port}}}


def single(address: str) -> str:
    return f"{address}/{128 if ':' in address else 32}"


class Load:
    """Traffic that must never fail, and traffic that must never get through."""

    def __init__(self, cluster: World) -> None:
        self.cluster = cluster
        self.wanted: list[tuple[Probe, Target, bool]] = []
        self.allowed: list[Flow] = []
        self.denied: list[Flow] = []
        self.began = 0.0

    def allow(self, client: str, servers: tuple[str, ...], *ports: int) -> None:
        """New connections and living ones; UDP has its own way of being lost."""
        self._want(client, servers, ports, True)

    def deny(self, client: str, servers: tuple[str, ...], *ports: int) -> None:
        """SYNs to the port and datagrams to the next, over and over."""
        self._want(client, servers, ports, False)

    def _want(
        self, client: str, servers: tuple[str, ...], ports: tuple[int, ...], allowed: bool
    ) -> None:
        probe = self.cluster[client]
        for server in servers:
            for target in targets(self.cluster[server], self.cluster, *ports):
                self.wanted.append((probe, target, allowed))

    def start(self) -> None:
        """Once it is all as it is to stay: the policy at the beginning takes its time."""

        def wait(wanted: tuple[Probe, Target, bool]) -> None:
            probe, target, allowed = wanted
            promptly(probe, target, "answer" if allowed else "timeout", PROPAGATION_S)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(wait, self.wanted))
        self.began = time.time()
        for probe, (protocol, host, port), allowed in self.wanted:
            if allowed:
                kinds = ("udp",) if protocol == "udp" else ("tcp", "connect")
                self.allowed += [probe.flow(kind, host, port, INTERVAL_S) for kind in kinds]
            else:
                self.denied.append(probe.flow("hammer", single(host), port, INTERVAL_S))
        eventually(
            lambda: min((flow.read()["received"] for flow in self.allowed), default=1), bool, 10,
            "answers on every flow that is allowed",
        )  # fmt: skip

    def finish(self) -> None:
        results = self.stop()
        count = len(self.allowed)
        pairs = list(zip(self.allowed, results[:count], strict=True))
        disturbed = [pair for pair in pairs if is_disturbed(pair[1], 0, STALL_MS)]
        denied = self.denied_meanwhile() if disturbed else set()
        failed = [
            f"{flow.probe} {flow.name}: {stats}"
            for flow, stats in disturbed
            if of_flow(flow) in denied or is_disturbed(stats, LOST_ALONE, SLOW_MS)
        ]
        passed = [
            f"{flow.probe} {flow.name}: {stats}"
            for flow, stats in zip(self.denied, results[count:], strict=True)
            if stats["received"]
        ]
        assert not failed, "failed, though always allowed:\n" + "\n".join(failed)
        assert not passed, "got through, though never allowed:\n" + "\n".join(passed)
        busy = [s["received"] for s in results[:count]] + [s["sent"] for s in results[count:]]
        assert min(busy) > 10, results

    def denied_meanwhile(self) -> set[tuple[str, str, int]]:
        """What the nodes say that policies denied since the start, as of_flow() has it: what was
        lost or late is theirs, or comes of a machine too busy to answer in time."""
        _, answers = weir(self.cluster, "denials")
        return {
            (row["source"]["pod"], row["destination"]["address"], row["destination"]["port"])
            for answer in answers
            for row in answer["data"]
            if row["last_seen"] > self.began
        }

    def stop(self) -> list[Manifest]:
        """The figures, first of what is allowed."""
        flows = self.allowed + self.denied
        with ThreadPoolExecutor(len(flows)) as pool:
            return list(pool.map(Flow.stop, flows))


def is_disturbed(stats: Manifest, lost: int, stall_ms: float) -> bool:
    """More than that was lost, or took longer."""
    too_late = stats.get("max_ms", 0) > stall_ms
    return bool(stats["errors"]) or len(stats.get("lost", [])) > lost or too_late


def of_flow(flow: Flow) -> tuple[str, str, int]:
    """Its pod, and the address and port it goes to."""
    return f"{flow.probe.namespace}/{flow.probe.name}", flow.host, flow.port


@contextmanager
def under_load(load: Load) -> Iterator[None]:
    load.start()
    yield
    load.finish()


def back_and_forth(step: Callable[[int], None], interval_s: float) -> None:
    """Call it with 0, 1, 2, … at that pace; as often as the hammering time has room for, however
    long a busy machine takes."""
    start = time.monotonic()
    for turn in range(round(HAMMER_S / interval_s)):
        step(turn)
        time.sleep(max(0.0, start + (turn + 1) * interval_s - time.monotonic()))


def promptly(
    client: Probe, target: Target | list[Any], want: str, seconds: float = PROMPT_S
) -> None:
    found = client.call("until", target=target, want=want, deadline=seconds)
    assert found.get("error", "answer") == want, (client, target, want, found)


class Refusals:
    """Asks a closed UDP port of both servers; each question must be refused by an ICMP error.

    The kernel sends one such error a second to each peer, and six after a time without.
    """

    def __init__(self, cluster: World, clients: tuple[str, ...], port: int) -> None:
        self.clients = [cluster[name] for name in clients]
        self.targets = [
            ["udp", cluster[name].address(family), port]
            for name in ("web-1", "web-2")
            for family in cluster.families
        ]
        self.wrong: list[str] = []
        self.asked = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def start(self) -> None:
        self.thread.start()

    def run(self) -> None:
        while not self.stopping.wait(1.2):
            for client in self.clients:
                found = client.call("reach", targets=self.targets, timeout_s=1.0)
                self.asked += len(found)
                self.wrong += [
                    f"{client} {target}: {answer}"
                    for target, answer in zip(self.targets, found, strict=True)
                    if answer.get("error") != "refused"
                ]

    def finish(self) -> None:
        self.stopping.set()
        self.thread.join()
        assert not self.wrong, "an ICMP error did not come:\n" + "\n".join(self.wrong[:20])
        assert self.asked >= 2 * len(self.targets), self.asked


def open_udp(made: Manifest, direction: str, port: int) -> Manifest:
    """The policy with a UDP port, on which nobody listens, added to its first rule."""
    rule = made["spec"][direction][0]
    if made["kind"] == "NetworkPolicy":
        rule["ports"].append({"protocol": "UDP", "port": port})
    else:
        rule["protocols"].append({"udp": {"destinationPort": {"number": port}}})
    return made
