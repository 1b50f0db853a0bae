# SPDX-License-Identifier: Apache-2.0
"""Private network and mount namespaces, bpffs and cgroups for tests that need root.

Network namespaces have no name and no mount: they live as long as a descriptor, so that
nothing is left behind however a test ends. `ip netns exec` would hide the bpffs.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def setns(fd: int) -> None:
    _checked(_libc.setns(fd, 0), "setns")


def run(*command: str) -> str:
    """Runs a command in the caller's namespaces; its output, or an error that has it."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def in_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own, whose namespaces it may change."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return outcome[0]


class NetNs:
    """A network namespace with its loopback up."""

    def __init__(self) -> None:
        self.fd = in_thread(self._make)
        with self.entered():
            run("ip", "link", "set", "lo", "up")

    @staticmethod
    def _make() -> int:
        unshare(CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """For programs that want a path; valid while this object is open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread, and the processes it starts, are in this namespace."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        setns(self.fd)
        try:
            yield
        finally:
            setns(before)
            os.close(before)

    def run(self, *command: str) -> str:
        with self.entered():
            return run(*command)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def veth(name: str, inside: NetNs, peer: str, other: NetNs) -> None:
    """A veth pair: `name` in one namespace, `peer` in the other, both up."""
    inside.run("ip", "link", "add", name, "type", "veth", "peer", "name", peer, "netns", other.path)
    inside.run("ip", "link", "set", name, "up")
    other.run("ip", "link", "set", peer, "up")


def private_mounts() -> None:
    """This thread and all that it starts get mounts of their own: they end with the process."""
    unshare(CLONE_NEWNS)
    run("mount", "--make-rprivate", "/")


@contextmanager
def bpffs(path: Path) -> Iterator[Path]:
    """A bpffs of its own at `path`, which must be an empty folder."""
    run("mount", "-t", "bpf", "bpf", str(path))
    try:
        yield path
    finally:
        run("umount", "--lazy", str(path))


def cgroup_root() -> Path:
    """Where cgroup v2 is mounted, at /sys/fs/cgroup or elsewhere."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise AssertionError("no cgroup v2 mount: mount -t cgroup2 cgroup2 /sys/fs/cgroup")


@contextmanager
def cgroup() -> Iterator[Path]:
    """An empty cgroup; who writes its pid to cgroup.procs must have left at the end."""
    path = cgroup_root() / f"weir-test-{os.getpid()}-{next(_numbers)}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()
