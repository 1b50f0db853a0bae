# SPDX-License-Identifier: Apache-2.0
"""Takes Weir off a node: CNI files, programs, maps, device, routes, state.

`python -m weir.agent.uninstall` is what the chart runs with `uninstall=true`: it cleans, says so
in a file (its readiness) and waits to be deleted. `python -m weir.agent cleanup` does the same by
hand, once. Running pods keep their interfaces and routes, so they reach their node and what it
reaches; policy, Services and other nodes' pods are gone. Forwarding stays enabled.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from weir.agent import node, start
from weir.agent.config import Config
from weir.cni import install
from weir.cni.errors import CniError
from weir.datapath.datapath import Datapath
from weir.datapath.errors import DatapathError

logger = logging.getLogger(__name__)

DONE = Path("/tmp/uninstalled")  # noqa: S108  the container's own, where the chart looks


def clean(config: Config) -> int:
    """Every step is tried, whatever the others say; 1 if one failed."""
    paths = config.paths
    failed = False

    def step(name: str, work: Callable[[], object]) -> None:
        nonlocal failed
        try:
            work()
            logger.info("removed: %s", name)
        except (OSError, CniError, DatapathError, install.InstallError) as error:
            failed = True
            logger.warning("%s: %s", name, error)

    step("CNI configuration and shim", lambda: install.remove(paths.cni_bin, paths.cni_conf))
    step("programs and maps", lambda: Datapath.remove(paths.pins))
    step("overlay device and routes", node.remove_all)
    for folder in (paths.run, paths.state):
        step(str(folder), partial(_empty, folder))
    return int(failed)


def _empty(folder: Path) -> None:
    """What is in it: the folder itself may be a mount."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m weir.agent.uninstall", description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--done", type=Path, default=DONE, help="the file that says it is done")
    arguments = parser.parse_args()
    config = start.configured(arguments.config)
    if config is None:
        return start.BAD_CONFIG
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    if clean(config):
        return 1
    arguments.done.touch()
    signal.sigwait(signals)
    return 0


if __name__ == "__main__":
    sys.exit(main())
