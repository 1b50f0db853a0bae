# SPDX-License-Identifier: Apache-2.0
"""The machine: what a cluster needs of it, and its cgroup v2 hierarchy.

All processes of a cluster are below one cgroup, one sub-cgroup for the control plane and for each
node. That cgroup delegates no controllers, so that nodes look alike on a hybrid hierarchy and on
a pure v2 one, and it is the complete list of what `down` must kill, whatever crashed before.
"""

import os
import shutil
import signal
import time
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import STATE

CGROUP = "weir-cluster"
_PROGRAMS = ("unshare", "nsenter", "ip", "mount", "pivot_root", "openssl", "runc", "nft")
_KILL_TIMEOUT_S = 20.0
SETUP = "run `make setup` (as root: it installs the packages of hack/packages.txt)"


def check(programs: tuple[str, ...] = ()) -> None:
    """Raise an error that names everything that this machine lacks. `programs`: needed as well."""
    if os.geteuid() != 0:
        raise ClusterError("a cluster needs root: namespaces, mounts, BPF", "run make as root")
    cgroup_root()
    missing = [name for name in (*_PROGRAMS, *programs) if not shutil.which(name)]
    if missing:
        raise ClusterError(f"programs are missing: {', '.join(missing)}", SETUP)
    if not Path("/usr/lib/cni/host-local").exists():
        raise ClusterError("/usr/lib/cni lacks the reference CNI plugins", SETUP)
    STATE.mkdir(parents=True, exist_ok=True)
    kind = _file_system(STATE)
    if kind in ("overlay", "tmpfs", "nfs", "nfs4", "9p"):
        raise ClusterError(
            f"{STATE} is on {kind}: containerd's overlays need a file system like ext4 or xfs",
            "use a checkout on another disk",
        )


def cgroup_root() -> Path:
    """Where the machine's cgroup v2 hierarchy is mounted (pure, or the v2 part of a hybrid one)."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, target, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(target)
    raise ClusterError(
        "no cgroup v2 hierarchy is mounted", "mount one: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
    )


def cluster_cgroup() -> Path:
    return cgroup_root() / CGROUP


def processes(cgroup: Path) -> list[int]:
    """PIDs of all processes in a cgroup and below it; none if it does not exist."""
    found: list[int] = []
    for folder, _, _ in os.walk(cgroup):
        try:
            found += [int(pid) for pid in (Path(folder) / "cgroup.procs").read_text().split()]
        except OSError:  # removed meanwhile, or a threaded one whose processes its parent lists
            continue
    return found


def init_process(name: str) -> int | None:
    """PID 1 of the control plane or of a node, as the machine numbers it.

    Found in the kernel, not in a file, so that it is right also after a crash: the process in its
    cgroup that is number 1 in the PID namespace one level below ours.
    """
    for pid in processes(cluster_cgroup() / name / "system"):
        if namespace_pids(pid)[1:] == [1]:
            return pid
    return None


def namespace_pids(pid: int) -> list[int]:
    """The PIDs of a process in each PID namespace, from ours inwards; none if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return []
    for line in status.splitlines():
        if line.startswith("NSpid:"):
            return [int(part) for part in line.split()[1:]]
    return []


def remove_cgroup(cgroup: Path) -> None:
    """Kill whatever runs in a cgroup or below it, and remove it."""
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while cgroup.exists():
        for pid in processes(cgroup):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for folder, _, _ in os.walk(cgroup, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:  # still has a process: it goes in a later turn
                continue
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{cgroup} still has processes after {_KILL_TIMEOUT_S:.0f} s: {processes(cgroup)}",
                "look at /proc/PID/stack; one that hangs in the kernel needs a reboot",
            )
        time.sleep(0.02)


def _file_system(path: Path) -> str:
    best, kind = "", "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, target, mounted, *_ = line.split()
        if path.is_relative_to(target) and len(target) >= len(best):
            best, kind = target, mounted
    return kind
