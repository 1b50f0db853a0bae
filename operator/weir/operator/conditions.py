# SPDX-License-Identifier: Apache-2.0
"""One condition in the status of each object of Weir's own kinds, written while leading.

Level-triggered: what is wanted is compared with what the object says, which comes back with the
watch. So nothing is written twice, and a new leader writes what the old one did not.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from dataclasses import dataclass, field

from weir.operator.api import Api, ApiError
from weir.operator.wire import Struct

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
RETRY_MOST_SECONDS = 30.0
MESSAGE_MOST = 1024


class Condition(Struct):
    """As in metav1.Condition. The time is that of the last change of `status`."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    observed_generation: int = 0
    last_transition_time: str = ""

    def says(self, other: Condition | None) -> bool:
        """Whether the other one is the same but for the time."""
        return other is not None and _content(self) == _content(other)


def _content(condition: Condition) -> tuple[str, str, str, str, int]:
    return (
        condition.type,
        condition.status,
        condition.reason,
        condition.message[:MESSAGE_MOST],
        condition.observed_generation,
    )


@dataclass(slots=True)
class Conditions:
    """By the path of the object's status. Runs until cancelled."""

    leading: asyncio.Event
    retry_seconds: float = RETRY_SECONDS
    _wanted: dict[str, tuple[Condition, Condition | None]] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def want(self, path: str, wanted: Condition, current: Condition | None) -> None:
        """`current` is what the object has; the latest call counts."""
        self._wanted.pop(path, None)
        if not wanted.says(current):
            self._wanted[path] = (wanted, current)
            self._news.set()

    def forget(self, path: str) -> None:
        self._wanted.pop(path, None)

    @property
    def waiting(self) -> int:
        return len(self._wanted)

    async def run(self, api: Api) -> None:
        delay = self.retry_seconds
        while True:
            await self._news.wait()
            await self.leading.wait()
            self._news.clear()
            failed = False
            for path in list(self._wanted):
                await self.leading.wait()  # it may be lost between two
                failed |= not await self._try(api, path)
            if failed:
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_MOST_SECONDS)
                self._news.set()
            else:
                delay = self.retry_seconds

    async def _try(self, api: Api, path: str) -> bool:
        """Whether that is done with."""
        entry = self._wanted.get(path)
        if entry is None:
            return True
        wanted, current = entry
        body = {"status": {"conditions": [condition_body(wanted, current)]}}
        try:
            await api.patch(path, body, "application/merge-patch+json")
        except ApiError as error:
            if not 400 <= error.status < 500 or error.status in (401, 409, 429):
                logger.info("to be tried again: %s", error)
                return False
            logger.warning("given up: %s", error)
        if self._wanted.get(path) is entry:
            del self._wanted[path]
        return True


def condition_body(wanted: Condition, current: Condition | None) -> dict[str, object]:
    """As the API takes it; the time of the last transition stays while the status does."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    same = current is not None and current.status == wanted.status
    body: dict[str, object] = {
        "type": wanted.type,
        "status": wanted.status,
        "reason": wanted.reason,
        "message": wanted.message[:MESSAGE_MOST],
        "lastTransitionTime": (current.last_transition_time if current and same else "") or now,
    }
    if wanted.observed_generation:
        body["observedGeneration"] = wanted.observed_generation
    return body
