# SPDX-License-Identifier: Apache-2.0
"""Nine pods in three namespaces, and the whole matrix of who reaches whom.

    namespace                     pods in each
    x  ns=x team=red              a  pod=a tier=front            "web" is TCP 8080
    y  ns=y team=red extra=""     b  pod=b tier=back extra=""    "web" is TCP 8090
    z  ns=z                       c  pod=c                       "web" is TCP 8080

All serve TCP and UDP on 8080 and 8090, and "dns" is UDP 8080. a is on the first node, b on the
second, c on either. The nodes (host-1, host-2) ask and serve too, on ports of their own. What
should be is asked of `support.spec_oracle`, over the objects as the API server returns them.

A matrix taken too early would prove nothing where it is the same before and after. So after each
change a sentinel is changed too, a policy of the same kind over two more pods, one on each node:
once both have it, the earlier change is there as well, or so close that a repetition sees it.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from support.spec_oracle import Cluster

from e2e.suite.api import Api
from e2e.suite.kubectl import Manifest, apply, eventually, get
from e2e.suite.probe_matrix import ANSWER, TIMEOUT
from e2e.suite.probes import Probe
from e2e.suite.world import (
    LABEL,
    host_pod,
    installation,
    namespace,
    pod,
    probe_source,
    schedulable,
    when_ready,
)

SPACES: dict[str, dict[str, str]] = {
    "x": {"ns": "x", "team": "red"},
    "y": {"ns": "y", "team": "red", "extra": ""},
    "z": {"ns": "z"},
}
PODS: dict[str, dict[str, str]] = {
    "a": {"pod": "a", "tier": "front"},
    "b": {"pod": "b", "tier": "back", "extra": ""},
    "c": {"pod": "c"},
}
PORTS = (8080, 8090)
HOST_PORTS = (28080, 28090)  # in the host's network others may have the usual ones
PROTOCOLS = ("tcp", "udp")
WEB = {"a": 8080, "b": 8090, "c": 8080}
SENTINELS = ("s1", "s2")
SETTLE_S = 10.0
TIMEOUT_S = 0.3
CORRECT_S = 5.0  # for a busy test machine: an answer may come too late
_MORE = Path(__file__).with_name("probe_matrix.py")

Question = tuple[str, str, str, int]  # client, server's address, protocol, port


@dataclass(slots=True)
class Arena:
    """The pods, and the policies that are in force."""

    run: str
    api: Api
    probes: dict[str, Probe]  # "x/a" and so on, "host-1", "host-2"
    sentinels: dict[str, Probe]
    spaces: dict[str, str]  # short name -> namespace
    families: tuple[int, ...]
    oracle: Cluster
    policies: list[Manifest] = field(default_factory=list)
    _turns: dict[str, int] = field(default_factory=dict)

    # --- policies

    def become(self, wanted: list[Manifest]) -> None:
        """These policies and no others; returns when the nodes have them."""
        named = {key(policy) for policy in wanted}
        gone = [policy for policy in self.policies if key(policy) not in named]
        kinds = {policy["kind"] for policy in (*gone, *wanted)}
        for policy in gone:
            self.api.delete(policy)
            self.oracle.take(policy)
        self.policies = [policy for policy in self.policies if policy not in gone]
        for policy in wanted:
            self.policies.append(policy)
            self.oracle.put(self.api.put(policy))
        for kind in sorted(kinds):
            self.settle(kind)

    def settle(self, kind: str) -> None:
        """Change the sentinel of that kind of policy, and wait until both nodes have it."""
        turn = self._turns[kind] = self._turns.get(kind, 0) + 1
        to_open, to_close = PORTS if turn % 2 else PORTS[::-1]
        make, protocol = (
            (self._namespaced, "tcp") if kind == "NetworkPolicy" else (self._cluster_wide, "udp")
        )
        self.api.put(make(to_open, to_close))
        if turn == 1:  # both were open before
            self._await(protocol, to_close, TIMEOUT)
        else:
            self._await(protocol, to_open, ANSWER)

    def _await(self, protocol: str, port: int, letter: str) -> None:
        one, two = (self.sentinels[name] for name in SENTINELS)

        def wait(client: Probe, server: Probe) -> str:
            target = [protocol, server.address(self.families[0]), port]
            limits = {"deadline_s": SETTLE_S, "timeout": SETTLE_S + 10}
            found = client.call("becomes", target=target, letter=letter, **limits)
            return str(found["last"])

        with ThreadPoolExecutor(2) as pool:
            last = list(pool.map(wait, (one, two), (two, one)))
        assert last == [letter, letter], (
            f"a policy without effect for {SETTLE_S} s: {protocol} {port} of both nodes is {last}"
        )

    def _namespaced(self, to_open: int, to_close: int) -> Manifest:
        del to_close
        ports = [{"protocol": "TCP", "port": to_open}, {"protocol": "UDP"}]
        spec = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"ports": ports}]}
        meta = {"name": "sentinel", "namespace": self.spaces["s"]}
        api = "networking.k8s.io/v1"
        return {"apiVersion": api, "kind": "NetworkPolicy", "metadata": meta, "spec": spec}

    def _cluster_wide(self, to_open: int, to_close: int) -> Manifest:
        del to_open
        own = {"namespaces": {"matchLabels": {"ns": "s", "run": self.run}}}
        protocols = [{"udp": {"destinationPort": {"number": to_close}}}]
        deny = {"action": "Deny", "from": [own], "protocols": protocols}
        spec = {"tier": "Admin", "priority": 0, "subject": own, "ingress": [deny]}
        return cluster_policy(f"weir-matrix-{self.run}-sentinel", spec)

    # --- the matrix

    def targets(self) -> list[tuple[str, str, str, int]]:
        """Each server's name with one of its addresses, a protocol and a port."""
        return [
            (name, probe.address(family), protocol, port)
            for name, probe in self.probes.items()
            for family in self.families
            for protocol in PROTOCOLS
            for port in (HOST_PORTS if name.startswith("host") else PORTS)
        ]

    def found(self) -> dict[Question, str]:
        """What every client gets from every target."""
        targets = self.targets()
        wanted = [[protocol, address, port] for _, address, protocol, port in targets]

        def row(item: tuple[str, Probe]) -> dict[Question, str]:
            name, client = item
            letters = client.call("matrix", targets=wanted, timeout_s=TIMEOUT_S)
            return {
                (name, address, protocol, port): letter
                for (_, address, protocol, port), letter in zip(targets, letters, strict=True)
            }

        with ThreadPoolExecutor(len(self.probes)) as pool:
            rows = list(pool.map(row, self.probes.items()))
        return {question: letter for found in rows for question, letter in found.items()}

    def expected(self) -> dict[Question, str]:
        """What the specifications say. Between nodes no policy decides."""
        answers: dict[Question, str] = {}
        for name, address, protocol, port in self.targets():
            for client, probe in self.probes.items():
                source = probe.address(6 if ":" in address else 4)
                both_hosts = client.startswith("host") and name.startswith("host")
                allowed = both_hosts or self.oracle.allows(source, address, protocol.upper(), port)
                answers[client, address, protocol, port] = ANSWER if allowed else TIMEOUT
        return answers

    def check(self) -> None:
        """The matrix is as the specifications say; else a readable difference."""
        expected = self.expected()

        def wrong() -> dict[Question, str]:
            found = self.found()
            return {q: letter for q, letter in found.items() if letter != expected[q]}

        last: dict[Question, str] = {}

        def read() -> dict[Question, str]:
            nonlocal last
            last = wrong()
            return last

        try:
            eventually(read, lambda found: not found, CORRECT_S, "the matrix")
        except AssertionError:
            if not last:
                raise
            raise AssertionError(self.explain(expected, last)) from None

    def explain(self, expected: dict[Question, str], wrong: dict[Question, str]) -> str:
        """For each protocol, port and family with a difference, clients by servers."""
        servers = {address: name for name, address, _, _ in self.targets()}
        slices = sorted({(p, port, ":" in address) for _, address, p, port in wrong})
        lines = [
            f"{len(wrong)} of {len(expected)} differ from the specification",
            "  o answers, . times out; where they differ: X answers and must not,"
            " - must and times out, other letters: another error",
        ]
        for protocol, port, six in slices:
            columns = [address for _, address, p, number in self.targets()
                       if (p, number, ":" in address) == (protocol, port, six)]  # fmt: skip
            lines.append(f"\n{protocol} {port} IPv{6 if six else 4}: client below, server right")
            lines.append(" " * 8 + " ".join(f"{servers[a]:>6}" for a in columns))
            for client in self.probes:
                cells = []
                for address in columns:
                    question = (client, address, protocol, port)
                    letter = wrong.get(question)
                    if letter is None:
                        cells.append(expected[question])
                    else:
                        cells.append({ANSWER: "X", TIMEOUT: "-"}.get(letter, letter))
                lines.append(f"{client:>7} " + " ".join(f"{cell:>6}" for cell in cells))
        lines.append("\nunder")
        lines += [
            json.dumps({k: p[k] for k in ("kind", "metadata", "spec")}) for p in self.policies
        ]
        return "\n".join(lines)

    def address(self, name: str, family: int) -> str:
        return self.probes[name].address(family)


