# SPDX-License-Identifier: Apache-2.0
"""Build hook: BPF objects, the libbpf binding and the gRPC modules, next to their sources.

Runs for wheels and for editable installs. `python hatch_build.py [bpf|binding|proto ...]`
rebuilds some of them in place; what is newer than its sources is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
BPF = ROOT / "datapath" / "bpf"
INCLUDE = ROOT / "datapath" / "include"
OBJECTS = ROOT / "datapath" / "weir" / "datapath" / "objects"
BINDING = ROOT / "datapath" / "weir" / "datapath" / "libbpf_build.py"
PROTO = ROOT / "api" / "weir" / "api" / "v1" / "weir.proto"
BPF_FLAGS = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wpadded"]


class BuildError(Exception):
    """A step of the build failed; the text says which, and what to install."""


def stale(output: Path, sources: Iterable[Path]) -> bool:
    return not output.exists() or output.stat().st_mtime < max(s.stat().st_mtime for s in sources)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BuildError(
            f"{name} not found: install the packages in hack/packages.txt (make setup)"
        )
    return path


def run(command: list[str], cwd: Path = ROOT) -> None:
    done = subprocess.run(command, cwd=cwd, check=False)
    if done.returncode:
        raise BuildError(f"failed with {done.returncode}: {' '.join(command)}")


def multiarch_include() -> list[str]:
    """Debian keeps <asm/types.h> in a folder that -target bpf does not search."""
    cc = shutil.which("gcc") or shutil.which("cc")
    if cc is None:
        return []
    triple = subprocess.run([cc, "-print-multiarch"], capture_output=True, text=True, check=False)
    folder = Path("/usr/include") / triple.stdout.strip()
    return [f"-idirafter{folder}"] if triple.stdout.strip() and folder.is_dir() else []


def build_bpf() -> None:
    """Every datapath/bpf/*.bpf.c to an object with BTF and without DWARF."""
    OBJECTS.mkdir(exist_ok=True)
    headers = [*BPF.rglob("*.h"), *INCLUDE.rglob("*.h")]
    sources = sorted(BPF.glob("*.bpf.c"))
    if not sources:
        raise BuildError(f"no *.bpf.c in {BPF}")
    for source in sources:
        output = OBJECTS / source.name.replace(".bpf.c", ".bpf.o")
        if stale(output, [source, *headers]):
            partial = output.with_suffix(".partial")
            includes = [f"-I{INCLUDE}", f"-I{BPF}", *multiarch_include()]
            run([tool("clang"), *BPF_FLAGS, *includes, "-c", str(source), "-o", str(partial)])
            run([tool("llvm-strip"), "-g", str(partial)])
            partial.rename(output)
            print(f"built {output.relative_to(ROOT)}", file=sys.stderr)


def build_binding() -> None:
    """The cffi extension over libbpf, in API mode."""
    package = BINDING.parent
    built = next(iter(package.glob("_libbpf*.so")), None)
    if built is not None and not stale(built, [BINDING]):
        return
    run([sys.executable, str(BINDING)], cwd=package)


def build_proto() -> None:
    """weir_pb2.py, its gRPC half, and type stubs for both."""
    if not stale(PROTO.parent / "weir_pb2_grpc.pyi", [PROTO]):
        return
    out = str(ROOT / "api")
    bin_dir = Path(sys.executable).parent
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{out}"]
    command += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    plugin = shutil.which("protoc-gen-mypy_grpc") or shutil.which(
        str(bin_dir / "protoc-gen-mypy_grpc")
    )
    if plugin:
        command += [f"--plugin=protoc-gen-mypy_grpc={plugin}", f"--mypy_grpc_out={out}"]
    run([*command, str(PROTO)])


STEPS = {"bpf": build_bpf, "binding": build_binding, "proto": build_proto}


class WeirBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it collects files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name == "sdist":
            return
        for step in STEPS.values():
            step()
        build_data["pure_python"] = False
        build_data["infer_tag"] = False
        build_data["tag"] = "cp311-abi3-linux_x86_64"


if __name__ == "__main__":
    try:
        for wanted in sys.argv[1:] or list(STEPS):
            STEPS[wanted]()
    except (BuildError, KeyError) as error:
        sys.exit(f"build: {error}")
