# SPDX-License-Identifier: Apache-2.0
"""Entering a pod's network namespace from a worker thread, and the sysctls there.

setns() moves the calling thread only, and /proc/sys/net shows the namespace of the thread
that opens a file in it. So one `with` block does both, and the process's namespace, which is
its main thread's, never changes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weir.cni.errors import Code, WiringError

CLONE_NEWNET = 0x40000000
SYSCTLS = Path("/proc/sys")
SO_NETNS_COOKIE = 71

_libc = ctypes.CDLL(None, use_errno=True)


class NetnsGone(WiringError):
    """There is no such namespace (any more)."""

    code = Code.UNKNOWN_CONTAINER


def open_netns(path: str) -> int:
    """A descriptor of the namespace at `path`. NetnsGone; WiringError for the node's own."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetnsGone(f"cannot open the network namespace {path}", details=str(error)) from error
    own, there = Path("/proc/self/ns/net").stat(), os.fstat(fd)
    if own.st_dev == there.st_dev and own.st_ino != there.st_ino:
        return fd
    os.close(fd)
    if own.st_dev != there.st_dev:
        raise NetnsGone(f"{path} is not a network namespace", details="nothing is mounted there")
    raise WiringError(f"{path} is the node's own network namespace", code=Code.INVALID_ENVIRONMENT)


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """Runs the block in the namespace behind `fd`. Not for the main thread."""
    if threading.current_thread() is threading.main_thread():
        raise RuntimeError("setns() in the main thread would move the whole process")
    own = os.open(f"/proc/self/task/{threading.get_native_id()}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _setns(fd)
        try:
            yield
        finally:
            # failing is not survivable: the next job of this thread would wire another pod here
            _setns(own)
    finally:
        os.close(own)


def netns_cookie() -> int:
    """The number by which socket hooks know this thread's namespace; 0 before 5.14."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        try:
            cookie = any_socket.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError as error:
            if error.errno == errno.ENOPROTOOPT:
                return 0
            raise WiringError("cannot get the namespace's cookie", details=str(error)) from error
    return int.from_bytes(cookie, sys.byteorder)


def sysctl(name: str, value: int, *, root: Path = SYSCTLS, optional: bool = False) -> None:
    """Writes e.g. "net/ipv4/ip_forward", unless it has the value already: the file may be
    read-only. `optional`: the kernel may lack it."""
    wanted = str(value).encode()
    try:
        if _read(root / name) != wanted:
            _write(root / name, wanted)
    except FileNotFoundError as error:
        if not optional:
            raise WiringError(f"no sysctl {name}", details=str(error)) from error
    except OSError as error:
        raise WiringError(f"cannot set the sysctl {name} to {value}", details=str(error)) from error


def _read(path: Path) -> bytes:
    """pathlib and buffered files cost ten times what the kernel takes, for each of five a pod."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64).strip()
    finally:
        os.close(fd)


def _write(path: Path, value: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _setns(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise NetnsGone("cannot enter the network namespace", details=os.strerror(number))
