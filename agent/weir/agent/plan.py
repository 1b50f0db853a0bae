# SPDX-License-Identifier: Apache-2.0
"""From changed rows to map writes, in an order in which no packet sees a mixture.

Services: new slots, Maglev tables and source ranges → service rows → old ones. Policy, where an
address moves from class a to b and a subject from rule set R to S:

1. rows that are to be, beside those that are;
2. addresses that gain selectors (a ⊆ b) move; those that gain and lose move to a ∪ b;
3. endpoints become isolated, then switch between rule sets, then become free;
4. addresses that lose selectors move, gone ones go;
5. rows that are no more.

Prefixes nest, so one that comes or goes moves addresses too: from the class of the longest prefix
around it, or to that. It comes in step 2, before wider ones do and those that are there change;
it goes at the end of step 4, when it has the class that its addresses will have without it.

The class that an address is in during step 3 (b, a and b, or a) gets copies of rows as far as it
lacks them, and loses them in step 5: of rule sets that go, the rows of a; of ordered ones that stay
or come, those of b; of unions that stay both, as their rules may change in place. A class of both
is nobody else's, so an ordered rule set finds in it what it found in a or what it will find in b,
never the first of either tier's. A row that is there already stays if its order is the lower one.

So a rule set finds in that class what it found in a, if it is old, and what it will find in b, if
it is new, as long as nothing but the policies changed: of their selectors, one that a and b do not
share is in no rule set of the other side. Where labels changed, and no endpoint's isolation,
addresses move from a to b at once in step 2: each is one write, and rule sets have rows for both.

A verdict of a union is an OR over its rows; an ordered rule set's rules never change, a subject
gets another one. So throughout the change of one policy in one direction, or of the labels of a
pod elsewhere, or while a policy comes or goes, what old and new state both allow is allowed and
what both deny is denied: tests/unit checks it op by op. For ClusterNetworkPolicies that is so for
each direction: one that comes, goes or changes in both looks like two. Several such changes in one
delta, or a relabelled pod of this node (first other pods' peer, then subject), look like some order
of them, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Generic, TypeVar

from weir.agent.classes import NOTHING, ClassContent, Numbers
from weir.agent.identity import CLASS_WORLD
from weir.agent.policy import PolicyTables
from weir.agent.rows import Change
from weir.agent.tables import Delta
from weir.api.address import Addr, cidr
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
    blocked: list[AnyOp]
    announced: list[AnyOp]
    namespaces: list[AnyOp]
    judge_again: bool
    borrowed: tuple[int, ...] = ()  # class numbers used during the plan only


def plan(
    delta: Delta,
    numbers: Numbers[ClassContent],
    policy: PolicyTables,
    prefixes: Mapping[records.PrefixKey, records.Prefix],
) -> Plan:
    """`policy`: has the desired rows, of which classes on their way need copies. `prefixes`: the
    desired rows, among which those that come or go lie."""
    moves = Moves(numbers, switching=_switches(delta.endpoints))
    early_addresses, late_addresses = moves.split(delta.addresses, _address_class)
    early_prefixes, late_prefixes = moves.prefixes(delta.prefixes, prefixes)
    early, isolate, switch, free, late = moves.endpoints(delta.endpoints)
    copies = moves.copies(policy, delta.policy)
    obsolete = _deletes(delta.policy) + tuple(copies)
    ops: list[AnyOp] = [
        _op("policy", _upserts(delta.policy) | copies),
        _op("prefixes", early_prefixes),
        _op("addresses", early_addresses),
        _op("endpoints", early),
        _op("endpoints", isolate),
        _op("endpoints", switch),
        _op("endpoints", free),
        _op("endpoints", late, _deletes(delta.endpoints)),
        _op("addresses", late_addresses, _deletes(delta.addresses)),
        _op("prefixes", late_prefixes, _deletes(delta.prefixes)),
        _op("policy", {}, obsolete),
    ]
    return Plan(
        services=_some(
            [
                _op("backends", _upserts(delta.backends)),
                _op("maglev", _upserts(delta.maglev)),
                _op("source_ranges", _upserts(delta.source_ranges)),
                _op("services", _upserts(delta.services), _deletes(delta.services)),
                _op("backends", {}, _deletes(delta.backends)),
                _op("maglev", {}, _deletes(delta.maglev)),
                _op("source_ranges", {}, _deletes(delta.source_ranges)),
            ]
        ),
        policy=_some(ops),
        routes=_some([_op("routes", _upserts(delta.routes), _deletes(delta.routes))]),
        blocked=_some([_op("blocked", _upserts(delta.blocked), _deletes(delta.blocked))]),
        announced=_some([_op("announced", _upserts(delta.announced), _deletes(delta.announced))]),
        namespaces=_some(
            [
                _op(
                    "netns_addresses",
                    _upserts(delta.netns_addresses),
                    _deletes(delta.netns_addresses),
                )
            ]
        ),
        judge_again=_judge_again(delta),
        borrowed=tuple(moves.borrowed),
    )


class Moves:
    """Which way each address goes from one class to another. `switching`: endpoints get another
    isolation meanwhile."""

    def __init__(self, numbers: Numbers[ClassContent], *, switching: bool) -> None:
        self._numbers = numbers
        self._switching = switching
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

    def prefixes(
        self,
        changes: Mapping[records.PrefixKey, Change[records.Prefix]],
        desired: Mapping[records.PrefixKey, records.Prefix],
    ) -> tuple[dict[records.PrefixKey, records.Prefix], dict[records.PrefixKey, records.Prefix]]:
        """As `split`, with what comes first, the longest before others."""
        if all(old is not None and new is not None for old, new in changes.values()):
            return self.split(changes, _prefix_class)
        known = {key: change.old for key, change in changes.items() if change.old is not None}
        before = {key: row for key, row in desired.items() if key not in changes} | known
        around = {True: _Around(before), False: _Around(desired)}
        moved = {
            key: Change(old or around[True].row(key), new or around[False].row(key))
            for key, (old, new) in changes.items()
        }
        early, late = self.split(moved, _prefix_class)
        coming = sorted(changes.keys() - before.keys(), key=lambda key: key.bits, reverse=True)
        first = {key: early.get(key) or moved[key].old for key in coming}
        return {key: row for key, row in first.items() if row is not None} | early, late

    def endpoints(
        self, changes: Mapping[Addr, Change[records.Endpoint]]
    ) -> list[dict[Addr, records.Endpoint]]:
        """Rows by stage: class early, isolate, switch rule sets, un-isolate, class late."""
        stages: list[dict[Addr, records.Endpoint]] = [{} for _ in range(5)]
        for addr, (old, new) in changes.items():
            if new is None:
                continue
            if old is None or old.ifindex != new.ifindex:
                stages[1][addr] = new
                continue
            between = replace(old, class_=self.between(old.class_, new.class_))
            isolated = replace(
                between,
                egress=old.egress if old.egress.rule_set else new.egress,
                ingress=old.ingress if old.ingress.rule_set else new.ingress,
            )
            switched = replace(
                isolated,
                egress=new.egress if new.egress.rule_set else old.egress,
                ingress=new.ingress if new.ingress.rule_set else old.ingress,
            )
            last = replace(new, class_=between.class_)
            row = old
            for stage, wanted in zip(stages, (between, isolated, switched, last, new), strict=True):
                if wanted != row:
                    stage[addr] = row = wanted
        return stages

    def between(self, old: int, new: int) -> int:
        """The class to be in while endpoints switch: old, new, or one that is both."""
        if old == new or not self._switching:
            return new
        number = self._between.get((old, new))
        if number is not None:
            return number
        before = self._numbers.key(old) or NOTHING
        after = self._numbers.key(new) or NOTHING
        if before <= after:
            number = new
        elif after <= before:
            number = old
        else:
            own = ClassContent(frozenset({f"from {old} to {new}"}), frozenset())
            number = self._numbers.acquire(before | after | own)
            self.borrowed.append(number)
        self._between[old, new] = number
        return number

    def copies(
        self,
        policy: PolicyTables,
        changes: Mapping[records.PolicyKey, Change[records.PolicyVerdict]],
    ) -> dict[records.PolicyKey, records.PolicyVerdict]:
        """Rows that a class in between lacks: of which side, the module's text says."""
        before: dict[int, set[int]] = {}
        after: dict[int, set[int]] = {}
        for (old, new), between in self._between.items():
            for side, number in ((before, old), (after, new)):
                if number != between:
                    side.setdefault(number, set()).add(between)

        def targets(key: records.PolicyKey) -> set[int]:
            rule_set = policy.rule_set(key.rule_set)
            was, will_be = before.get(key.peer, set()), after.get(key.peer, set())
            if rule_set is None:
                return was
            return will_be if rule_set.key.ordered else was | will_be

        copies: dict[records.PolicyKey, records.PolicyVerdict] = {}
        gone = ((key, change.old) for key, change in changes.items() if change.old is not None)
        sources = before.keys() | after.keys()
        wanted = (row for source in sources for row in policy.rows_of_peer(source))
        for key, verdict in chain(gone, wanted) if sources else ():
            for number in targets(key):
                copy = replace(key, peer=number)
                there = changes[copy].old if copy in changes else None
                if policy.rows.get(copy) is not None or (there and there.order <= verdict.order):
                    continue
                if copy not in copies or verdict.order <= copies[copy].order:
                    copies[copy] = verdict
        return copies


