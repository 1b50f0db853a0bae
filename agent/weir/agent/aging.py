# SPDX-License-Identifier: Apache-2.0
"""Deletes what has expired from the programs' own tables, and tells how full they are.

The tables are LRU: a full one evicts the least recently used entry, which is why what has expired
should not be there, and why a table full of live entries must be noticed. Counting is part of the
walk, never a walk of its own.

Never a live entry: a packet may use or renew an entry at any moment, also between our look and our
deletion. (1) Programs treat an expired entry as absent, but may renew it: the pod's next packet
does so to a masqueraded flow. So it must have expired for GRACE_SECONDS, by which its flow has been
silent for minutes. (2) Right before the deletion the kernel is asked again, and only an entry whose
expiry is still the same goes. (3) Should it be renewed within that microsecond, the deletion
returns the renewed entry, and it is put back (`weir_map_delete_unchanged`). Before Linux 5.14 (3)
is missing: then one flow may be judged anew, or one idle masqueraded connection lose its port, if
it wakes up in that very microsecond.

`fragments` tells no time and is 0.9 MB that LRU uses over and over: there is nothing to gain.
`sock_nat` has no expiry, and unconnected sockets leave their rows behind: it is counted, but to be
full of them is no reason to warn.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from weir.agent import sweep
from weir.agent.sweep import Watch
from weir.agent.walks import AnyBatch, Exchanged, Walks
from weir.datapath.datapath import Tables
from weir.datapath.errors import DatapathError
from weir.datapath.view import Row, View

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 30.0
PAUSE_SECONDS = 0.02
GRACE_SECONDS = 10
WARN_AT = 0.9
NEVER_PRESSED = frozenset({"sock_nat"})
# The value of the chart that sizes a table.
SETTINGS: Mapping[str, str] = {
    "ct": "maps.conntrack",
    "snat": "maps.snat",
    "sock_nat": "maps.sockNat",
    "affinity": "maps.affinity",
}


@dataclass(slots=True)
class Fill:
    """Of one table. entries: live ones at the last walk; expired: all that were deleted."""

    max_entries: int = 0
    entries: int = 0
    expired: int = 0
    warns: bool = True

    @property
    def ratio(self) -> float:
        return self.entries / self.max_entries if self.max_entries else 0.0

    @property
    def pressed(self) -> bool:
        return self.warns and self.ratio >= WARN_AT


def warning(name: str, fill: Fill) -> str:
    """For the log and for `weir status`."""
    return (
        f"map {name} has {fill.entries} of {fill.max_entries} entries, all in use: "
        f"the least recently used go when it is full; raise {SETTINGS[name]}"
    )


class Aging:
    def __init__(
        self, watch: Watch, walks: Walks, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._watch = watch
        self._walks = walks
        self._clock = clock
        self.fills = {name: Fill(warns=name not in NEVER_PRESSED) for name in SETTINGS}
        self.last_seconds = 0.0

    async def run(self) -> None:
        while True:
            try:
                await self.round()
            except (DatapathError, Exchanged) as error:
                logger.warning("aging: %s", error or "begun again")
            await asyncio.sleep(PERIOD_SECONDS)

    async def round(self) -> None:
        began = self._clock()
        for name in SETTINGS:
            if name != "affinity" or self._watch.begun:
                await self._age(name)
        self.last_seconds = self._clock() - began

    def warnings(self) -> list[str]:
        return [warning(name, fill) for name, fill in self.fills.items() if fill.pressed]

    async def _age(self, name: str) -> None:
        tables = self._walks.tables
        limit = int(self._clock()) - GRACE_SECONDS
        seen = deleted = 0
        walk = self._walks.each(_VIEWS[name], _LOOKS[name](limit), PAUSE_SECONDS)
        async for batch, found in walk:
            picked = self._lapsed(found, limit) if name == "affinity" else found
            seen += len(batch)
            deleted += await self._walks.delete(tables, batch, picked)
        self._account(name, getattr(tables, name).max_entries, seen - deleted, deleted)

    def _lapsed(self, rows: list[Row], limit: int) -> list[int]:
        """How long a row of affinity lasts is said by the Service's row."""
        return sweep.lapsed_affinity(rows, limit, self._watch.sticking)

    def _account(self, name: str, max_entries: int, entries: int, deleted: int) -> None:
        fill = self.fills[name]
        was_pressed = fill.pressed
        fill.max_entries, fill.entries = max_entries, entries
        fill.expired += deleted
        if fill.pressed and not was_pressed:
            logger.warning("%s", warning(name, fill))


def expired(rows: Iterable[Row], limit: int) -> list[int]:
    """Of rows that are (expires,): those before `limit`."""
    return [at for at, (expires,) in enumerate(rows) if expires < limit]


_VIEWS: Mapping[str, Callable[[Tables], View[Any, Any]]] = {
    "ct": lambda tables: tables.ct.view((), ("expires",), ("expires",)),
    "snat": lambda tables: tables.snat.view((), ("expires",), ("expires",)),
    "sock_nat": lambda tables: tables.sock_nat.view(),
    "affinity": lambda tables: tables.affinity.view(
        sweep.AFFINITY_OF_KEY, sweep.AFFINITY_OF_VALUE, ("last_used",)
    ),
}
# What a thread makes of a batch: the entries to delete, or the rows to decide by.
_LOOKS: Mapping[str, Callable[[int], Callable[[AnyBatch], list[Any]]]] = {
    "ct": lambda limit: lambda batch: expired(batch.rows(), limit),
    "snat": lambda limit: lambda batch: expired(batch.rows(), limit),
    "sock_nat": lambda _: lambda _: [],
    "affinity": lambda _: lambda batch: list(batch.rows()),
}