def key(policy: Manifest) -> tuple[str, str, str]:
    meta = policy["metadata"]
    return policy["kind"], meta.get("namespace", ""), meta["name"]


def cluster_policy(name: str, spec: Manifest) -> Manifest:
    api = "policy.networking.k8s.io/v1alpha2"
    meta = {"name": name, "labels": {LABEL: "true"}}
    return {"apiVersion": api, "kind": "ClusterNetworkPolicy", "metadata": meta, "spec": spec}


def matrix_pod(
    space: str, name: str, node: str, image: str, web: int, labels: dict[str, str]
) -> Manifest:
    """The world's pod with the matrix's servers in place of its own."""
    made = pod(space, name, node, image, **labels)
    container = made["spec"]["containers"][0]
    container["ports"] = [
        {"name": "web", "containerPort": web},
        {"name": "dns", "containerPort": PORTS[0], "protocol": "UDP"},
    ]
    return with_matrix(made, PORTS)


def with_matrix(made: Manifest, ports: tuple[int, ...]) -> Manifest:
    container = made["spec"]["containers"][0]
    container["env"] = [
        {"name": "PROBE_NAME", "value": made["metadata"]["name"]},
        {"name": "PROBE_MORE", "value": "/probe/probe_matrix.py"},
        {"name": "PROBE_PORTS", "value": json.dumps(ports)},
    ]
    return made


