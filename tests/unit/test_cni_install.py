# SPDX-License-Identifier: Apache-2.0
"""Shim and configuration on a node: whole, executable, found by the runtime, removable."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weir.cni import install

NAME = "05-weir.conflist"
SOCKET = Path("/run/weir/cni.sock")


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
    path = install.install_config(tmp_path, NAME, Path("/run/other.sock"))
    assert path.name == "05-weir.conflist"
    assert json.loads(path.read_bytes()) == {
        "cniVersion": "1.0.0",
        "cniVersions": ["1.0.0", "1.1.0"],
        "name": "weir",
        "plugins": [{"type": "weir", "socket": "/run/other.sock"}],
    }


def test_earlier_configs_are_those_that_the_runtime_prefers(tmp_path: Path) -> None:
    (tmp_path / "00-other.conflist").write_text("{}")
    (tmp_path / "00-notes.txt").write_text("")
    (tmp_path / "10-later.conf").write_text("{}")
    install.install_config(tmp_path, NAME, SOCKET)
    assert [path.name for path in install.earlier(tmp_path, NAME)] == ["00-other.conflist"]


def test_another_name_replaces_our_file_and_nobody_elses(tmp_path: Path) -> None:
    others = {"00-other.conflist": '{"plugins": [{"type": "bridge"}]}', "01-bad.conflist": "no"}
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    install.install_config(tmp_path, NAME, SOCKET)
    install.install_config(tmp_path, "02-mine.conflist", SOCKET)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "02-mine.conflist"}
    install.remove(tmp_path / "bin", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others}


def test_remove_takes_both_and_is_idempotent(tmp_path: Path, shim: Path) -> None:
    install.install_shim(shim, tmp_path / "bin")
    install.install_config(tmp_path / "conf", NAME, SOCKET)
    for _ in range(2):
        install.remove(tmp_path / "bin", tmp_path / "conf")
        assert not list((tmp_path / "bin").iterdir())
        assert not list((tmp_path / "conf").iterdir())
