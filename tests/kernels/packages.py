# SPDX-License-Identifier: Apache-2.0
"""Debian's kernel packages: find the newest of a series, fetch, unpack.

Exact versions rotate in the archive, so a series is resolved each time, in a private apt state:
the machine's own sources stay as they are, and it works the same on any release of Debian or
Ubuntu. Unpacked kernels stay in the user's cache, one folder a release, the newest of each
series only. Without the network the newest cached one is used, and said so.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import KernelRunError

logger = logging.getLogger(__name__)

MIRROR = os.environ.get("DEBIAN_MIRROR", "http://deb.debian.org/debian")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# Which suite has a series; any other is looked for in the newest suite.
SUITES = {"5.10": "bullseye", "6.1": "bookworm", "6.12": "trixie"}
NEWEST_SUITE = "sid"
DEFAULT_SERIES = ("6.1", "6.12")
ALL_SERIES = ("5.10", "6.1", "6.12", "7")
INDEX_MAX_AGE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel. `release` is what its uname -r says."""

    series: str
    release: str
    folder: Path

    @property
    def image(self) -> Path:
        found = [*self.folder.glob("boot/vmlinuz-*"), *self.folder.glob("lib/modules/*/vmlinuz")]
        if not found:
            raise KernelRunError(f"kernel {self.release}: no vmlinuz in {self.folder}")
        return found[0]


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "weir" / "kernels"


def release_order(release: str) -> list[int]:
    """6.12.107+deb13-amd64 is newer than 6.12.94+deb13-amd64: compare numbers, not text."""
    return [int(number) for number in re.findall(r"\d+", release)]


def pattern(series: str) -> re.Pattern[str]:
    """The plain flavour's release names of a series: no -rt, -cloud or -unsigned."""
    return re.compile(rf"{re.escape(series)}\.[0-9.]+(?:-\d+|\+deb\d+)?-amd64")


class Archive:
    """One suite of Debian's archive, seen through an apt state of its own."""

    def __init__(self, suite: str, cache: Path) -> None:
        self.suite = suite
        self.state = cache / "apt" / suite

    def command(self, tool: str, *arguments: str, cwd: Path | None = None) -> str:
        options = {
            "Dir::State": self.state,
            "Dir::State::lists": self.state / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self.state / "cache",
            "Dir::Etc::sourcelist": self.state / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Acquire::Languages": "none",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
        }
        flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        done = subprocess.run(
            [tool, "-qq", *flags, *arguments], cwd=cwd, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise KernelRunError(f"{tool} {' '.join(arguments)} ({self.suite}): {done.stderr}")
        return done.stdout

    def refresh(self) -> None:
        """Fetch the suite's index, at most once a day."""
        stamp = self.state / "fresh"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < INDEX_MAX_AGE_S:
            return
        if not KEYRING.exists():
            raise KernelRunError(f"no {KEYRING}: install debian-archive-keyring (make setup)")
        for folder in ("lists/partial", "cache/archives/partial"):
            (self.state / folder).mkdir(parents=True, exist_ok=True)
        source = f"deb [signed-by={KEYRING}] {MIRROR} {self.suite} main\n"
        (self.state / "sources.list").write_text(source)
        self.command("apt-get", "update")
        stamp.touch()

    def releases(self, series: str) -> list[str]:
        """Releases of a series that the suite has, oldest first."""
        names = self.command("apt-cache", "pkgnames", f"linux-image-{series}.").split()
        found = (name.removeprefix("linux-image-") for name in names)
        return sorted(filter(pattern(series).fullmatch, found), key=release_order)

    def download(self, release: str, folder: Path) -> list[Path]:
        """The package files that make up a release: newer suites split image and modules."""
        wanted = {f"linux-{part}-{release}" for part in ("image", "binary", "modules", "base")}
        known = set(self.command("apt-cache", "pkgnames", "linux-").split())
        self.command("apt-get", "download", *sorted(wanted & known), cwd=folder)
        return sorted(folder.glob("*.deb"))


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """One run at a time changes the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(series: str, cache: Path) -> list[Kernel]:
    releases = [p.name for p in cache.iterdir() if pattern(series).fullmatch(p.name)]
    ordered = sorted(releases, key=release_order)
    return [Kernel(series, release, cache / release) for release in ordered]


def unpack(archive: Archive, kernel: Kernel) -> None:
    """Into a folder that gets its name last, so that a broken one is never taken for whole."""
    partial = kernel.folder.with_name(f"{kernel.release}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "packages").mkdir(parents=True)
    for package in archive.download(kernel.release, partial / "packages"):
        subprocess.run(["dpkg", "-x", package, partial], check=True)
    shutil.rmtree(partial / "packages")
    if not (partial / "lib").exists():  # packages from trixie on ship /usr/lib/modules
        (partial / "lib").symlink_to("usr/lib")
    subprocess.run(["depmod", "-b", partial, kernel.release], check=True)
    partial.rename(kernel.folder)


def get(series: str) -> Kernel:
    """The newest kernel of a series ("6.1", or "7" for the newest 7.x), unpacked."""
    cache = cache_folder()
    with locked(cache):
        archive = Archive(SUITES.get(series, NEWEST_SUITE), cache)
        try:
            archive.refresh()
            releases = archive.releases(series)
        except KernelRunError as error:
            if not (known := cached(series, cache)):
                raise
            logger.warning("using the cached kernel %s: %s", known[-1].release, error)
            return known[-1]
        if not releases:
            raise KernelRunError(f"no kernel {series} in Debian's {archive.suite}")
        kernel = Kernel(series, releases[-1], cache / releases[-1])
        if not kernel.folder.exists():
            logger.info("fetching kernel %s", kernel.release)
            unpack(archive, kernel)
        for old in cached(series, cache):
            if old != kernel:
                shutil.rmtree(old.folder)
        return kernel
