# SPDX-License-Identifier: Apache-2.0
"""Keeps the process small: the agent is on every node.

Snapshots and first reconciles make many short-lived objects in several threads. glibc would keep
the freed memory, in an arena for each thread; both calls are its own and do nothing elsewhere.
"""

from __future__ import annotations

import ctypes
import gc

M_ARENA_MAX = -8

_libc = ctypes.CDLL(None)


def prepare() -> None:
    """One arena; and full collections seldom, as they walk the whole desired state."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_ARENA_MAX, 1)
    gc.set_threshold(10_000, 50, 100)


def give_back() -> None:
    """After bulk work: freed memory goes back to the system. Takes milliseconds."""
    gc.collect()
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
