# SPDX-License-Identifier: Apache-2.0
"""The layout's one trap: an __init__.py in a source root shadows another package.

operator/__init__.py would hide the standard library's operator, cni/weir/__init__.py all
other parts of the namespace package.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOTS = ["api", "operator", "datapath", "cni", "agent", "cli"]


@pytest.mark.parametrize("root", ROOTS)
def test_source_roots_are_not_packages(root: str) -> None:
    assert (ROOT / root / "weir").is_dir()
    assert not (ROOT / root / "__init__.py").exists()
    assert not (ROOT / root / "weir" / "__init__.py").exists()


@pytest.mark.parametrize("root", ROOTS)
def test_every_root_is_importable_beside_the_others(root: str) -> None:
    command = [sys.executable, "-P", "-c", f"import weir.{root}, operator; operator.add(1, 1)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_generated_is_tracked() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.bpf.o", "*.so", "*_pb2*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert tracked.stdout == ""
