# SPDX-License-Identifier: Apache-2.0
"""The agent's numbers as the state file keeps them, so that a restart moves nothing."""

from __future__ import annotations

import logging

import msgspec

from weir.agent.classes import ClassContent
from weir.agent.rule_sets import RuleName, RuleSetKey
from weir.agent.tables import Projection

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
