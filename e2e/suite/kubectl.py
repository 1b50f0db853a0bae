# SPDX-License-Identifier: Apache-2.0
"""kubectl as the suite uses it, and polling with a deadline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).resolve().parents[2]
LOCAL_KUBECONFIG = REPOSITORY / "build" / "cluster" / "kubeconfig"
Manifest = dict[str, Any]
_T = TypeVar("_T")


class Unavailable(AssertionError):
    """Something could not be asked; perhaps in a moment."""


class KubectlError(Unavailable):
    """kubectl failed; the text has its standard error."""


def kubeconfig() -> Path:
    """The cluster under test: KUBECONFIG, or the local one that `make cluster` made."""
    return Path(os.environ.get("KUBECONFIG") or LOCAL_KUBECONFIG)


def is_local() -> bool:
    return kubeconfig().resolve() == LOCAL_KUBECONFIG.resolve()


def program(name: str) -> str:
    """A tool from PATH, or from where `make cluster` keeps the binaries that it built."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weir" / "kube"
    folders = [os.environ.get("KUBE_BIN", ""), *map(str, sorted(cache.glob("*")))]
    found = shutil.which(name, path=os.pathsep.join(folders)) or shutil.which(name)
    if found is None:
        raise KubectlError(f"{name} not found: it comes with `make cluster`, or install it")
    return found


def command(*arguments: str) -> list[str]:
    return [program("kubectl"), f"--kubeconfig={kubeconfig()}", *arguments]


def kubectl(*arguments: str, text: str | None = None, timeout: float = 60) -> str:
    """Run kubectl; its standard output."""
    done = subprocess.run(
        command(*arguments),
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    if done.returncode:
        raise KubectlError(f"kubectl {' '.join(arguments[:6])}: {done.stderr.strip()}")
    return done.stdout


def get(*arguments: str) -> Manifest:
    found: Manifest = json.loads(kubectl("get", *arguments, "--output=json"))
    return found


def apply(*manifests: Manifest) -> None:
    listing = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    kubectl("apply", "--server-side", "--force-conflicts", "--filename=-", text=json.dumps(listing))


def delete(*manifests: Manifest, wait: bool = False) -> None:
    listing = {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    flags = ["--ignore-not-found", f"--wait={str(wait).lower()}", "--filename=-"]
    kubectl("delete", *flags, text=json.dumps(listing), timeout=120)


def eventually(
    read: Callable[[], _T], accept: Callable[[_T], bool], seconds: float, what: str
) -> _T:
    """Read until the value is accepted; else fail with the last one. A failing kubectl or probe
    is no value: the API server may be away."""
    deadline = time.monotonic() + seconds
    last: _T | Unavailable | None = None
    while True:
        try:
            last = value = read()
            if accept(value):
                return value
        except Unavailable as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s; last seen: {last!r}")
        time.sleep(0.1)
