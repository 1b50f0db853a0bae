# SPDX-License-Identifier: Apache-2.0
"""Puts the shim and the CNI configuration on the node, and takes them away.

The configuration is what turns a node Ready, so it comes last: only once the agent can wire
pods. Both files appear whole or not at all, as the runtime may look at any moment.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from weir.cni.protocol import DEFAULT_VERSION, SUPPORTED_VERSIONS

logger = logging.getLogger(__name__)

SHIM_NAME = "weir"


class InstallError(Exception):
    """A file could not be put in place or removed; the text names it."""


def install_shim(source: Path, bin_dir: Path) -> Path:
    """Copies the shim. One that runs right now keeps running: its file is replaced, not changed."""
    try:
        program = source.read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read the CNI shim {source}: {error}") from error
    return _replace(bin_dir / SHIM_NAME, program, 0o755)


def install_config(config_dir: Path, name: str, socket: Path) -> Path:
    """Writes the network configuration; from here on the runtime calls us. One of ours under an
    earlier name goes."""
    path = _replace(config_dir / name, config(socket), 0o644)
    for other in _ours(config_dir):
        if other != path:
            _unlink(other)
    return path


def earlier(config_dir: Path, name: str) -> list[Path]:
    """Configurations that the runtime prefers to ours: it takes the first file by name."""
    return [
        other
        for other in sorted(config_dir.glob("*"))
        if other.suffix in {".conf", ".conflist", ".json"} and other.name < name
    ]


def config(socket: Path) -> bytes:
    """`cniVersion` is what containerd 1.6 understands; newer runtimes take the best of
    `cniVersions`, which brings GC and STATUS."""
    content = {
        "cniVersion": DEFAULT_VERSION,
        "cniVersions": [v for v in SUPPORTED_VERSIONS if v >= DEFAULT_VERSION],
        "name": "weir",
        "plugins": [{"type": SHIM_NAME, "socket": str(socket)}],
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def remove(bin_dir: Path, config_dir: Path) -> None:
    """Configuration first, so that the runtime never calls a plugin that is not there."""
    for path in (*_ours(config_dir), bin_dir / SHIM_NAME):
        _unlink(path)


def _ours(config_dir: Path) -> list[Path]:
    """Configurations whose only plugin is Weir's, whatever their names."""
    found = []
    for path in sorted(config_dir.glob("*.conflist")):
        try:
            content = json.loads(path.read_bytes())
            types = [plugin["type"] for plugin in content["plugins"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # somebody else's
        if types == [SHIM_NAME]:
            found.append(path)
    return found


def _unlink(path: Path) -> None:
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