class _Around:
    """Longest prefixes around others, in one state of the table."""

    def __init__(self, rows: Mapping[records.PrefixKey, records.Prefix]) -> None:
        self._rows = rows
        self._lengths = sorted({key.bits for key in rows}, reverse=True)

    def row(self, key: records.PrefixKey) -> records.Prefix:
        """What addresses in the prefix get that are in no longer one."""
        for bits in self._lengths:
            if bits < key.bits:
                row = self._rows.get(records.PrefixKey(bits, cidr(key.address, bits).address))
                if row is not None:
                    return row
        return records.Prefix(CLASS_WORLD)


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


def _switches(endpoints: Mapping[Addr, Change[records.Endpoint]]) -> bool:
    return any(
        old is not None
        and new is not None
        and (old.egress, old.ingress) != (new.egress, new.ingress)
        for old, new in endpoints.values()
    )


def _judge_again(delta: Delta) -> bool:
    """Whether an established flow may now be denied, or its address be another's."""
    if delta.prefixes:
        return True
    if any(c.old is not None for c in delta.policy.values()):
        return True
    if any(c.old is not None or (c.new and c.new.flags) for c in delta.addresses.values()):
        return True
    # A new endpoint's address may have been asked before it was there: nothing judged its ingress
    # then, but the flow was recorded.
    return any(
        c.old is not None or (c.new is not None and c.new.ingress.rule_set)
        for c in delta.endpoints.values()
    )


def _address_class(row: records.Address) -> int:
    return row.class_


def _prefix_class(row: records.Prefix) -> int:
    return row.class_
