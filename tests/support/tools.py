# SPDX-License-Identifier: Apache-2.0
"""Other people's programs that tests run: built by module name by `make tools`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest


def tool(name: str) -> str:
    """Path of `name`: from KUBE_BIN, the cache of built binaries, or PATH.

    Fails the test where it is missing: a machine without it cannot say that the test passes.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weir" / "kube"
    folders = [os.environ.get("KUBE_BIN", ""), *map(str, sorted(cache.glob("*"), reverse=True))]
    found = shutil.which(name, path=os.pathsep.join(filter(None, folders))) or shutil.which(name)
    if found is None:
        pytest.fail(f"no {name}: `make tools` builds it", pytrace=False)
    return found
