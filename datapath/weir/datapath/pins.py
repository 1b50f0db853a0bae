# SPDX-License-Identifier: Apache-2.0
"""Where things are pinned, and the few file operations that a bpffs allows.

    maps/NAME                 maps/NAME~new: its successor while a migration runs
    layouts/NAME~HASH/        an empty folder: the layout of the pinned map
    progs/OBJECT~HASH/NAME    programs; HASH covers object, settings and maps
    links/IFNAME/PROGRAM      TCX: a link; clsact: the program as a note that we attached
    links/cgroup/PROGRAM      links

A bpffs has no dots in names (interface names have: they are escaped), and rename replaces.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weir.datapath import libbpf
from weir.datapath.errors import DatapathError, NotMounted

NEW = "~new"
CGROUP = "cgroup"


def require_bpffs(path: Path) -> None:
    """NotMounted unless `path` lies, or would lie, in a bpffs."""
    existing = next(p for p in (path, *path.parents) if p.exists())
    if libbpf.fs_magic(existing) != libbpf.BPF_FS_MAGIC:
        hint = "not in a BPF file system: mount -t bpf bpf /sys/fs/bpf"
        raise NotMounted("use", str(path), 0, hint)


def require_cgroup2(path: Path) -> None:
    if libbpf.fs_magic(path) != libbpf.CGROUP2_MAGIC:
        hint = "not cgroup v2 (see /proc/mounts): mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        raise NotMounted("use", str(path), 0, hint)


def escape(ifname: str) -> str:
    return ifname.replace("%", "%25").replace(".", "%2E")


def unescape(name: str) -> str:
    return name.replace("%2E", ".").replace("%25", "%")


class Pins:
    """The tree of one installation."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.maps = root / "maps"
        self.layouts = root / "layouts"
        self.programs = root / "progs"
        self.links = root / "links"

    def create(self) -> None:
        require_bpffs(self.root)
        for folder in (self.maps, self.layouts, self.programs, self.links):
            make_folder(folder)

    def map(self, name: str) -> Path:
        return self.maps / name

    def successor(self, name: str) -> Path:
        return self.maps / f"{name}{NEW}"

    def interface(self, ifname: str) -> Path:
        return self.links / escape(ifname)

    def interfaces(self) -> dict[str, Path]:
        """Interface name → folder of its pins."""
        found = {unescape(p.name): p for p in folders(self.links) if p.name != CGROUP}
        return dict(sorted(found.items()))


def make_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DatapathError("create", str(path), error.errno or 0) from error


def folders(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (entry for entry in path.iterdir() if entry.is_dir())


def files(path: Path) -> dict[str, Path]:
    """Name → path of what is pinned in a folder."""
    if not path.is_dir():
        return {}
    return {entry.name: entry for entry in sorted(path.iterdir()) if not entry.is_dir()}


def remove_tree(path: Path) -> None:
    """Unpins everything below and the folder itself; absent is fine."""
    if not path.is_dir():
        return
    for entry in path.iterdir():
        if entry.is_dir():
            remove_tree(entry)
        else:
            entry.unlink(missing_ok=True)
    path.rmdir()


def pin_over(fd: int, path: Path) -> None:
    """Pins so that the path always leads to the old or the new object."""
    partial = path.with_name(path.name + NEW)
    partial.unlink(missing_ok=True)
    libbpf.pin(fd, partial)
    partial.rename(path)


def must_get(path: Path) -> int:
    """A new descriptor of what is pinned there."""
    fd = libbpf.get_pinned(path)
    if fd is None:
        raise DatapathError("open pin", str(path), errno.ENOENT)
    return fd


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of what is pinned there, for a while."""
    fd = must_get(path)
    try:
        yield fd
    finally:
        os.close(fd)


def layouts(tree: Pins, name: str) -> Iterator[str]:
    """The layout hashes noted for a map."""
    for entry in folders(tree.layouts):
        noted, _, layout = entry.name.partition("~")
        if noted == name:
            yield layout


def note_layout(tree: Pins, name: str, layout: str) -> None:
    make_folder(tree.layouts / f"{name}~{layout}")


def forget_layouts(tree: Pins, name: str, keep: str) -> None:
    for layout in set(layouts(tree, name)) - {keep}:
        (tree.layouts / f"{name}~{layout}").rmdir()


def close_all(fds: dict[str, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])