@contextmanager
def arena(api: Api) -> Iterator[Arena]:
    """Made for one module; everything goes when it ends."""
    for left in left_over(api):
        api.delete(left)
    _, image = installation()
    nodes = eventually(schedulable, bool, 60, "a node that takes pods")
    one, two = nodes[0], nodes[min(1, len(nodes) - 1)]
    run = secrets.token_hex(3)
    spaces = {short: f"weir-matrix-{run}-{short}" for short in (*SPACES, "s")}
    labels = {**SPACES, "s": {"ns": "s"}}
    apply(*(namespace(spaces[short], run=run, **labels[short]) for short in spaces),
          *(source(space) for space in spaces.values()))  # fmt: skip
    where = {"a": one, "b": two}
    pods = {
        f"{short}/{name}": matrix_pod(
            spaces[short], name, where.get(name, one if short == "x" else two), image,
            WEB[name], PODS[name],
        )
        for short in SPACES for name in PODS
    }  # fmt: skip
    for number, node in enumerate((one, two)[: len(nodes)], 1):
        pods[f"host-{number}"] = with_matrix(
            host_pod(spaces["s"], f"host-{number}", node, image), HOST_PORTS
        )
    for name, node in zip(SENTINELS, (one, two), strict=True):
        pods[name] = matrix_pod(spaces["s"], name, node, image, PORTS[0], {"pod": "s"})
    apply(*pods.values())
    probes = {name: when_ready(item) for name, item in pods.items()}
    sentinels = {name: probes.pop(name) for name in SENTINELS}
    families = tuple(sorted({6 if ":" in x else 4 for x in probes["x/a"].addresses}))
    oracle = Cluster()
    for node in get("nodes")["items"]:
        oracle.put({**node, "kind": "Node"})
    for space in spaces.values():
        oracle.put(api.get({"kind": "Namespace", "metadata": {"name": space}}))
        for item in api.list("Pod", space):
            oracle.put({**item, "kind": "Pod"})
    made = Arena(run, api, probes, sentinels, spaces, families, oracle)
    try:
        yield made
    finally:
        for probe in (*probes.values(), *sentinels.values()):
            probe.close()
        for left in left_over(api):
            api.delete(left)
        for space in spaces.values():
            api.delete({"kind": "Namespace", "metadata": {"name": space}})


def left_over(api: Api) -> list[Manifest]:
    """ClusterNetworkPolicies outlive the namespaces of the run that made them."""
    try:
        found = api.list("ClusterNetworkPolicy", selector=LABEL)
    except AssertionError:
        return []  # no such kind in this cluster: the rows that need it say so
    return [{**item, "kind": "ClusterNetworkPolicy"} for item in found]


def source(space: str) -> Manifest:
    made = probe_source(space)
    made["data"]["probe_matrix.py"] = _MORE.read_text()
    return made
