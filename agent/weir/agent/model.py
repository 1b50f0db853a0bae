# SPDX-License-Identifier: Apache-2.0
"""The policies and addresses of a projection, as weir.agent.verdict asks for them.

Made for a question or a batch of them: policies are converted as they are asked for, once. What an
address is comes from the desired rows, by the programs' own order of lookups (`class_of`), and from
there on only the class's content counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from weir.agent import resources, verdict
from weir.agent.classes import NOTHING, ClassContent
from weir.agent.judge import CLASS_OF_OWN_NODE, class_of
from weir.agent.tables import Projection
from weir.agent.verdict import Decision, Party, Policy, Question, Standing
from weir.api.address import Addr
from weir.datapath import records
from weir.datapath.records import ClassNumber

ALL_BITS = 128
V = TypeVar("V")


class DesiredMaps:
    """Maps (weir.agent.judge) as they are to be."""

    def __init__(self, projection: Projection) -> None:
        self._placement = projection.placement
        self._routes = projection.routes.rows.rows
        self._policy = projection.policy.rows

    def endpoint(self, addr: Addr) -> records.Endpoint | None:
        return self._placement.endpoints.get(addr)

    def address(self, addr: Addr) -> records.Address | None:
        return self._placement.addresses.get(addr)

    def route(self, addr: Addr) -> records.Route | None:
        return longest(self._routes, addr)

    def prefix(self, addr: Addr) -> records.Prefix | None:
        return longest(self._placement.prefixes.rows, addr)

    def policy(self, key: records.PolicyKey) -> records.PolicyVerdict | None:
        return self._policy.get(key)


def longest(rows: Mapping[records.PrefixKey, V], addr: Addr) -> V | None:
    """What an LPM trie with these rows finds."""
    number = int.from_bytes(addr, "big")
    for bits in range(ALL_BITS, -1, -1):
        shift = ALL_BITS - bits
        masked = Addr((number >> shift << shift).to_bytes(16, "big"))
        found = rows.get(records.PrefixKey(bits, masked))
        if found is not None:
            return found
    return None


class Model:
    def __init__(self, projection: Projection) -> None:
        self._identity = projection.identity
        self._maps = DesiredMaps(projection)
        self._by_subject: dict[str, list[resources.Policy]] = {}
        for item in projection.policies().values():
            key = self._identity.selector_key(item.subject)
            self._by_subject.setdefault(key, []).append(item)
        self._converted: dict[str, list[Policy]] = {}
        self._parties: dict[tuple[Addr, str], Party] = {}

    def party(self, addr: Addr, name: str) -> Party:
        known = self._parties.get((addr, name))
        if known is None:
            known = self._parties[addr, name] = self._party(addr, name)
        return known

    def _party(self, addr: Addr, name: str) -> Party:
        number = class_of(self._maps, addr)
        own_node = bool(number & CLASS_OF_OWN_NODE)
        number &= ~CLASS_OF_OWN_NODE
        if number == ClassNumber.UNKNOWN:
            return Party(name, NOTHING, Standing.UNKNOWN, own_node)
        return Party(name, self._identity.content(number), own_node=own_node)

    def decide(self, question: Question) -> Decision:
        return verdict.decide(self._selecting(question.subject.content), question)

    def _selecting(self, subject: ClassContent) -> Iterator[Policy]:
        for selector in subject.selectors & self._by_subject.keys():
            if selector not in self._converted:
                self._converted[selector] = [
                    verdict.of_resource(item, self._identity) for item in self._by_subject[selector]
                ]
            yield from self._converted[selector]
