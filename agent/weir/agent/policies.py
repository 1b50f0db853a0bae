# SPDX-License-Identifier: Apache-2.0
"""All policies as the operator sends them; rules of those that select pods of this node.

A node has some dozens of pods, and policies for these alone. All others are kept as they came, by
their subject, and cost no more than that: no rules, and no rule numbers, which the state file would
have to keep. Which ones count follows from the subjects of `policy`, so those come first.
"""

from __future__ import annotations

from collections.abc import Mapping

from weir.agent import resources
from weir.agent.classes import Numbers
from weir.agent.identity import Identity
from weir.agent.policy import PolicyTables
from weir.agent.resources import Action, WireSelector
from weir.agent.rule_sets import (
    STAGES,
    PolicyContent,
    PolicyName,
    PolicyRule,
    RuleName,
    port_spec,
)
from weir.datapath import records

VERDICTS = {
    Action.ACCEPT: records.Verdict.ALLOW,
    Action.DENY: records.Verdict.DENY,
    Action.PASS: records.Verdict.PASS,
}


class Policies:
    def __init__(
        self, identity: Identity, tables: PolicyTables, numbers: Numbers[RuleName]
    ) -> None:
        self._identity = identity
        self._tables = tables
        self._numbers = numbers
        self._items: dict[PolicyName, resources.Policy] = {}
        self._of_subject: dict[WireSelector, set[PolicyName]] = {}
        self._rules: dict[PolicyName, list[int]] = {}  # of those that are in the tables
        self._changed: set[PolicyName] = set()

    @property
    def items(self) -> Mapping[PolicyName, resources.Policy]:
        return self._items

    def set(self, name: PolicyName, item: resources.Policy | None) -> None:
        old = self._items.pop(name, None)
        if old is not None:
            self._of_subject[old.subject].discard(name)
            if not self._of_subject[old.subject]:
                del self._of_subject[old.subject]
        if item is not None:
            self._items[name] = item
            self._of_subject.setdefault(item.subject, set()).add(name)
        self._changed.add(name)

    def project(self, *, anew: bool) -> None:
        """Bring the tables up to date. `anew`: selectors are others than they were."""
        wanted: set[PolicyName] = set()
        for key in self._tables.subject_selectors():
            for number in self._identity.selector_numbers(key):
                wanted |= self._of_subject.get(number, set())
        for name in self._rules.keys() - wanted:
            self._tables.remove_policy(name)
            self._release(self._rules.pop(name))
        for name in wanted if anew else wanted & self._changed | wanted - self._rules.keys():
            old = self._rules.pop(name, [])
            self._tables.set_policy(name, self._content(name, self._items[name]))
            self._release(old)
        self._changed.clear()

    def _release(self, numbers: list[int]) -> None:
        for number in numbers:
            self._numbers.release(number)

    def _content(self, name: PolicyName, item: resources.Policy) -> PolicyContent:
        numbers = self._rules.setdefault(name, [])

        def rules(egress: bool) -> tuple[PolicyRule, ...]:
            result = []
            for rule in item.rules:
                if rule.egress != egress:
                    continue
                label = RuleName(item.namespace, item.name, egress, rule.index)
                number = self._numbers.acquire(label)
                numbers.append(number)
                result.append(self._rule(number, rule))
            return tuple(result)

        return PolicyContent(
            subject=self._identity.selector_key(item.subject),
            ingress=rules(False) if item.ingress else None,
            egress=rules(True) if item.egress else None,
            stage=STAGES[item.tier],
            priority=item.priority,
        )

    def _rule(self, number: int, rule: resources.Rule) -> PolicyRule:
        """A peer that is not known is nobody. Where nobody would mean that more passes, the rule
        denies everything."""
        if rule.action != Action.ACCEPT and not self._identity.knows_selectors(rule.peers):
            return PolicyRule(number, rule.index, None, (), records.Verdict.DENY)
        peers = frozenset(self._identity.selector_key(peer) for peer in rule.peers)
        ports = tuple(port_spec(p.protocol, p.first, p.last, p.name) for p in rule.ports)
        verdict = VERDICTS[rule.action]
        return PolicyRule(number, rule.index, None if rule.any_peer else peers, ports, verdict)
