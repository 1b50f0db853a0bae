# SPDX-License-Identifier: Apache-2.0
"""What policies would do to flows: compiled as the operator does, judged as agents would.

A cluster is compiled into resources, and those are read as an agent reads them, but for one that
has all pods: weir.agent.model answers for each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from weir.agent import resources, verdict
from weir.agent.judge import Flow
from weir.agent.model import Model
from weir.agent.resources import Resource, parse
from weir.agent.tables import Projection
from weir.agent.verdict import Decision, Question, Standing
from weir.api.address import Addr, text
from weir.cli.cluster import Objects
from weir.operator.compiler import Compiler
from weir.operator.objects import Pod


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one end says of a flow; said in words when it is asked. audited: what it denies passes
    all the same, by its namespace's annotation."""

    question: Question
    decision: Decision
    audited: bool

    @property
    def direction(self) -> str:
        return self.question.direction

    @property
    def allowed(self) -> bool:
        return self.decision.allowed

    @property
    def because(self) -> str:
        return verdict.because(self.decision, self.question)


@dataclass(frozen=True, slots=True)
class Changed:
    """A flow that would fare otherwise, by the end that makes the difference."""

    flow: Flow
    allowed: bool  # by the new policies
    before: Outcome
    after: Outcome


class Cluster:
    def __init__(self, objects: Objects) -> None:
        self._pods: dict[Addr, Pod] = {
            addr: pod for pod in objects.pods.values() if pod.live for addr in pod.addresses
        }
        self._nodes = {key.name: node.addresses for key, node in objects.nodes.items()}
        self._named = {addr: name for name, addrs in self._nodes.items() for addr in addrs}
        told = _compiled(objects)
        self._audited = {
            item.uid for item in told.values() if isinstance(item, resources.Pod) and item.audit
        }
        projection = Projection()
        projection.apply(told)
        projection.project()
        self._model = Model(projection)

    def name(self, addr: Addr) -> str:
        pod = self._pods.get(addr)
        if pod is not None:
            return str(pod.key)
        node = self._named.get(addr)
        return f"node {node}" if node else text(addr)

    def outcomes(self, flow: Flow) -> tuple[Outcome, ...]:
        """Of the ends that are pods: the opener's first."""
        return tuple(
            self._outcome(egress, pod, here, there, flow)
            for egress, here, there in (
                (True, flow.source, flow.destination),
                (False, flow.destination, flow.source),
            )
            if (pod := self._pods.get(here)) is not None
        )

    def _outcome(self, egress: bool, pod: Pod, here: Addr, there: Addr, flow: Flow) -> Outcome:
        peer = self._model.party(there, self.name(there))
        if self._pods.get(there) is pod:
            peer = replace(peer, standing=Standing.ITSELF)
        elif there in self._nodes.get(pod.node, ()):
            peer = replace(peer, own_node=True)
        subject = self._model.party(here, self.name(here))
        question = Question(egress, subject, peer, flow.protocol, flow.port)
        decision = self._model.decide(question)
        return Outcome(question, decision, not decision.allowed and pod.uid in self._audited)


def _compiled(objects: Objects) -> dict[str, Resource]:
    """What the operator would tell agents."""
    compiler = Compiler()
    for key, namespace in objects.namespaces.items():
        compiler.namespace(key, namespace)
    for (_, key), policy in objects.policies.items():
        compiler.policy(key, policy)
    for key, node in objects.nodes.items():
        compiler.node(key, node)
    for key, pod in objects.pods.items():
        compiler.pod(key, pod)
    told: dict[str, Resource] = {}
    for change in compiler.flush():
        if change.resource is not None:
            name, item = parse(change.resource.SerializeToString())
            told[name] = item
    return told


def compare(old: Cluster, new: Cluster, flows: Iterable[Flow]) -> list[Changed]:
    """Flows that one of them lets through and the other does not."""
    changed: list[Changed] = []
    for flow in flows:
        before, after = old.outcomes(flow), new.outcomes(flow)
        allowed = all(outcome.allowed for outcome in after)
        if all(outcome.allowed for outcome in before) is allowed:
            continue
        # The end that denies it, before or after.
        at = next(
            n for n, outcome in enumerate(before if allowed else after) if not outcome.allowed
        )
        changed.append(Changed(flow, allowed, before[at], after[at]))
    return changed
