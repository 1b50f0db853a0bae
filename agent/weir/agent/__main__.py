# SPDX-License-Identifier: Apache-2.0
"""`python -m weir.agent --config FILE`, and `cleanup`, which takes Weir off the node."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path

from weir.agent import app, memory, start, uninstall
from weir.agent.config import Config
from weir.cni.errors import CniError
from weir.datapath.errors import DatapathError

logger = logging.getLogger("weir.agent")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weir.agent",
        description="The node agent of Weir: wires pods and keeps the datapath's maps.",
        epilog="NODE_NAME, POD_NAMESPACE and HOST_IP come from the environment.",
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="YAML file; charts/weir documents the keys"
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=["run", "cleanup"],
        default="run",
        help="cleanup removes every trace of Weir from the node",
    )
    arguments = parser.parse_args()
    config = start.configured(arguments.config)
    if config is None:
        return start.BAD_CONFIG
    if arguments.action == "cleanup":
        return uninstall.clean(config)
    memory.prepare()
    try:
        asyncio.run(_until_signal(config))
    except (DatapathError, CniError) as error:
        logger.critical("%s", error)
        return 1
    return 0


async def _until_signal(config: Config) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(app.start(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        logger.info("stopped; everything in the kernel stays in place")


if __name__ == "__main__":
    sys.exit(main())
