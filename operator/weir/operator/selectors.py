# SPDX-License-Identifier: Apache-2.0
"""Selectors: what a policy names as subject or peer, in one canonical form.

A selector's `key` is what agents know it by, across operators: equal keys must mean equal sets.
That holds because the parser refuses label keys and values with characters that the text uses.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from weir.api.address import Cidr


class Operator(enum.StrEnum):
    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One condition on one label. `values` are sorted, and empty for the Exists operators."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.operator is Operator.IN:
            return value is not None and value in self.values
        if self.operator is Operator.NOT_IN:
            return value is None or value not in self.values
        return (value is not None) is (self.operator is Operator.EXISTS)

    def text(self) -> str:
        match self.operator:
            case Operator.IN:
                return f"{self.key} in ({','.join(self.values)})"
            case Operator.NOT_IN:
                return f"{self.key} notin ({','.join(self.values)})"
            case Operator.EXISTS:
                return self.key
            case Operator.DOES_NOT_EXIST:
                return f"!{self.key}"


@dataclass(frozen=True, slots=True, order=True)
class LabelSelector:
    """All requirements must hold; without any it selects everything. Sorted, no duplicates."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)

    def text(self) -> str:
        return " ".join(requirement.text() for requirement in self.requirements) or "*"

    def pairs(self) -> tuple[tuple[str, str], ...] | None:
        """Label pairs one of which every match carries: what an index goes by. None: no such."""
        sure = [r for r in self.requirements if r.operator is Operator.IN]
        if not sure:
            return None
        best = min(sure, key=lambda requirement: len(requirement.values))
        return tuple((best.key, value) for value in best.values)


def label_selector(*requirements: Requirement) -> LabelSelector:
    return LabelSelector(tuple(sorted(set(requirements))))


EVERYTHING = LabelSelector()


@dataclass(frozen=True, slots=True)
class InNamespace:
    """The namespace of this name."""

    name: str

    def text(self) -> str:
        return f"pods ns={self.name}"


@dataclass(frozen=True, slots=True)
class InNamespaces:
    """The namespaces with such labels."""

    labels: LabelSelector

    def text(self) -> str:
        return f"nspods {self.labels.text()} /"


Scope = InNamespace | InNamespaces


@dataclass(frozen=True, slots=True)
class Pods:
    """The pods with such labels in such namespaces; never those in the host's network."""

    scope: Scope
    labels: LabelSelector

    @property
    def key(self) -> str:
        return f"{self.scope.text()} {self.labels.text()}"


@dataclass(frozen=True, slots=True)
class Nodes:
    """All addresses of the nodes with such labels."""

    labels: LabelSelector

    @property
    def key(self) -> str:
        return f"nodes {self.labels.text()}"


@dataclass(frozen=True, slots=True)
class IpBlock:
    """The addresses in `cidr` that are in none of `excepts`, all of which lie within it."""

    cidr: Cidr
    excepts: tuple[Cidr, ...] = ()

    @property
    def key(self) -> str:
        if not self.excepts:
            return f"ipblock {self.cidr.text()}"
        return f"ipblock {self.cidr.text()} except {','.join(e.text() for e in self.excepts)}"


Selector = Pods | Nodes | IpBlock
