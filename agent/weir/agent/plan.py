# SPDX-License-Identifier: Apache-2.0
"""From changed rows to map writes, in an order in which no packet sees a mixture.

Services: new slots → service rows → old slots. Policy, where an address moves from class a to b
and a subject from rule set R to S:

1. rows that are to be, beside those that are;
2. addresses that gain selectors (a ⊆ b) move; those that gain and lose move to a ∪ b, whose
   rows are those of both;
3. endpoints switch to their new rule sets (and to isolation, whose rows are there);
4. addresses that lose selectors move, gone ones go;
5. rows that are no more.

A verdict is an OR over rows and rows are a union over a class's selectors, so at each point a
packet meets rules and selectors of which the old or the new state had every one: what both
states allow is allowed throughout, what both deny is denied throughout. tests/unit checks this
op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from weir.agent.classes import NOTHING, ClassContent, Numbers
from weir.agent.rows import Change
from weir.agent.tables import Delta
from weir.api.address import Addr
from weir.datapath import records

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Op(Generic[K, V]):
    """Rows to write and keys to delete in one map."""

    table: str
    upserts: Mapping[K, V]
    deletes: tuple[K, ...] = ()


AnyOp = Op[Hashable, object]


@dataclass(frozen=True, slots=True)
class Plan:
    """Groups are independent of each other; a group's ops are in order."""

    services: list[AnyOp]
    policy: list[AnyOp]
    routes: list[AnyOp]
    judge_again: bool
    borrowed: tuple[int, ...] = ()  # class numbers used during the plan only


def plan(
    delta: Delta,
    numbers: Numbers[ClassContent],
    policy_rows: Mapping[records.PolicyKey, records.PolicyVerdict],
) -> Plan:
    """`policy_rows`: all desired ones, of which classes on their way need copies."""
    moves = Moves(numbers)
    early_addresses, late_addresses = moves.split(delta.addresses, _address_class)
    early_prefixes, late_prefixes = moves.split(delta.prefixes, _prefix_class)
    early, switch, late = moves.endpoints(delta.endpoints)
    copies = moves.copies(policy_rows, delta.policy)
    obsolete = _deletes(delta.policy) + tuple(copies)
    ops: list[AnyOp] = [
        _op("policy", _upserts(delta.policy) | copies),
        _op("prefixes", early_prefixes),
        _op("addresses", early_addresses),
        _op("endpoints", early),
        _op("endpoints", switch),
        _op("endpoints", late, _deletes(delta.endpoints)),
        _op("addresses", late_addresses, _deletes(delta.addresses)),
        _op("prefixes", late_prefixes, _deletes(delta.prefixes)),
        _op("policy", {}, obsolete),
    ]
    return Plan(
        services=_some(
            [
                _op("backends", _upserts(delta.backends)),
                _op("services", _upserts(delta.services), _deletes(delta.services)),
                _op("backends", {}, _deletes(delta.backends)),
            ]
        ),
        policy=_some(ops),
        routes=_some([_op("routes", _upserts(delta.routes), _deletes(delta.routes))]),
        judge_again=_judge_again(delta),
        borrowed=tuple(moves.borrowed),
    )


class Moves:
    """Which way each address goes from one class to another."""

    def __init__(self, numbers: Numbers[ClassContent]) -> None:
        self._numbers = numbers
        self._between: dict[tuple[int, int], int] = {}
        self.borrowed: list[int] = []

    def split(
        self, changes: Mapping[K, Change[V]], number: Callable[[V], int]
    ) -> tuple[dict[K, V], dict[K, V]]:
        """Rows to write before and after the endpoints switch."""
        early: dict[K, V] = {}
        late: dict[K, V] = {}
        for key, (old, new) in changes.items():
            if new is None:
                continue
            if old is None:
                early[key] = new
                continue
            between = self.between(number(old), number(new))
            if between != number(old):
                early[key] = _with_class(new, between)
            if between != number(new):
                late[key] = new
            elif between == number(old):
                early[key] = new
        return early, late

    def endpoints(
        self, changes: Mapping[Addr, Change[records.Endpoint]]
    ) -> tuple[dict[Addr, records.Endpoint], ...]:
        """Rows before, at and after the switch of rule sets."""
        stages: tuple[dict[Addr, records.Endpoint], ...] = ({}, {}, {})
        for addr, (old, new) in changes.items():
            if new is None:
                continue
            if old is None or old.ifindex != new.ifindex:
                stages[1][addr] = new
                continue
            between = self.between(old.class_, new.class_)
            row = old
            for stage, wanted in zip(
                stages,
                (replace(old, class_=between), replace(new, class_=between), new),
                strict=True,
            ):
                if wanted != row:
                    stage[addr] = row = wanted
        return stages

    def between(self, old: int, new: int) -> int:
        """The class to be in while endpoints switch: old, new, or one that is both."""
        if old == new:
            return new
        before = self._numbers.key(old) or NOTHING
        after = self._numbers.key(new) or NOTHING
        if before <= after:
            return new
        if after <= before:
            return old
        number = self._between.get((old, new))
        if number is None:
            number = self._numbers.acquire(before | after)
            self.borrowed.append(number)
            self._between[old, new] = number
        return number

    def copies(
        self,
        rows: Mapping[records.PolicyKey, records.PolicyVerdict],
        changes: Mapping[records.PolicyKey, Change[records.PolicyVerdict]],
    ) -> dict[records.PolicyKey, records.PolicyVerdict]:
        """Rows of classes in between: those of both sides, old and new."""
        targets: dict[int, set[int]] = {}
        for (old, new), between in self._between.items():
            targets.setdefault(old, set()).add(between)
            targets.setdefault(new, set()).add(between)
        copies: dict[records.PolicyKey, records.PolicyVerdict] = {}
        if not targets:
            return copies
        gone = {key: change.old for key, change in changes.items() if change.old is not None}
        for source in (gone, rows):
            for key, verdict in source.items():
                for number in targets.get(key.peer, ()):
                    copy = replace(key, peer=number)
                    if copy not in rows:
                        copies[copy] = verdict
        return copies


def _with_class(row: V, number: int) -> V:
    return replace(row, class_=number)  # type: ignore[type-var]  # Address or Prefix


def _upserts(changes: Mapping[K, Change[V]]) -> dict[K, V]:
    return {key: change.new for key, change in changes.items() if change.new is not None}


def _deletes(changes: Mapping[K, Change[V]]) -> tuple[K, ...]:
    return tuple(key for key, change in changes.items() if change.new is None)


def _op(table: str, upserts: Mapping[K, V], deletes: tuple[K, ...] = ()) -> AnyOp:
    return Op(table, upserts, deletes)  # type: ignore[arg-type]  # the table's own types


def _some(ops: list[AnyOp]) -> list[AnyOp]:
    return [op for op in ops if op.upserts or op.deletes]


def _judge_again(delta: Delta) -> bool:
    """Whether an established flow may now be denied, or its address be another's."""
    if delta.prefixes:
        return True
    if any(c.old is not None for c in delta.policy.values()):
        return True
    if any(c.old is not None or (c.new and c.new.flags) for c in delta.addresses.values()):
        return True
    return any(c.old is not None for c in delta.endpoints.values())


def _address_class(row: records.Address) -> int:
    return row.class_


def _prefix_class(row: records.Prefix) -> int:
    return row.class_
