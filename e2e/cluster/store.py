# SPDX-License-Identifier: Apache-2.0
"""Give a node's containerd its images at once: a filled content store, hard-linked.

Importing and unpacking the images takes seconds a node and the result is always the same. So a
containerd of its own does it once, and each node starts with a copy: image content and unpacked
layers never change and are hard links, the databases are real copies.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from e2e.cluster import host, namespaces
from e2e.cluster.errors import ClusterError
from e2e.cluster.nodeconfig import CONTAINERD_SOCKET
from e2e.cluster.paths import IMAGE_STORE, LOGS, REPOSITORY
from e2e.cluster.shell import tool

_TIMEOUT_S = 30.0
_COPIED = "*.db"


def prepare(archives: list[Path], binaries: Path) -> Path:
    """The filled store for the images of all clusters; made when it is not there."""
    store = IMAGE_STORE / archives[0].parent.name
    if not store.exists():
        print("unpacking the images of the nodes", flush=True)
        shutil.rmtree(IMAGE_STORE, ignore_errors=True)  # of older images, or half made
        _make(store, None, archives, binaries)
    return store


def extend(base: Path, archive: Path, name: str, binaries: Path) -> Path:
    """A store that has one image more, by the name of its content; only the last one is kept."""
    store = base.with_name(f"{base.name}+{name}")
    if not store.exists():
        print(f"unpacking the image {name}", flush=True)
        for old in IMAGE_STORE.glob(f"{base.name}+*"):
            shutil.rmtree(old)
        _make(store, base, [archive], binaries)
    return store


def _make(store: Path, base: Path | None, archives: list[Path], binaries: Path) -> None:
    partial = IMAGE_STORE / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    if base is None:
        partial.mkdir(parents=True)
    else:
        copy(base, partial)
    LOGS.mkdir(exist_ok=True)
    cgroup = host.cluster_cgroup() / "images"  # so that `down` finds it whatever happens
    cgroup.mkdir(parents=True, exist_ok=True)
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
        sys.executable,
        "-m",
        "e2e.cluster",
        "fill-store",
        str(partial),
        str(binaries),
        *map(str, archives),
    ]
    try:
        result = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            preexec_fn=lambda: namespaces.join(cgroup),
            check=False,
        )
    finally:
        host.remove_cgroup(cgroup)
    if result.returncode:
        raise ClusterError(f"containerd could not unpack the images: see {LOGS}/images.log")
    partial.rename(store)


def fill(store: Path, binaries: Path, archives: list[Path]) -> None:
    """Import the images into a store. Runs in a mount and a PID namespace of its own."""
    tool("mount", "-t", "tmpfs", "tmpfs", "/run")
    config = Path("/run/containerd.toml")
    config.write_text(f'version = 3\nroot = "{store}"\nstate = "/run/containerd"\n')
    ctr = (str(binaries / "ctr"), "--address", CONTAINERD_SOCKET, "--namespace", "k8s.io")
    with (LOGS / "images.log").open("wb") as log:
        server = subprocess.Popen(
            [str(binaries / "containerd"), "--config", str(config)], stdout=log, stderr=log
        )
        deadline = time.monotonic() + _TIMEOUT_S
        while subprocess.run([*ctr, "version"], capture_output=True, check=False).returncode:
            if server.poll() is not None or time.monotonic() > deadline:
                raise ClusterError(f"containerd did not start: see {log.name}")
            time.sleep(0.05)
        for archive in archives:
            tool(*ctr, "images", "import", "--local", str(archive))
        server.terminate()
        server.wait()


def copy(store: Path, target: Path) -> None:
    """Give a node its own view of the store."""
    target.mkdir(parents=True)
    tool("cp", "--archive", "--link", f"{store}/.", str(target))
    for database in target.rglob(_COPIED):
        own = database.with_suffix(".own")
        shutil.copy2(database, own)
        own.rename(database)
