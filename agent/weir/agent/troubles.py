# SPDX-License-Identifier: Apache-2.0
"""Policies that this node enforces with less than they allow, told to the operator.

A full map leaves out rows; whose they are, the agent knows, and the operator can say it on the
policy. Level-triggered like all the rest: after each round, what is wrong now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from weir.agent.reconciler import Reconciler
from weir.agent.rule_sets import PolicyName
from weir.datapath import records
from weir.datapath.records import Verdict

NO_ROOM = "the policy map has no room for {} of its rows: {}; raise maps.policy"
MISSING = "the map of {0} has no room for all {1}: {2}; raise maps.{0}"
OF = {"prefixes": "networks", "addresses": "nodes"}
NOTHING_PASSES = "pods that it selects get nothing through"


class Listener(Protocol):
    def tell_troubles(self, troubles: Mapping[PolicyName, str]) -> None: ...


def troubles(reconciler: Reconciler) -> dict[PolicyName, str]:
    """What to say of each policy that did not fit."""
    rejected = reconciler.health["policy"].rejected
    projection = reconciler.projection
    rows: Counter[PolicyName] = Counter()
    shut: set[PolicyName] = set()
    for key in rejected.get("policy", ()):
        row = projection.policy.rows.get(key) if isinstance(key, records.PolicyKey) else None
        rule = projection.rule_numbers.key(row.rule) if row is not None else None
        if row is None or rule is None:
            continue
        name = (rule.namespace, rule.policy)
        rows[name] += 1
        if row.verdict != Verdict.ALLOW:
            shut.add(name)
    found = {
        name: NO_ROOM.format(
            count, NOTHING_PASSES if name in shut else "what those allow is denied"
        )
        for name, count in sorted(rows.items())
    }
    for table in reconciler.missed(rejected):
        for number in projection.policy.relying_on(table):
            for name in projection.policy.policies_of(number):
                if not name[0]:
                    found.setdefault(name, MISSING.format(table, OF[table], NOTHING_PASSES))
    return found


async def keep_telling(reconciler: Reconciler, listener: Listener) -> None:
    """Never ends."""
    while True:
        await reconciler.next_round()
        listener.tell_troubles(troubles(reconciler))
