# SPDX-License-Identifier: Apache-2.0
"""How much work a job is, in function calls: the same on a busy machine as on an idle one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def effort(job: Callable[[], T]) -> tuple[int, T]:
    """Calls of functions, Python's and C's, and what the job returned."""
    count = 0

    def hook(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        outcome = job()
    finally:
        sys.setprofile(before)
    return count, outcome
