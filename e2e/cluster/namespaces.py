# SPDX-License-Identifier: Apache-2.0
"""Make the namespaces of the control plane and of a node, and run commands inside them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from e2e.cluster import host
from e2e.cluster.binaries import binary_folder
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import PKI, REPOSITORY, Place
from e2e.cluster.settings import CONTROL_PLANE

_KINDS = ("--net", "--mount", "--pid", "--uts", "--ipc", "--cgroup")
_START_TIMEOUT_S = 10.0
NODE_PATH = "/opt/kube/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def spawn(place: Place, arguments: list[str], inherit: tuple[int, ...] = ()) -> int:
    """Start `python -m e2e.cluster ARGUMENTS` as PID 1 of new namespaces; its PID out here.

    The child joins its cgroup first, so that the cgroup namespace is rooted there.
    """
    cgroup = host.cluster_cgroup() / place.name
    system = cgroup / "system"  # no processes in the root itself: it has to stay a valid parent
    cgroup.mkdir(parents=True)
    place.log.mkdir(parents=True, exist_ok=True)
    place.run.mkdir(parents=True, exist_ok=True)
    # Two steps: the namespace is rooted at the cgroup of the process that makes it, and only
    # afterwards may PID 1 move on into `system`.
    command = ["unshare", *_KINDS, "--propagation", "private", "--fork", "--kill-child",
               "--mount-proc", sys.executable, "-m", "e2e.cluster", *arguments]  # fmt: skip
    with (place.log / "init.log").open("ab") as log:
        child = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=inherit,
            preexec_fn=lambda: join(cgroup),  # noqa: PLW1509 - no threads at this point
        )
    deadline = time.monotonic() + _START_TIMEOUT_S
    pid: int | None = None
    while child.poll() is None and time.monotonic() < deadline:
        if pid is None:
            pid = next((p for p in host.processes(cgroup) if _is_init(p)), None)
        else:
            system.mkdir(exist_ok=True)
            for each in (child.pid, pid):
                (system / "cgroup.procs").write_text(str(each))
            return pid
        time.sleep(0.01)
    raise ClusterError(
        f"{place.name} did not start: {_tail(place.log / 'init.log')}",
        "run `make cluster-down` and try again",
    )


def entered(name: str, command: list[str], only_network: bool = False) -> list[str]:
    """The command line that runs `command` inside a node or the control plane.

    With `only_network` it sees the machine's files and processes but the other's network.
    """
    pid = host.init_process(name)
    if pid is None:
        raise ClusterError(f"{name} is not running", "run `make cluster`; `make cluster-status`")
    if only_network:
        return ["nsenter", f"--target={pid}", "--net", "--", *command]
    return ["nsenter", f"--target={pid}", "--all", "--wd=/", "--", *command]


def start(name: str, command: list[str], stdin: IO[bytes] | None = None) -> "subprocess.Popen[str]":
    """Start a command in a node's namespaces and in its cgroup."""
    return subprocess.Popen(
        entered(name, command),
        preexec_fn=lambda: join(host.cluster_cgroup() / name / "system"),  # noqa: PLW1509 - as above
        env=environment(name),
        stdin=stdin or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def execute(name: str, command: list[str], only_network: bool = False) -> None:
    """Become that command: for the command line."""
    arguments = entered(name, command, only_network)
    join(host.cluster_cgroup() / name / "system")
    os.execvpe(arguments[0], arguments, environment(name, only_network))


def environment(name: str, only_network: bool = False) -> dict[str, str]:
    """The variables for a command inside: the cluster's binaries come first in PATH."""
    if name == CONTROL_PLANE or only_network:
        path = f"{binary_folder()}:{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "KUBECONFIG": str(PKI / "admin.conf")}
    return {**os.environ, "PATH": NODE_PATH}


def join(cgroup: Path) -> None:
    """Move this process into a cgroup."""
    (cgroup / "cgroup.procs").write_text("0")


def _is_init(pid: int) -> bool:
    return host.namespace_pids(pid)[1:] == [1]


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-5:]) or "no message"
