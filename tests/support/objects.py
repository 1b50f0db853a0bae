# SPDX-License-Identifier: Apache-2.0
"""Compiles the tests' own BPF programs (tests/support/bpf), as the build does the real ones.

What was compiled stays in build/, by content: on other kernels, under emulation, clang takes half a
minute, and the guests find there what `make test` compiled on the machine.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("bpf") / "mini.bpf.c"
CONTRACT = ROOT / "datapath" / "include" / "weir" / "abi.h"
COMPILED = ROOT / "build" / "test-objects"


def compiler_flags() -> list[str]:
    command = ["gcc", "-print-multiarch"]
    triple = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return [
        *["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Werror"],
        f"-I{ROOT / 'datapath' / 'include'}",
        f"-idirafter/usr/include/{triple}",
    ]


def compile_mini(folder: Path, **defines: int) -> Path:
    """mini.bpf.o with these macros defined, in a folder of its own."""
    name = "-".join(f"{key}{value}" for key, value in sorted(defines.items())) or "plain"
    output = folder / name / "mini.bpf.o"
    output.parent.mkdir(exist_ok=True)
    macros = [f"-D{key}={value}" for key, value in defines.items()]
    command = ["clang", *compiler_flags(), *macros, "-c", str(SOURCE)]
    content = SOURCE.read_bytes() + CONTRACT.read_bytes() + " ".join(command).encode()
    known = COMPILED / f"{hashlib.sha256(content).hexdigest()[:16]}.bpf.o"
    if not known.exists():
        COMPILED.mkdir(parents=True, exist_ok=True)
        subprocess.run([*command, "-o", str(output)], check=True)
        subprocess.run(["llvm-strip", "-g", str(output)], check=True)
        partial = Path(shutil.copy(output, known.with_name(f"{output.parent.name}.partial")))
        partial.rename(known)
    shutil.copy(known, output)
    return output
