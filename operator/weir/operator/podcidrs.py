# SPDX-License-Identifier: Apache-2.0
"""Pod CIDRs that two nodes claim: the node that was created first keeps them.

Otherwise agents would send one pod's packets to another's node, each by the order in which it
heard of the two. The other node goes without, on every agent and its own: pods there get no
address from it, which fails visibly, instead of addresses that are in use elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from weir.api.address import Cidr, cidr
from weir.operator.objects import Node, Problem


@dataclass(slots=True)
class PodCidrs:
    """All nodes as the API has them, and by what they claim."""

    _nodes: dict[str, Node] = field(default_factory=dict)
    _claims: dict[int, dict[Cidr, set[str]]] = field(default_factory=dict)  # by length

    def change(self, name: str, new: Node | None) -> dict[str, tuple[Node, tuple[Problem, ...]]]:
        """The nodes concerned, as they are to be used, and what is wrong with each. The changed
        one is among them, unless it is gone."""
        concerned = {name}
        old = self._nodes.pop(name, None)
        if old is not None:
            for claim in old.pod_cidrs:
                concerned |= self._overlapping(claim)
                self._claims[claim.bits][claim].discard(name)
        if new is not None:
            self._nodes[name] = new
            for claim in new.pod_cidrs:
                self._claims.setdefault(claim.bits, {}).setdefault(claim, set()).add(name)
                concerned |= self._overlapping(claim)
        return {at: self._judge(self._nodes[at]) for at in sorted(concerned) if at in self._nodes}

    def _overlapping(self, claim: Cidr) -> set[str]:
        found: set[str] = set()
        for bits, claims in self._claims.items():
            if bits <= claim.bits:
                found |= claims.get(cidr(claim.address, bits), set())
            else:  # lengths differ between nodes, which is rare
                for other, names in claims.items():
                    if claim.contains(other.address):
                        found |= names
        return found

    def _judge(self, node: Node) -> tuple[Node, tuple[Problem, ...]]:
        kept: list[Cidr] = []
        problems: list[Problem] = []
        for claim in node.pod_cidrs:
            others = [self._nodes[name] for name in self._overlapping(claim)]
            first = min(others, key=lambda other: (other.created, other.key.name))
            if first.key == node.key:
                kept.append(claim)
            else:
                text = f"{claim.text()} of node {node.key.name} overlaps a pod CIDR of node "
                text += f"{first.key.name}, which was created first and keeps it"
                problems.append(Problem("spec.podCIDRs", text))
        return replace(node, pod_cidrs=tuple(kept)) if problems else node, tuple(problems)
