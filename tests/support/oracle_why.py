# SPDX-License-Identifier: Apache-2.0
"""What `weir policy why` would answer on the tested node, against the model of the specs."""

from __future__ import annotations

from typing import cast

from support.oracle import Oracle, version
from support.oracle_node import TestedNode
from support.spec_oracle import ADMIN, BASELINE, EGRESS, INGRESS
from weir.agent import verdict
from weir.agent.explain import Explainer
from weir.agent.judge import Flow, judge
from weir.agent.model import Model
from weir.agent.walks import Walks
from weir.agent.why import KernelMaps, Why
from weir.api.address import parse
from weir.datapath.records import Direction, DropReason

NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}
SIDES = {Direction.EGRESS: EGRESS, Direction.INGRESS: INGRESS}


class Explanations:
    """Of the moment in which it is made."""

    def __init__(self, node: TestedNode) -> None:
        projection = node.agent.projection
        self._placement = projection.placement
        self._explainer = Explainer(projection, {})
        self._why = Why(projection, self._explainer, cast("Walks", None))
        self._model = Model(projection)
        self._maps = KernelMaps(node.datapath.tables)

    def differences(
        self, oracle: Oracle, source: str, target: str, protocol: str, port: int
    ) -> list[str]:
        """What policies, maps and specs do not agree about, of the ends that are here."""
        icmp = 1 if version(source) == 4 else 58
        flow = Flow(parse(source), parse(target), NUMBERS.get(protocol, icmp), port)
        found: list[str] = []
        for direction, side in SIDES.items():
            here = source if direction is Direction.EGRESS else target
            if not oracle.is_local(here) or self._placement.located(parse(here)) is None:
                continue
            wanted = oracle.spec.decision(side, source, target, protocol, port)
            question = self._why.question(self._model, flow, direction)
            decision = self._model.decide(question)
            because = verdict.because(decision, question)
            if decision.allowed != wanted.allowed:
                found.append(f"policies say {because}, specs {wanted}")
            elif not wanted.allowed and not all(by.policy in because for by in wanted.by):
                found.append(f"because of {wanted.by}, not: {because}")
            done = judge(self._maps, flow, direction)
            if (done.reason is DropReason.NONE) != wanted.allowed:
                found.append(f"maps say {done}, specs {wanted}")
            elif wanted.tier in (ADMIN, BASELINE):
                _, rule = self._explainer.deciders(done.rule, done.rule_set, done.reason)
                [by] = wanted.by
                if rule != f"{question.direction} rule {by.rule} of {by.policy}":
                    found.append(f"by {by}, and not by {rule}")
        return found
