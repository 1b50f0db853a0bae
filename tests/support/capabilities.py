# SPDX-License-Identifier: Apache-2.0
"""Runs Python with no more privileges than an agent has."""

from __future__ import annotations

import platform
import subprocess
import sys

AGENT = ("bpf", "net_admin", "perfmon")


def counts_locked_memory() -> bool:
    """Before 5.11 maps and programs count as locked memory, so the limit must be raised."""
    major, minor = (int(part) for part in platform.release().split(".")[:2])
    return (major, minor) < (5, 11)


def python_with(
    capabilities: tuple[str, ...], code: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    """Runs code with these capabilities only, and where possible without locked memory."""
    command = ["prlimit", "--memlock=0"]
    if counts_locked_memory():
        command, capabilities = [], (*capabilities, "sys_resource")
    allowed = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    command += ["setpriv", f"--bounding-set={allowed}", sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
