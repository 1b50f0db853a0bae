# SPDX-License-Identifier: Apache-2.0
"""`weir policy denials`: what policies denied lately, or would have without audit mode.

The programs remember it (`denials`), so it is there also when nobody listened. Rules and rule sets
are named as they are now: of policies that are gone nothing is known but the packets.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from weir.agent.explain import Explainer, Party, reason_text
from weir.agent.verdict import PROTOCOLS
from weir.agent.walks import Walks
from weir.datapath.records import DenialFlag, Direction


class DenialView(msgspec.Struct, frozen=True):
    """A flow as it was opened, by the end that denied it; ports of ICMP are 0, and so are sources'.
    last_seen: seconds of the epoch. rule: that denies it, "" if it is denied as none allows it."""

    source: Party
    destination: Party
    protocol: str
    direction: str
    last_seen: float
    packets: int
    reason: str
    audited: bool
    policies: tuple[str, ...]
    rule: str


class Denials:
    def __init__(
        self, explainer: Explainer, walks: Walks, clock: Callable[[], float] = time.time
    ) -> None:
        self._explainer = explainer
        self._walks = walks
        self._clock = clock

    async def listed(self) -> list[DenialView]:
        """Newest first. Raises DatapathError or Exchanged."""
        rows = await self._walks.read(lambda tables: list(tables.denials.items()))
        rows.sort(key=lambda row: -row[1].last_seen)
        started = self._clock() - time.monotonic()
        party = self._explainer.party
        views = []
        for key, denial in rows:
            policies, rule = self._explainer.deciders(denial.rule, denial.rule_set, denial.reason)
            views.append(
                DenialView(
                    source=party(key.source, 0),
                    destination=party(key.destination, key.destination_port),
                    protocol=PROTOCOLS.get(key.protocol, str(key.protocol)),
                    direction=Direction(key.direction).name.lower(),
                    last_seen=started + denial.last_seen,
                    packets=denial.packets,
                    reason=reason_text(denial.reason),
                    audited=bool(denial.flags & DenialFlag.AUDITED),
                    policies=policies,
                    rule=rule,
                )
            )
        return views
