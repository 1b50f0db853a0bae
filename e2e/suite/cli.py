# SPDX-License-Identifier: Apache-2.0
"""`weir policy` as a person runs it who has kubectl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from e2e.suite.kubectl import kubeconfig, program
from e2e.suite.world import World


def weir(cluster: World, *words: str) -> tuple[int, Any]:
    """The exit code of a `weir policy` command from outside, and its JSON."""
    folder = str(Path(program("kubectl")).parent)
    done = subprocess.run(
        [sys.executable, "-m", "weir.cli.main", "policy", *words, "-o", "json",
         f"--kubeconfig={kubeconfig()}", f"--namespace={cluster.weir}"],
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)
