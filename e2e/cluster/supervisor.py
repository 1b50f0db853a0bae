# SPDX-License-Identifier: Apache-2.0
"""PID 1 of the control plane and of each node: starts the components, restarts them, reaps.

A component that exits is started again after a second, as a static pod or a systemd unit would
be; while its `.hold` file is there it stays down. Killing PID 1 ends everything in its PID
namespace, and with that its mounts and links: there is nothing to clean up in an orderly way.
"""

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

logger = logging.getLogger(__name__)

RESTART_DELAY_S = 1.0
_TICK_S = 0.1
INHERITED_FD = 3


def _always() -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Component:
    """A process that is to run always, once `ready_to_start` says yes."""

    name: str
    command: tuple[str, ...]  # the program by its absolute path
    environment: Mapping[str, str]
    ready_to_start: Callable[[], bool] = _always
    inherit: int | None = None  # a file descriptor that it gets as number 3


def supervise(components: list[Component], log_folder: Path, run_folder: Path) -> NoReturn:
    """Run the components for ever. To be called by PID 1 of a PID namespace."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    running: dict[int, Component] = {}
    not_before = {component.name: 0.0 for component in components}
    while True:
        for component in _reap(running):
            not_before[component.name] = time.monotonic() + RESTART_DELAY_S
        started = {component.name for component in running.values()}
        for component in components:
            if component.name in started or time.monotonic() < not_before[component.name]:
                continue
            if (run_folder / f"{component.name}.hold").exists() or not component.ready_to_start():
                continue
            pid = _start(component, log_folder / f"{component.name}.log")
            (run_folder / f"{component.name}.pid").write_text(f"{pid}\n")
            running[pid] = component
        signal.sigtimedwait({signal.SIGCHLD}, _TICK_S)


def _start(component: Component, log: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    actions: list[tuple[int, int, int] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), flags, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    if component.inherit is not None:
        actions.append((os.POSIX_SPAWN_DUP2, component.inherit, INHERITED_FD))
    pid = os.posix_spawn(
        component.command[0],
        component.command,
        component.environment,
        file_actions=actions,
        setsid=True,
        setsigmask=[],
    )
    logger.info("%s started with PID %d", component.name, pid)
    return pid


def _reap(running: dict[int, Component]) -> list[Component]:
    """Collect all dead children, orphans of others included; the components among them."""
    ended: list[Component] = []
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if pid == 0:
            return ended
        if component := running.pop(pid, None):
            code = os.waitstatus_to_exitcode(status)
            logger.warning("%s ended with code %d", component.name, code)
            ended.append(component)
