# SPDX-License-Identifier: Apache-2.0
"""Guards a thing that many use side by side and that is exchanged now and then.

Who exchanges it waits for the uses under way, and new uses wait for the exchange: a descriptor
that is closed while a thread works with it may be somebody else's by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Gate:
    def __init__(self) -> None:
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def use(self) -> AsyncIterator[None]:
        async with self._lock:
            self._users += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle.set()

    @asynccontextmanager
    async def exchange(self) -> AsyncIterator[None]:
        async with self._lock:
            await self._idle.wait()
            yield
