# SPDX-License-Identifier: Apache-2.0
"""Puts the shim and the CNI configuration on the node, and takes them away.

The configuration is what turns a node Ready, so it comes last: only once the agent can wire
pods. Both files appear whole or not at all, as the runtime may look at any moment. Also a
command: `python -m weir.cni.install {shim,config,remove}`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from weir.cni.protocol import DEFAULT_VERSION, SUPPORTED_VERSIONS

logger = logging.getLogger(__name__)

SHIM_NAME = "weir"
SHIM_SOURCE = Path("/opt/weir/libexec/weir")
BIN_DIR = Path("/opt/cni/bin")
CONFIG_DIR = Path("/etc/cni/net.d")
CONFIG_NAME = "05-weir.conflist"
SOCKET = Path("/run/weir/cni.sock")


class InstallError(Exception):
    """A file could not be put in place or removed; the text names it."""


def install_shim(source: Path = SHIM_SOURCE, bin_dir: Path = BIN_DIR) -> Path:
    """Copies the shim. One that runs right now keeps running: its file is replaced, not changed."""
    try:
        program = source.read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read the CNI shim {source}: {error}") from error
    return _replace(bin_dir / SHIM_NAME, program, 0o755)


def install_config(config_dir: Path = CONFIG_DIR, socket: Path = SOCKET) -> Path:
    """Writes the network configuration; from here on the runtime calls us.

    The kubelet's runtime takes the first file by name: earlier ones are warned of.
    """
    for other in sorted(config_dir.glob("*")):
        if other.suffix in {".conf", ".conflist", ".json"} and other.name < CONFIG_NAME:
            logger.warning("%s comes before %s: the runtime uses it instead", other, CONFIG_NAME)
    return _replace(config_dir / CONFIG_NAME, config(socket), 0o644)


def config(socket: Path = SOCKET) -> bytes:
    """`cniVersion` is what containerd 1.6 understands; newer runtimes take the best of
    `cniVersions`, which brings GC and STATUS."""
    content = {
        "cniVersion": DEFAULT_VERSION,
        "cniVersions": [v for v in SUPPORTED_VERSIONS if v >= DEFAULT_VERSION],
        "name": "weir",
        "plugins": [{"type": SHIM_NAME, "socket": str(socket)}],
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def remove(bin_dir: Path = BIN_DIR, config_dir: Path = CONFIG_DIR) -> None:
    """Configuration first, so that the runtime never calls a plugin that is not there."""
    for path in (config_dir / CONFIG_NAME, bin_dir / SHIM_NAME):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise InstallError(f"cannot remove {path}: {error}") from error


def _replace(path: Path, content: bytes, mode: int) -> Path:
    """The file with this content and mode, in one step; one that is equal is left alone."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
            return path
        partial.unlink(missing_ok=True)
        with partial.open("xb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError as error:
        raise InstallError(f"cannot put {path} in place: {error}") from error
    logger.info("installed %s", path)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="weir.cni.install", description=__doc__)
    parser.add_argument("what", choices=["shim", "config", "remove"])
    parser.add_argument("--source", type=Path, default=SHIM_SOURCE)
    parser.add_argument("--bin-dir", type=Path, default=BIN_DIR)
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    parser.add_argument("--socket", type=Path, default=SOCKET)
    args = parser.parse_args(arguments)
    try:
        match args.what:
            case "shim":
                install_shim(args.source, args.bin_dir)
            case "config":
                install_config(args.config_dir, args.socket)
            case _:
                remove(args.bin_dir, args.config_dir)
    except InstallError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
