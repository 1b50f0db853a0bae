# SPDX-License-Identifier: Apache-2.0
"""Progress on screen, and waiting with a deadline."""

import time
from collections.abc import Callable

from e2e.cluster.errors import ClusterError

_POLL_S = 0.2


class Progress:
    """Prints each step with the seconds since the start."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        print(f"{time.monotonic() - self._started:6.1f} s  {text}", flush=True)


def wait_for(what: str, done: Callable[[], bool], timeout_s: float, look_at: object) -> None:
    """Poll until `done`; an error that names what did not happen and where to look."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise ClusterError(f"not within {timeout_s:.0f} s: {what}", f"look at {look_at}")
        time.sleep(_POLL_S)
