# SPDX-License-Identifier: Apache-2.0
"""Which health checks the agent listens for."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import pytest

from weir.agent import health_checks
from weir.agent.frontends import NodePortRule
from weir.agent.health_checks import HealthChecks, Place
from weir.agent.services import ServiceTables
from weir.api.address import parse, parse_cidr


def free_ports(count: int) -> list[int]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in taken]
    finally:
        for each in taken:
            each.close()


async def test_a_change_while_another_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for changes while a port is being opened: they are looked for after it."""
    first, second = free_ports(2)
    tables = ServiceTables()
    tables.facts = replace(tables.facts, node_ports_at=(parse("127.0.0.1"),))
    tables.health_checks["ns", "a"] = first
    rule = NodePortRule(cidrs=(parse_cidr("127.0.0.0/8"),))
    checks = HealthChecks(tables, rule, 0, healthy=lambda: True, eligible=lambda: True)
    bind = health_checks._bind

    def bind_and_change(place: Place) -> socket.socket:
        tables.health_checks["ns", "b"] = second
        return bind(place)

    monkeypatch.setattr(health_checks, "_bind", bind_and_change)

    async def never() -> None:
        await asyncio.Event().wait()

    running = asyncio.create_task(checks.run(never))
    try:
        async with asyncio.timeout(10):
            for port in (first, second):
                while True:
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                    except ConnectionRefusedError:
                        await asyncio.sleep(0.01)
                        continue
                    writer.close()
                    await writer.wait_closed()
                    break
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
