# SPDX-License-Identifier: Apache-2.0
"""Compiles the tests' own BPF programs (tests/support/bpf), as the build does the real ones."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("bpf") / "mini.bpf.c"


def compile_mini(folder: Path, **defines: int) -> Path:
    """mini.bpf.o with these macros defined, in a folder of its own."""
    name = "-".join(f"{key}{value}" for key, value in sorted(defines.items())) or "plain"
    output = folder / name / "mini.bpf.o"
    output.parent.mkdir(exist_ok=True)
    triple = subprocess.run(
        ["gcc", "-print-multiarch"], capture_output=True, text=True, check=True
    ).stdout.strip()
    command = ["clang", "-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"]
    command += [f"-I{ROOT / 'datapath' / 'include'}", f"-idirafter/usr/include/{triple}"]
    command += [f"-D{key}={value}" for key, value in defines.items()]
    subprocess.run([*command, "-c", str(SOURCE), "-o", str(output)], check=True)
    subprocess.run(["llvm-strip", "-g", str(output)], check=True)
    return output
