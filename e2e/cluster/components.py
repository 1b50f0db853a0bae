# SPDX-License-Identifier: Apache-2.0
"""Kill, stop and start single components of the cluster that is up, as tests of faults want it."""

import os
import signal
import time
from pathlib import Path

from e2e.cluster import host
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import Place

_GONE_S = 10.0


def pid(place: str, component: str) -> int:
    """The PID of a component as the machine numbers it."""
    file = Place(place).run / f"{component}.pid"
    if not file.exists():
        raise ClusterError(
            f"{place} has no component {component}", f"it has: {', '.join(names(place)) or 'none'}"
        )
    inside = int(file.read_text())
    for process in host.processes(host.cluster_cgroup() / place / "system"):
        if host.namespace_pids(process)[1:] == [inside]:
            return process
    raise ClusterError(f"{component} of {place} is not running right now")


def names(place: str) -> list[str]:
    """The components of the control plane or of a node."""
    return sorted(file.stem for file in Place(place).run.glob("*.pid"))


def kill(place: str, component: str) -> None:
    """kill -9; it is started again after a second."""
    process = pid(place, component)
    os.kill(process, signal.SIGKILL)
    deadline = time.monotonic() + _GONE_S
    while Path(f"/proc/{process}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def stop(place: str, component: str) -> None:
    """kill -9, and it stays down until `start`."""
    (Place(place).run / f"{component}.hold").touch()
    kill(place, component)


def start(place: str, component: str) -> None:
    """End what `stop` began."""
    (Place(place).run / f"{component}.hold").unlink(missing_ok=True)
