# SPDX-License-Identifier: Apache-2.0
"""The agent's numbers as the state file keeps them, so that a restart moves nothing."""

from __future__ import annotations

import logging

import msgspec

from weir.agent.classes import ClassContent
from weir.agent.rule_sets import RuleName, RuleSetKey
from weir.agent.tables import Projection
from weir.datapath.datapath import Tables

logger = logging.getLogger(__name__)


class Numbered(msgspec.Struct, frozen=True):
    classes: list[tuple[int, ClassContent]]
    rule_sets: list[tuple[int, RuleSetKey]]
    rules: list[tuple[int, RuleName]]
    following: tuple[int, int, int]


def versions(projection: Projection) -> tuple[int, ...]:
    """Changes whenever `dump` would."""
    return tuple(numbers.version for numbers in projection.number_spaces().values())


def dump(projection: Projection) -> bytes:
    return msgspec.json.encode(
        Numbered(
            projection.class_numbers.items(),
            projection.rule_set_numbers.items(),
            projection.rule_numbers.items(),
            (
                projection.class_numbers.next,
                projection.rule_set_numbers.next,
                projection.rule_numbers.next,
            ),
        )
    )


def restore(projection: Projection, dumped: bytes) -> None:
    """Numbers that cannot be read are given anew; the kernel's rows then move once."""
    if not dumped:
        return
    try:
        known = msgspec.json.decode(dumped, type=Numbered)
    except msgspec.MsgspecError as error:
        logger.warning("remembered numbers: %s: numbering anew", error)
        return
    projection.class_numbers.restore(known.classes, known.following[0])
    projection.rule_set_numbers.restore(known.rule_sets, known.following[1])
    projection.rule_numbers.restore(known.rules, known.following[2])


def reserve(projection: Projection, tables: Tables) -> None:
    """New numbers come after those that the kernel's rows mention. Blocks."""
    classes = {row.class_ for _, row in tables.addresses.items()}
    classes |= {row.class_ for _, row in tables.prefixes.items()}
    wired = [row for _, row in tables.endpoints.items()]
    classes |= {row.class_ for row in wired}
    rule_sets: set[int] = set()
    rules: set[int] = set()
    for key, verdict in tables.policy.items():
        classes.add(key.peer)
        rule_sets.add(key.rule_set)
        rules.add(verdict.rule)
    for row in wired:
        rule_sets |= {row.egress.rule_set, row.ingress.rule_set}
    projection.class_numbers.reserve(classes)
    projection.rule_set_numbers.reserve(rule_sets)
    projection.rule_numbers.reserve(rules)
