# SPDX-License-Identifier: Apache-2.0
"""Network namespaces that exist as long as this process, and commands in them.

They have no name and no mount: a descriptor keeps them, so nothing can be left behind.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading

from bench.errors import BenchError

CLONE_NEWNET = 0x40000000
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise BenchError(f"{what}: {os.strerror(number)}")


class Namespace:
    """A new network namespace with its loopback up."""

    def __init__(self) -> None:
        self.fd = -1
        # unshare moves the calling thread alone: make it in one that ends afterwards.
        maker = threading.Thread(target=self._make)
        maker.start()
        maker.join()
        if self.fd < 0:
            raise BenchError("cannot make a network namespace (root?)")
        self.ip("link set lo up")

    def _make(self) -> None:
        checked(libc.unshare(CLONE_NEWNET), "unshare")
        self.fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @property
    def path(self) -> str:
        """For other processes too, while this one lives."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def run(self, *command: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def ip(self, arguments: str) -> str:
        return self.run("ip", *arguments.split())

    def enter_for_good(self) -> None:
        """The calling thread moves here and stays: for the threads of an executor."""
        checked(libc.setns(self.fd, CLONE_NEWNET), "setns")

    def close(self) -> None:
        os.close(self.fd)
