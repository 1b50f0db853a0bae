# SPDX-License-Identifier: Apache-2.0
"""Policy rows: policies joined with the classes of their peers, for local subjects only.

A **rule set** is one direction's rules of the policies that isolate a subject, shared by all
local classes that the same policies isolate (and whose named ports agree where rules use
them). Its rows are a union over (rule, peer class): rows for one (rule set, class) depend on
nothing else, so a class that comes or goes touches its own rows only.

Classes arrive and leave by number (weir.agent.classes); a number's content never changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from weir.agent.classes import ClassContent, Numbers
from weir.agent.ports import EVERYTHING, PortPrefix, prefixes
from weir.agent.resources import NamedPort
from weir.agent.rows import Rows
from weir.datapath import records

CLASS_ANY = 0
VERDICT_ALLOW = 1
# Rule set 1 has no rows and no levels: whoever is in it gets nothing through.
DENY_ALL = 1
FIRST_RULE_SET = 2

PolicyName = tuple[str, str]


@dataclass(frozen=True, slots=True)
class PortSpec:
    """Port prefixes, or the name of a port that the destination's class resolves."""

    prefixes: tuple[PortPrefix, ...] = ()
    name: str = ""
    protocol: int = 0


@dataclass(frozen=True, slots=True)
class PolicyRule:
    number: int
    index: int
    peers: frozenset[str] | None  # selector keys; None: every peer
    ports: tuple[PortSpec, ...]  # empty: everything


@dataclass(frozen=True, slots=True)
class PolicyContent:
    """A policy with selectors by key; None: does not isolate in that direction."""

    subject: str
    ingress: tuple[PolicyRule, ...] | None
    egress: tuple[PolicyRule, ...] | None

    def rules(self, egress: bool) -> tuple[PolicyRule, ...] | None:
        return self.egress if egress else self.ingress


@dataclass(frozen=True, slots=True)
class RuleName:
    """What a rule number in an event stands for."""

    namespace: str
    policy: str
    egress: bool
    index: int


@dataclass(frozen=True, slots=True)
class RuleSetKey:
    """A policy that gets other subjects counts as another one: when its rules change with them,
    no subject may be in a rule set that has old and new ones."""

    egress: bool
    policies: tuple[PolicyName, ...]
    ports: frozenset[NamedPort]  # the subject's, where an ingress rule names a port
    subjects: tuple[str, ...] = ()  # of the policies, in their order


@dataclass(slots=True)
class RuleSet:
    number: int
    key: RuleSetKey
    subjects: set[int] = field(default_factory=set)
    rules: list[PolicyRule] = field(default_factory=list)
    levels: int = 0
    selectors: set[str] = field(default_factory=set)
    keys: dict[int, tuple[records.PolicyKey, ...]] = field(default_factory=dict)


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
        return SubjectPolicy(_isolation(egress), _isolation(ingress))

    def rows_of_peer(self, peer: int) -> Iterator[tuple[records.PolicyKey, records.PolicyVerdict]]:
        """Desired rows for one peer class, of all rule sets."""
        for rule_set in self._rule_sets.values():
            for key in rule_set.keys.get(peer, ()):
                yield key, self.rows.rows[key]

    def policies_of(self, rule_set: int) -> tuple[PolicyName, ...]:
        known = self._by_number.get(rule_set)
        return known.key.policies if known is not None else ()

    def rules_of(self, rule_set: int) -> list[PolicyRule]:
        known = self._by_number.get(rule_set)
        return known.rules if known is not None else []

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
        names: list[PolicyName] = []
        uses_port_names = False
        for selector in content.selectors:
            for name in self._by_subject.get(selector, ()):
                rules = self._policies[name].rules(egress)
                if rules is not None:
                    names.append(name)
                    uses_port_names |= any(spec.name for rule in rules for spec in rule.ports)
        if not names:
            return None
        ports = content.ports if uses_port_names and not egress else frozenset()
        names.sort()
        subjects = tuple(self._policies[name].subject for name in names)
        key = RuleSetKey(egress, tuple(names), ports, subjects)
        rule_set = self._rule_sets.get(key)
        if rule_set is None:
            rule_set = RuleSet(self._numbers.acquire(key), key)
            self._rule_sets[key] = rule_set
            self._by_number[rule_set.number] = rule_set
            self._rebuild(rule_set)
        rule_set.subjects.add(subject)
        return rule_set

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
        rule_set.rules = [
            rule
            for name in rule_set.key.policies
            if name in self._policies
            for rule in self._policies[name].rules(rule_set.key.egress) or ()
        ]
        rule_set.levels = _levels(rule_set.rules)
        self._index(rule_set, {key for rule in rule_set.rules for key in rule.peers or ()})
        peers = set(rule_set.keys)
        for selector in rule_set.selectors:
            peers |= self._members.get(selector, set())
        if _names_every_peers_port(rule_set):
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
                if rule_set.number not in numbers and _names_every_peers_port(rule_set):
                    yield rule_set

    def _refresh(self, rule_set: RuleSet, peer: int, content: ClassContent | None) -> None:
        rows = dict(_rows(rule_set, peer, content))
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


def _rows(
    rule_set: RuleSet, peer: int, content: ClassContent | None
) -> Iterator[tuple[records.PolicyKey, records.PolicyVerdict]]:
    """Rows of one rule set for one peer class. On a tie the first rule is named."""
    egress = rule_set.key.egress
    seen: set[PortPrefix] = set()
    for rule in rule_set.rules:
        if rule.peers is None:
            if content is not None and not (egress and any(spec.name for spec in rule.ports)):
                continue
        elif content is None or rule.peers.isdisjoint(content.selectors):
            continue
        named = rule_set.key.ports if not egress else content.ports if content else frozenset()
        only_named = rule.peers is None and content is not None
        for match in _matches(rule, named, only_named):
            if match not in seen:
                seen.add(match)
                key = records.PolicyKey(
                    rule_set.number, peer, match.port, match.protocol, match.bits
                )
                yield key, records.PolicyVerdict(rule.number, VERDICT_ALLOW)


def _matches(
    rule: PolicyRule, named: frozenset[NamedPort], only_named: bool
) -> Iterator[PortPrefix]:
    if not rule.ports:
        yield EVERYTHING
    for spec in rule.ports:
        if spec.name:
            for port in named:
                if port.name == spec.name and port.protocol == spec.protocol:
                    yield PortPrefix(port.protocol, port.port, 16)
        elif not only_named:
            yield from spec.prefixes


def _names_every_peers_port(rule_set: RuleSet) -> bool:
    """An egress rule for every peer that names a port: each class resolves it itself."""
    return rule_set.key.egress and any(
        rule.peers is None and any(spec.name for spec in rule.ports) for rule in rule_set.rules
    )


def _levels(rules: Iterable[PolicyRule]) -> int:
    levels = 0
    for rule in rules:
        if not rule.ports:
            levels |= 1 << EVERYTHING.bits
        for spec in rule.ports:
            if spec.name:
                levels |= 1 << 16
            for prefix in spec.prefixes:
                levels |= 1 << prefix.bits
    return levels


def _isolation(rule_set: RuleSet | None) -> records.Isolation:
    if rule_set is None:
        return records.Isolation(0, 0)
    return records.Isolation(rule_set.number, rule_set.levels)


def port_spec(protocol: int, first: int, last: int, name: str) -> PortSpec:
    if name:
        return PortSpec((), name, protocol)
    return PortSpec(tuple(prefixes(protocol, first, last)))
