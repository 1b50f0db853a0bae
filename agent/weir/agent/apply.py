# SPDX-License-Identifier: Apache-2.0
"""Carries out a group of a plan, and compares the kernel's tables with the desired rows.

Everything here blocks and runs in a thread; it chooses nothing but what a full map forces:
what does not fit is left out in a way that lets less through, never more, and is named in the
outcome.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from weir.agent.plan import AnyOp
from weir.api.address import cidr
from weir.datapath import records
from weir.datapath.errors import DatapathError, TableFull
from weir.datapath.table import TableLike

logger = logging.getLogger(__name__)

AnyTable = TableLike[Any, Any]
"""A table of any key and value: this module moves rows without looking into most of them."""


@dataclass(slots=True)
class Outcome:
    """`failed`: the group stopped there, the kernel is somewhere between old and new. `shut`:
    ordered rule sets that lack a row which denies or passes, or a prefix or node for it."""

    failed: DatapathError | None = None
    shut: set[int] = field(default_factory=set)
    rejected: dict[str, set[Hashable]] = field(default_factory=dict)
    written: int = 0
    deleted: int = 0


def apply_group(
    ops: Iterable[AnyOp],
    tables: Mapping[str, AnyTable],
    shut: Iterable[int] = (),
    relying_on: Callable[[str], Collection[int]] = lambda _: (),
) -> Outcome:
    """`shut`: rule sets that lack such a row already. `relying_on`: those that do if a prefix or a
    node's address does not fit, by the table's name."""
    outcome = Outcome(shut=set(shut))
    for op in ops:
        table = tables[op.table]
        upserts: Mapping[Any, Any] = op.upserts
        if op.table == "services":
            upserts = _shortened(upserts, outcome)
        if op.table == "prefixes":
            # What did not fit earlier, and what was taken away for that, stays out.
            out = outcome.rejected.get("prefixes", set())
            upserts = {key: row for key, row in upserts.items() if key not in out}
        if op.table == "endpoints" and outcome.shut:
            upserts = {key: shut_in(row, outcome.shut) for key, row in upserts.items()}
        try:
            left = _write(table, upserts, outcome)
            if op.table == "policy":
                short = {key.rule_set for key in left if denies_more(upserts[key])}
                _shut(tables, short, outcome)
            elif misses(op.table, map(upserts.get, left)):
                _shut(tables, relying_on(op.table), outcome)
            table.delete(op.deletes)
        except DatapathError as error:
            outcome.failed = error
            return outcome
        outcome.written += len(upserts)
        outcome.deleted += len(op.deletes)
    return outcome


def _write(table: AnyTable, rows: Mapping[Hashable, Any], outcome: Outcome) -> set[Any]:
    """Returns the keys of what is left out."""
    if not rows:
        return set()
    try:
        table.update(rows)
    except TableFull as error:
        left = _squeeze(table, rows)
        if table.name == "prefixes":
            left |= _withhold_wider(table, left)
        logger.warning("%s: %d rows left out", error, len(left))
        outcome.rejected.setdefault(table.name, set()).update(left)
        return left
    return set()


def denies_more(row: records.PolicyVerdict) -> bool:
    """Whether something may pass without the row: so it is of an ordered rule set alone."""
    return row.verdict != records.Verdict.ALLOW


def misses(table: str, left: Iterable[Any]) -> bool:
    """Whether rules that deny may not know what they deny, without these rows."""
    return any(table == "prefixes" or (table == "addresses" and row.flags) for row in left)


def _shut(tables: Mapping[str, AnyTable], rule_sets: Iterable[int], outcome: Outcome) -> None:
    """Whoever is in a rule set that lacks a row which denies gets nothing through, before any
    address is moved to the class that the row is about."""
    new = set(rule_sets) - outcome.shut
    if not new:
        return
    outcome.shut |= new
    endpoints = tables["endpoints"]
    rows = {addr: (row, shut_in(row, new)) for addr, row in endpoints.items()}
    endpoints.update({addr: after for addr, (before, after) in rows.items() if after != before})


def opened(row: records.Endpoint) -> records.Endpoint:
    """Without what `_shut` does."""
    mask = ~int(records.IsolationFlag.SHUT)
    return replace(
        row,
        egress=replace(row.egress, levels=row.egress.levels & mask),
        ingress=replace(row.ingress, levels=row.ingress.levels & mask),
    )


def shut_in(row: records.Endpoint, rule_sets: Collection[int]) -> records.Endpoint:
    def one(isolation: records.Isolation) -> records.Isolation:
        if isolation.rule_set not in rule_sets:
            return isolation
        return replace(isolation, levels=isolation.levels | records.IsolationFlag.SHUT)

    return replace(row, egress=one(row.egress), ingress=one(row.ingress))


def _squeeze(table: AnyTable, rows: Mapping[Hashable, Any]) -> set[Hashable]:
    """Write what still fits. Returns the keys that do not."""
    present = {key: row for key, row in rows.items() if table.get(key) is not None}
    if present:
        try:
            table.update(present)
        except TableFull:
            present = _one_by_one(table, present)
    absent = [key for key in rows if key not in present]
    chunk = len(absent)
    done = 0
    while chunk and done < len(absent):
        some = absent[done : done + chunk]
        try:
            table.update({key: rows[key] for key in some})
            done += len(some)
        except TableFull:
            chunk //= 2
    return set(absent[done:])


def _one_by_one(table: AnyTable, rows: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    done = {}
    for key, row in rows.items():
        try:
            table.update({key: row})
        except TableFull:
            # An old value may say more than the new one: no row is the safe answer.
            table.delete([key])
        else:
            done[key] = row
    return done


def _withhold_wider(table: AnyTable, left: set[Hashable]) -> set[Hashable]:
    """A prefix that is missing would get the class of a wider one, which may be in an ipBlock
    that excepts it: take the wider ones away too. Their addresses are then of no ipBlock."""
    lengths = {key.bits for key, _ in table.items()}
    wider: set[Hashable] = set()
    for key in left:
        if isinstance(key, records.PrefixKey):
            wider |= {
                records.PrefixKey(bits, cidr(key.address, bits).address)
                for bits in lengths
                if bits < key.bits
            }
    gone = {key for key in wider if table.get(key) is not None}
    table.delete(gone)
    return gone


def _shortened(services: Mapping[Hashable, Any], outcome: Outcome) -> Mapping[Hashable, Any]:
    """Services whose slots did not all fit get those before the first missing one. Those, and
    whose table did not fit, choose at random."""
    first: dict[int, int] = {}
    for key in outcome.rejected.get("backends", ()):
        if isinstance(key, records.BackendKey):
            first[key.service] = min(key.slot, first.get(key.service, key.slot))
    without = {
        key.service
        for key in outcome.rejected.get("maglev", ())
        if isinstance(key, records.MaglevKey)
    }
    if not first and not without:
        return services
    short = dict(services)
    for key, row in services.items():
        count = min(row.count, first.get(row.id, row.count))
        flags = row.flags
        if count != row.count or row.id in without:
            flags &= ~records.ServiceFlag.MAGLEV
        if (count, flags) != (row.count, row.flags):
            outcome.rejected.setdefault("services", set()).add(key)
            short[key] = replace(row, count=count, flags=int(flags))
    return short


def compare(table: AnyTable, desired: Mapping[Any, Any]) -> dict[Any, Any]:
    """Keys at which the kernel differs, with what it holds there (None: nothing).

    Memory holds the differences and the keys, not the table. What is missing is in the order of the
    desired rows: of a service whose slots do not all fit, the first ones do.
    """
    missing = dict.fromkeys(desired)
    differing: dict[Any, Any] = {}
    for key, row in table.items():
        if key in missing:
            del missing[key]
            if desired.get(key) != row:
                differing[key] = row
        else:
            differing[key] = row
    differing.update(missing)
    return differing
