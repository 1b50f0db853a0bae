# SPDX-License-Identifier: Apache-2.0
"""Logging of the agent's commands."""

from __future__ import annotations

import logging

CHATTY = ("aiohttp", "asyncio", "grpc")


def set_up(level: int) -> None:
    """Libraries stay at warning: at debug, grpc alone says several lines a message."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
