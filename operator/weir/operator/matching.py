# SPDX-License-Identifier: Apache-2.0
"""Which pod selectors select which pods, kept up to date in both directions.

Pods with equal labels and named ports in one namespace form a *group* and are matched once.
Both sides are indexed by label pairs: a new selector looks only at groups that carry a pair it
requires, a new group only at selectors that require a pair it carries (and the few that require
none). Selectors hang under their scope, so a namespace is matched once a distinct scope.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from weir.operator.classes import Cell, Space
from weir.operator.objects import Labels, Port
from weir.operator.prefixes import Prefix
from weir.operator.selectors import InNamespace, InNamespaces, LabelSelector, Pods, Scope

Pair = tuple[str, str]
K = TypeVar("K")
V = TypeVar("V")


@dataclass(slots=True, eq=False)
class Group:
    """Pods that no selector can tell apart; in cells by the prefix that their addresses are
    in, or the space of those in none."""

    namespace: str
    labels: Labels
    ports: tuple[Port, ...]
    by_key: dict[str, str]
    pods: int = 0
    selectors: set[int] = field(default_factory=set)
    cells: dict[Prefix | Space, Cell[object]] = field(default_factory=dict)


@dataclass(slots=True)
class _Scope:
    """The label selectors in use under one scope, and the namespaces that it covers."""

    numbers: dict[LabelSelector, int] = field(default_factory=dict)
    by_pair: dict[Pair, set[LabelSelector]] = field(default_factory=lambda: defaultdict(set))
    rest: set[LabelSelector] = field(default_factory=set)
    namespaces: set[str] = field(default_factory=set)

    def matching(self, group: Group) -> Iterator[int]:
        for selector in self.rest:
            if selector.matches(group.by_key):
                yield self.numbers[selector]
        if self.by_pair:
            for pair in group.labels:
                for selector in self.by_pair.get(pair, ()):
                    if selector.matches(group.by_key):
                        yield self.numbers[selector]


class Matcher:
    """Selectors, namespaces and groups. Every change returns the groups whose set changed."""

    def __init__(self) -> None:
        self._namespaces: dict[str, dict[str, str]] = {}
        self._scopes: dict[Scope, _Scope] = {}
        self._covering: dict[str, set[Scope]] = defaultdict(set)
        self._groups: dict[tuple[str, Labels, tuple[Port, ...]], Group] = {}
        self._in_namespace: dict[str, set[Group]] = defaultdict(set)
        self._by_pair: dict[tuple[str, str, str], set[Group]] = defaultdict(set)
        self._by_port: dict[tuple[str, int], set[Group]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._groups)

    def knows(self, namespace: str) -> bool:
        return namespace in self._namespaces

    def with_port(self, name: str, protocol: int) -> Iterable[Group]:
        return self._by_port.get((name, protocol), ())

    def group(self, namespace: str, labels: Labels, ports: tuple[Port, ...]) -> Group:
        """The group of such pods, made and matched if there is none."""
        key = (namespace, labels, ports)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(namespace, labels, ports, dict(labels))
            self._in_namespace[namespace].add(group)
            for k, v in labels:
                self._by_pair[namespace, k, v].add(group)
            for port in ports:
                self._by_port[port.name, port.protocol].add(group)
            for scope in self._covering.get(namespace, ()):
                group.selectors.update(self._scopes[scope].matching(group))
        return group

    def drop(self, group: Group) -> None:
        """Forget a group that has no pods left."""
        del self._groups[group.namespace, group.labels, group.ports]
        _discard(self._in_namespace, group.namespace, group)
        for k, v in group.labels:
            _discard(self._by_pair, (group.namespace, k, v), group)
        for port in group.ports:
            _discard(self._by_port, (port.name, port.protocol), group)

    def add(self, number: int, selector: Pods) -> list[Group]:
        scope = self._scopes.get(selector.scope)
        if scope is None:
            scope = self._scopes[selector.scope] = _Scope()
            for name in self._covered(selector.scope):
                scope.namespaces.add(name)
                self._covering[name].add(selector.scope)
        scope.numbers[selector.labels] = number
        pairs = selector.labels.pairs()
        if pairs is None:
            scope.rest.add(selector.labels)
        else:
            for pair in pairs:
                scope.by_pair[pair].add(selector.labels)
        changed = list(self._selected(scope, selector.labels))
        for group in changed:
            group.selectors.add(number)
        return changed

    def remove(self, number: int, selector: Pods) -> list[Group]:
        scope = self._scopes[selector.scope]
        changed = list(self._selected(scope, selector.labels))
        for group in changed:
            group.selectors.discard(number)
        del scope.numbers[selector.labels]
        pairs = selector.labels.pairs()
        if pairs is None:
            scope.rest.discard(selector.labels)
        else:
            for pair in pairs:
                _discard(scope.by_pair, pair, selector.labels)
        if not scope.numbers:
            del self._scopes[selector.scope]
            for name in scope.namespaces:
                _discard(self._covering, name, selector.scope)
        return changed

    def set_namespace(self, name: str, labels: Labels | None) -> list[Group]:
        """The namespace has these labels from now on; None: it is gone."""
        if labels is None:
            self._namespaces.pop(name, None)
        else:
            self._namespaces[name] = dict(labels)
        changed: set[Group] = set()
        groups = self._in_namespace.get(name, ())
        for key, scope in self._scopes.items():
            covers = _covers(key, name, self._namespaces.get(name))
            if covers and name not in scope.namespaces:
                scope.namespaces.add(name)
                self._covering[name].add(key)
                for group in groups:
                    numbers = set(scope.matching(group))
                    if numbers:
                        group.selectors |= numbers
                        changed.add(group)
            elif not covers and name in scope.namespaces:
                scope.namespaces.discard(name)
                _discard(self._covering, name, key)
                for group in groups:
                    numbers = set(scope.matching(group))
                    if numbers:
                        group.selectors -= numbers
                        changed.add(group)
        return list(changed)

    def _covered(self, scope: Scope) -> list[str]:
        if isinstance(scope, InNamespace):
            return [scope.name] if scope.name in self._namespaces else []
        return [n for n, labels in self._namespaces.items() if scope.labels.matches(labels)]

    def _selected(self, scope: _Scope, labels: LabelSelector) -> Iterator[Group]:
        pairs = labels.pairs()
        for name in scope.namespaces:
            if pairs is None:
                candidates: Iterable[Group] = self._in_namespace.get(name, ())
            else:
                candidates = set[Group]().union(
                    *(self._by_pair.get((name, *pair), ()) for pair in pairs)
                )
            for group in candidates:
                if labels.matches(group.by_key):
                    yield group


def _covers(scope: Scope, name: str, labels: dict[str, str] | None) -> bool:
    if labels is None:
        return False
    if isinstance(scope, InNamespaces):
        return scope.labels.matches(labels)
    return scope.name == name


def _discard(index: dict[K, set[V]], key: K, value: V) -> None:
    """Take a value out of a set in an index, and the set with it when it was the last."""
    values = index.get(key)
    if values is not None:
        values.discard(value)
        if not values:
            del index[key]
