# SPDX-License-Identifier: Apache-2.0
"""Policy rows: policies joined with the classes of their peers, for local subjects only.

A rule set (weir.agent.rule_sets) is shared by all local classes that the same policies select (and
whose named ports agree where rules use them). Its rows for one peer class depend on nothing else,
so a class that comes or goes touches its own rows only.

Classes arrive and leave by number (weir.agent.classes); a number's content never changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from weir.agent.classes import ClassContent, Numbers
from weir.agent.rows import Rows
from weir.agent.rule_sets import (
    CLASS_ANY,
    PolicyContent,
    PolicyName,
    RuleSet,
    RuleSetKey,
    Stage,
)
from weir.datapath import records
from weir.datapath.records import Verdict

IP_BLOCK = "ipblock "
"""How the keys of selectors begin that are ipBlocks."""
MISSED = {"prefixes": IP_BLOCK, "addresses": "nodes "}
"""Likewise, of selectors that miss what they select if its row in a map is missing. A pod whose
address is missing is known to be one."""


@dataclass(frozen=True, slots=True)
class SubjectPolicy:
    egress: records.Isolation
    ingress: records.Isolation


class PolicyTables:
    """Owns the rows of `policy`, the rule sets and which subject class has which."""

    def __init__(self, numbers: Numbers[RuleSetKey]) -> None:
        self.rows: Rows[records.PolicyKey, records.PolicyVerdict] = Rows("policy")
        self._numbers = numbers
        self._policies: dict[PolicyName, PolicyContent] = {}
        self._digests: dict[tuple[PolicyName, bool], str] = {}
        self._by_subject: dict[str, set[PolicyName]] = {}
        self._classes: dict[int, ClassContent] = {}
        self._members: dict[str, set[int]] = {}
        self._with_port: set[int] = set()
        self._subjects: dict[int, tuple[RuleSet | None, RuleSet | None]] = {}
        self._rule_sets: dict[RuleSetKey, RuleSet] = {}
        self._by_number: dict[int, RuleSet] = {}
        self._by_peer: dict[str, set[int]] = {}
        self._dirty_policies: set[PolicyName] = set()
        self._dirty_subjects: set[int] = set()

    # ---- inputs

    def set_policy(self, name: PolicyName, content: PolicyContent) -> None:
        old = self._policies.get(name)
        if old == content:
            return
        self.remove_policy(name)
        self._policies[name] = content
        self._by_subject.setdefault(content.subject, set()).add(name)
        self._touch(name, content.subject)

    def remove_policy(self, name: PolicyName) -> None:
        old = self._policies.pop(name, None)
        if old is None:
            return
        for egress in (True, False):
            self._digests.pop((name, egress), None)
        self._by_subject[old.subject].discard(name)
        if not self._by_subject[old.subject]:
            del self._by_subject[old.subject]
        self._touch(name, old.subject)

    def add_class(self, number: int, content: ClassContent) -> None:
        """A class that an address or prefix may have."""
        if number in self._classes:
            return
        self._classes[number] = content
        for selector in content.selectors:
            self._members.setdefault(selector, set()).add(number)
        if content.ports:
            self._with_port.add(number)
        for rule_set in self._mentioning(content):
            self._refresh(rule_set, number, content)

    def remove_class(self, number: int) -> None:
        content = self._classes.pop(number, None)
        if content is None:
            return
        for selector in content.selectors:
            self._members[selector].discard(number)
            if not self._members[selector]:
                del self._members[selector]
        self._with_port.discard(number)
        for rule_set in self._mentioning(content):
            self._clear(rule_set, number)

    def set_subjects(self, numbers: Iterable[int]) -> None:
        """The classes of this node's endpoints, all of them added before."""
        wanted = set(numbers)
        for number in self._subjects.keys() - wanted:
            for rule_set in self._subjects.pop(number):
                self._leave(rule_set, number)
            self._dirty_subjects.discard(number)
        for number in wanted - self._subjects.keys():
            self._subjects[number] = (None, None)
            self._dirty_subjects.add(number)

    def subject_selectors(self) -> set[str]:
        """Of all this node's endpoints."""
        return set().union(*(self._classes[number].selectors for number in self._subjects))

    # ---- projection

    def project(self) -> set[int]:
        """Bring rule sets and rows up to date. Returns subjects whose isolation changed."""
        moved: set[int] = set()
        dirty, self._dirty_subjects = self._dirty_subjects, set()
        abandoned: list[tuple[RuleSet | None, int]] = []
        for number in dirty:
            if number not in self._subjects:
                continue
            old = self._subjects[number]
            new = (self._join(number, egress=True), self._join(number, egress=False))
            self._subjects[number] = new
            if old[0] is not new[0] or old[1] is not new[1]:
                moved.add(number)
            for before, after in zip(old, new, strict=True):
                if before is not after:
                    abandoned.append((before, number))
        for rule_set, number in abandoned:
            self._leave(rule_set, number)
        policies, self._dirty_policies = self._dirty_policies, set()
        for rule_set in list(self._rule_sets.values()):
            if not policies.isdisjoint(rule_set.key.policies):
                levels = rule_set.levels
                self._rebuild(rule_set)
                if levels != rule_set.levels:
                    moved |= rule_set.subjects
        return moved

    def isolation(self, subject: int) -> SubjectPolicy:
        egress, ingress = self._subjects.get(subject, (None, None))
        return SubjectPolicy(
            egress.isolation if egress else records.Isolation(),
            ingress.isolation if ingress else records.Isolation(),
        )

    def rows_of_peer(self, peer: int) -> Iterator[tuple[records.PolicyKey, records.PolicyVerdict]]:
        """Desired rows for one peer class, of all rule sets."""
        for rule_set in self._rule_sets.values():
            for key in rule_set.keys.get(peer, ()):
                yield key, self.rows.rows[key]

    def policies_of(self, rule_set: int) -> tuple[PolicyName, ...]:
        known = self._by_number.get(rule_set)
        return known.key.policies if known is not None else ()

    def rule_set(self, number: int) -> RuleSet | None:
        return self._by_number.get(number)

    def relying_on(self, table: str) -> set[int]:
        """Rule sets in which a rule denies, or passes, what is told by rows of `prefixes`
        (networks) or `addresses` (nodes)."""
        return {
            rule_set.number
            for rule_set in self._rule_sets.values()
            if any(
                rule.verdict != Verdict.ALLOW
                and any(peer.startswith(MISSED[table]) for peer in rule.peers or ())
                for rule in (rule_set.rules if rule_set.key.ordered else ())
            )
        }

    def subjects(self) -> dict[int, tuple[tuple[PolicyName, ...], tuple[PolicyName, ...]]]:
        return {
            number: (
                egress.key.policies if egress else (),
                ingress.key.policies if ingress else (),
            )
            for number, (egress, ingress) in self._subjects.items()
        }

    # ---- the join

    def _touch(self, name: PolicyName, subject: str) -> None:
        self._dirty_policies.add(name)
        self._dirty_subjects |= self._members.get(subject, set()) & self._subjects.keys()

    def _join(self, subject: int, egress: bool) -> RuleSet | None:
        content = self._classes[subject]
        names = self._deciding(content, egress)
        if not names:
            return None
        uses_port_names = not egress and any(
            spec.name
            for name in names
            for rule in self._policies[name].rules(egress) or ()
            for spec in rule.ports
        )
        key = RuleSetKey(
            egress,
            tuple(names),
            content.ports if uses_port_names else frozenset(),
            tuple(self._policies[name].subject for name in names),
            self._digest(names, egress),
        )
        rule_set = self._rule_sets.get(key)
        if rule_set is None:
            rule_set = RuleSet(self._numbers.acquire(key), key)
            self._rule_sets[key] = rule_set
            self._by_number[rule_set.number] = rule_set
            self._rebuild(rule_set)
        rule_set.subjects.add(subject)
        return rule_set

    def _deciding(self, subject: ClassContent, egress: bool) -> list[PolicyName]:
        """Policies with a say about a subject, in order of their names."""
        return sorted(
            name
            for selector in subject.selectors
            for name in self._by_subject.get(selector, ())
            if self._policies[name].rules(egress) is not None
        )

    def _digest(self, names: list[PolicyName], egress: bool) -> str:
        """Of an ordered set's rules; of others none."""
        if all(self._policies[name].stage == Stage.NETWORK_POLICY for name in names):
            return ""
        whole = hashlib.blake2b(digest_size=12)
        for name in names:
            one = self._digests.get((name, egress))
            if one is None:
                one = self._digests[name, egress] = self._policies[name].digest(egress)
            whole.update(one.encode() + b"\0")
        return whole.hexdigest()

    def _leave(self, rule_set: RuleSet | None, subject: int) -> None:
        if rule_set is None:
            return
        rule_set.subjects.discard(subject)
        if rule_set.subjects or rule_set.number not in self._by_number:
            return
        for peer in list(rule_set.keys):
            self._clear(rule_set, peer)
        self._index(rule_set, set())
        del self._rule_sets[rule_set.key]
        del self._by_number[rule_set.number]
        self._numbers.release(rule_set.number)

    def _index(self, rule_set: RuleSet, selectors: set[str]) -> None:
        for selector in rule_set.selectors - selectors:
            self._by_peer[selector].discard(rule_set.number)
            if not self._by_peer[selector]:
                del self._by_peer[selector]
        for selector in selectors - rule_set.selectors:
            self._by_peer.setdefault(selector, set()).add(rule_set.number)
        rule_set.selectors = selectors

    def _rebuild(self, rule_set: RuleSet) -> None:
        policies = self._policies
        rule_set.set_rules((n, policies[n]) for n in rule_set.key.policies if n in policies)
        self._index(rule_set, {key for rule in rule_set.rules for key in rule.peers or ()})
        peers = set(rule_set.keys)
        for selector in rule_set.selectors:
            peers |= self._members.get(selector, set())
        if rule_set.names_every_peers_port:
            peers |= self._with_port
        for peer in peers - {CLASS_ANY}:
            self._refresh(rule_set, peer, self._classes.get(peer))
        self._refresh(rule_set, CLASS_ANY, None)

    def _mentioning(self, content: ClassContent) -> Iterator[RuleSet]:
        numbers: set[int] = set()
        for selector in content.selectors:
            numbers |= self._by_peer.get(selector, set())
        for number in numbers:
            yield self._by_number[number]
        if content.ports:
            for rule_set in self._rule_sets.values():
                if rule_set.number not in numbers and rule_set.names_every_peers_port:
                    yield rule_set

    def _refresh(self, rule_set: RuleSet, peer: int, content: ClassContent | None) -> None:
        rows = dict(rule_set.rows(peer, content))
        old = rule_set.keys.get(peer, ())
        for key in old:
            if key not in rows:
                self.rows.drop(key)
        for key, verdict in rows.items():
            self.rows.put(key, verdict)
        if rows:
            rule_set.keys[peer] = tuple(rows)
        else:
            rule_set.keys.pop(peer, None)

    def _clear(self, rule_set: RuleSet, peer: int) -> None:
        for key in rule_set.keys.pop(peer, ()):
            self.rows.drop(key)
