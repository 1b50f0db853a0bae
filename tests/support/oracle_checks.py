# SPDX-License-Identifier: Apache-2.0
"""Questions to the tested node and to the model, and what it means that they differ."""

from __future__ import annotations

from collections import Counter
from random import Random

from support.oracle import Cluster, Name, Oracle, address, pod_addresses, version
from support.oracle_node import ACK, SYN, SYN_ACK, Flow, TestedNode, ends
from support.oracle_scripts import (
    HERE,
    NODES,
    OUTSIDE,
    PROBES,
    SERVICE_PORTS,
    UNKNOWN,
    Action,
    change,
)
from support.oracle_why import Explanations

FLOWS = 24
PER_ROW = 60  # packets after each row
Question = tuple[str, str, str, int]


class Difference(AssertionError):
    """Node and model say different things."""


class Checker:
    """Follows one node through a script."""

    def __init__(self, node: TestedNode, rng: Random) -> None:
        self._node = node
        self._rng = rng
        self._flows: list[Flow] = []
        self.counts: Counter[str] = Counter()

    def check(self, probes: int) -> None:
        oracle = Oracle(self._node.cluster, HERE)
        self._established(oracle)
        explanations = Explanations(self._node)
        for question in questions(self._node, self._rng, probes):
            self._fresh(oracle, question)
            if differences := explanations.differences(oracle, *question):
                raise Difference(f"{question}: {'; '.join(differences)}")
        self._services(oracle)
        self._open(oracle)

    def _fresh(self, oracle: Oracle, question: Question) -> None:
        """The first packet of a flow."""
        flow = self._node.flow(*question)
        expected = oracle.allows(*question)
        seen = self._node.send(flow)
        self.counts["allowed" if expected else "denied"] += 1
        if seen.passed != expected:
            raise Difference(f"{question}: expected {expected}, {seen.passed} {seen.reason}")
        if not expected:
            direction = "INGRESS" if oracle.egress(*question) else "EGRESS"
            if seen.reason not in {f"POLICY_{direction}", "UNKNOWN_PEER"}:
                raise Difference(f"{question}: dropped for {seen.reason}, not {direction}")

    def _established(self, oracle: Oracle) -> None:
        """Both directions of a flow that was allowed when it began: judged anew, as opened."""
        known = set(self._node.local())
        kept: list[Flow] = []
        for flow in self._flows:
            question = (flow.source, flow.target, flow.protocol, flow.port)
            if self._was_local(flow) - known:
                continue
            expected = oracle.allows(*question)
            for reply in self._rng.sample([False, True], 2):
                seen = self._node.send(flow, reply=reply, flags=ACK)
                self.counts["again " + ("allowed" if expected else "denied")] += 1
                # What the node sends to its pods always passes.
                if seen.passed != (expected or (reply and flow.target in NODES[HERE][0])):
                    which = "reply" if reply else "packet"
                    raise Difference(
                        f"{which} of open {question}: expected {expected}, "
                        f"{seen.passed} {seen.reason}"
                    )
            kept.append(flow)
        self._flows = kept

    def _was_local(self, flow: Flow) -> set[str]:
        prefixes = ("10.0.1.", "fd00:0:0:1:")
        return {ip for ip in (flow.source, flow.target) if ip.startswith(prefixes)}

    def _open(self, oracle: Oracle) -> None:
        """Some flows to come back to; their replies pass whatever policy says of those."""
        self._rng.shuffle(self._flows)
        del self._flows[FLOWS // 2 :]
        own = NODES[HERE][0]
        for question in questions(self._node, self._rng, 1):
            if len(self._flows) >= FLOWS:
                return
            if question[0] == question[1] or question[0] in own:
                continue
            if not oracle.allows(*question):
                continue
            flow = self._node.flow(*question)
            first = self._node.send(flow, flags=SYN)
            reply = self._node.send(flow, reply=True, flags=SYN_ACK)
            if not (first.passed and reply.passed):
                raise Difference(f"{question}: {first.reason}, reply: {reply.reason}")
            self._flows.append(flow)

    def _services(self, oracle: Oracle) -> None:
        for vip in (f"{net}{last}" for net in ("10.96.0.", "fd00:96::") for last in (10, 11, 12)):
            for protocol, port in sorted(SERVED):
                targets = oracle.backends(vip, protocol, port)
                clients = [ip for ip in self._node.local() if version(ip) == version(vip)]
                if targets is None:
                    self._unserved(clients, (vip, protocol, port))
                    continue
                for client in self._rng.sample(clients, min(2, len(clients))):
                    for _ in range(2):
                        self._service(oracle, client, (vip, protocol, port), targets)

    def _unserved(self, clients: list[str], at: tuple[str, str, int]) -> None:
        """Nobody's: a packet goes on as it is, or not at all."""
        for client in clients[:1]:
            seen = self._node.send(self._node.flow(client, *at))
            self.counts["unserved"] += 1
            if seen.passed and (ends(seen.packet)[:2] != (client, at[0])):
                raise Difference(f"{client} → {at}, no Service's: became {ends(seen.packet)}")

    def _service(
        self, oracle: Oracle, client: str, at: tuple[str, str, int], targets: set[tuple[str, int]]
    ) -> None:
        vip, protocol, port = at
        seen = self._node.send(self._node.flow(client, vip, protocol, port))
        allowed = {t for t in targets if oracle.allows(client, t[0], protocol, t[1])}
        what = f"{client} → {vip}:{port}/{protocol} of {sorted(targets)}, policy lets {allowed}"
        if not targets:
            self.counts["refused"] += 1
            answer = seen.packet[26:34] if version(vip) == 4 else seen.packet[22:54]
            if seen.reason != "NO_BACKEND" or not seen.passed:
                raise Difference(f"{what}: not refused: {seen.reason} {answer.hex()}")
            return
        if seen.reason == "NO_ENDPOINT":
            # A slice may name an address here that no pod has any more.
            gone = {t for t in allowed if self._node.device(t[0]) is None}
            if not gone:
                raise Difference(f"{what}: no endpoint")
            self.counts["backend gone"] += 1
        elif seen.passed:
            self.counts["served"] += 1
            source, target, _, number = ends(seen.packet)
            # A pod that is its own backend must not take itself for its client.
            sources = set(NODES[HERE][0]) if target == client else {client}
            if source not in sources or (target, number) not in {norm(t) for t in allowed}:
                raise Difference(f"{what}: went to {target}:{number} from {source}")
        else:
            self.counts["served but denied"] += 1
            if targets == allowed or seen.reason not in {
                "POLICY_EGRESS",
                "POLICY_INGRESS",
                "UNKNOWN_PEER",
            }:
                raise Difference(f"{what}: {seen.reason}")


class Moments:
    """Looks at the node after each row that is written during one change."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._watched: list[tuple[Question, bool]] = []
        self._history: list[str] = []
        self.node: TestedNode | None = None
        self.counts: Counter[str] = Counter()

    async def during(self, action: Action) -> None:
        """Does it. A packet about which old and new policies agree, in each direction, must see
        nothing of it."""
        node = self.node
        assert node is not None
        coming = Cluster({kind: dict(found) for kind, found in node.cluster.objects.items()})
        was = Oracle(coming, HERE)
        old = {question: _both(was, question) for question in questions(node, self._rng, 1)}
        change(coming, action)
        will = Oracle(coming, HERE)
        moving = {
            ip
            for cluster in (node.cluster, coming)
            for at, pod in cluster.of("Pod").items()
            for ip in pod_addresses(pod)
            if _uid(node.cluster, at) != _uid(coming, at)
        }
        watched = [
            (question, all(verdicts))
            for question, verdicts in old.items()
            if verdicts == _both(will, question) and not moving & {question[0], question[1]}
        ]
        self._watched = self._rng.sample(watched, min(PER_ROW, len(watched)))
        self._history = []
        try:
            await node.do([action])
        finally:
            self._watched = []

    def wrote(self, table: str, key: object, row: object) -> None:
        if not self._watched or self.node is None:
            return
        self._history.append(f"{table}: {key} = {row}")
        self.counts["rows"] += 1
        for question, expected in self._watched:
            seen = self.node.send(self.node.flow(*question))
            self.counts["allowed" if expected else "denied"] += 1
            if seen.passed != expected:
                done = "\n".join(self._history)
                raise Difference(
                    f"{question}: old and new say {expected}, {seen.passed} {seen.reason} "
                    f"after\n{done}"
                )


def _both(oracle: Oracle, question: Question) -> tuple[bool, bool]:
    return oracle.egress(*question), oracle.ingress(*question)


def _uid(cluster: Cluster, at: Name) -> str:
    pod = cluster.of("Pod").get(at)
    return pod["metadata"]["uid"] if pod is not None and pod_addresses(pod) else ""


SERVED = {(port.get("protocol", "TCP"), port["port"]) for ports in SERVICE_PORTS for port in ports}


def norm(target: tuple[str, int]) -> tuple[str, int]:
    """With the address as the kernel writes it."""
    return str(address(target[0])), target[1]


def questions(node: TestedNode, rng: Random, probes: int) -> list[Question]:
    """Every pair of which one is here, each with some protocols and ports."""
    local = node.local()
    remote = [
        ip
        for pod in node.cluster.of("Pod").values()
        if pod["spec"]["nodeName"] != HERE
        for ip in pod_addresses(pod)
    ]
    others = remote + OUTSIDE + UNKNOWN + [ip for ips, _ in NODES.values() for ip in ips]
    pairs = [(a, b) for a in local for b in local + others]
    pairs += [(b, a) for a in local for b in others]
    return [
        (a, b, protocol, port)
        for a, b in pairs
        if version(a) == version(b)
        for protocol, port in rng.sample(PROBES, probes)
    ]
