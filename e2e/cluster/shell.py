# SPDX-License-Identifier: Apache-2.0
"""Small helpers around the system's tools and /proc/sys."""

import subprocess
from pathlib import Path

from e2e.cluster.errors import ClusterError


def tool(*command: str, text: str | None = None) -> str:
    """Run a program that must succeed; its standard output."""
    result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if result.returncode:
        message = (result.stderr or result.stdout).strip()
        raise ClusterError(f"`{' '.join(command)}` failed ({result.returncode}): {message}")
    return result.stdout


def sysctl(name: str, value: str) -> None:
    """Set a sysctl of this network namespace; the name with slashes."""
    Path("/proc/sys", name).write_text(value)
