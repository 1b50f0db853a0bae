# SPDX-License-Identifier: Apache-2.0
"""Shim and configuration on a node: whole, executable, found by the runtime, removable."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from weir.cni import install


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    path = tmp_path / "built"
    path.write_bytes(b"\x7fELF new")
    return path


def test_shim_replaces_an_old_one_in_one_step(tmp_path: Path, shim: Path) -> None:
    bin_dir = tmp_path / "opt" / "cni" / "bin"
    bin_dir.mkdir(parents=True)
    old = bin_dir / "weir"
    old.write_bytes(b"old")
    (bin_dir / ".weir.partial").write_bytes(b"left by a crash")
    with old.open("rb") as running:
        installed = install.install_shim(shim, bin_dir)
        assert running.read() == b"old"  # another inode: what runs is not changed
    assert installed.read_bytes() == shim.read_bytes()
    assert installed.stat().st_mode & 0o777 == 0o755
    assert [p.name for p in bin_dir.iterdir()] == ["weir"]


def test_equal_files_are_left_alone(tmp_path: Path, shim: Path) -> None:
    first = install.install_shim(shim, tmp_path / "bin").stat().st_ino
    assert install.install_shim(shim, tmp_path / "bin").stat().st_ino == first


def test_config_is_what_old_and_new_runtimes_take(tmp_path: Path) -> None:
    path = install.install_config(tmp_path, Path("/run/other.sock"))
    assert path.name == "05-weir.conflist"
    assert json.loads(path.read_bytes()) == {
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "weir",
        "plugins": [{"type": "weir", "socket": "/run/other.sock"}],
    }


def test_earlier_config_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "00-other.conflist").write_text("{}")
    (tmp_path / "00-notes.txt").write_text("")
    (tmp_path / "10-later.conf").write_text("{}")
    with caplog.at_level(logging.WARNING):
        install.install_config(tmp_path)
    warned = [r.getMessage() for r in caplog.records]
    assert len(warned) == 1
    assert "00-other.conflist" in warned[0]


def test_remove_takes_both_and_is_idempotent(tmp_path: Path, shim: Path) -> None:
    install.install_shim(shim, tmp_path / "bin")
    install.install_config(tmp_path / "conf")
    for _ in range(2):
        install.remove(tmp_path / "bin", tmp_path / "conf")
        assert not list((tmp_path / "bin").iterdir())
        assert not list((tmp_path / "conf").iterdir())


def test_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["shim", "--source", str(tmp_path / "none"), "--bin-dir", str(tmp_path)]
    assert install.main(arguments) == 1
    assert str(tmp_path / "none") in capsys.readouterr().err
