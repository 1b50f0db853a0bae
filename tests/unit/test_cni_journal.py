# SPDX-License-Identifier: Apache-2.0
"""The journal after crashes at every byte, failing disks, and a hundred callers at once."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from weir.cni import journal as journal_module
from weir.cni.errors import JournalError
from weir.cni.journal import Journal, encode


def reopen(path: Path) -> Journal:
    return Journal(path, kind="test", sync=True)


def filled(path: Path, *payloads: bytes) -> bytes:
    path.write_bytes(b"".join(encode(p) for p in (b"test 1", *payloads)))
    return path.read_bytes()


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


class Disk:
    """Scripted faults under the journal: the next write stops after `room` bytes, the next
    truncation or sync fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        self.sync_fails = False
        self.truncate_fails = False
        self.syncs = 0
        self._real = os.write, os.fdatasync, os.ftruncate
        monkeypatch.setattr(os, "write", self._write)
        monkeypatch.setattr(os, "fdatasync", self._fdatasync)
        monkeypatch.setattr(os, "ftruncate", self._ftruncate)

    def _write(self, fd: int, data: bytes) -> int:
        if self.room is None or fd <= 2:
            return self._real[0](fd, data)
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self._real[0](fd, bytes(data)[: self.room])
        self.room -= done
        return done

    def _fdatasync(self, fd: int) -> None:
        if self.sync_fails:
            raise OSError(errno.EIO, "Input/output error")
        self.syncs += 1
        self._real[1](fd)

    def _ftruncate(self, fd: int, length: int) -> None:
        if self.truncate_fails:
            raise OSError(errno.EIO, "Input/output error")
        self._real[2](fd, length)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_cut_at_every_byte_leaves_a_prefix_and_goes_on(tmp_path: Path) -> None:
    payloads = [b"one", b"two two", b"three"]
    whole = filled(tmp_path / "whole", *payloads)
    for length in range(len(whole) + 1):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        journal = reopen(path)
        assert journal.lines == payloads[: len(journal.lines)]
        # everything that was wholly there is there
        assert len(journal.lines) == max(0, whole[:length].count(b"\n") - 1)
        await journal.append(b"after")
        journal.close()
        again = reopen(path)
        assert again.lines == [*journal.lines, b"after"]
        again.close()


async def test_damage_in_the_middle_costs_that_line_only(tmp_path: Path) -> None:
    whole = filled(tmp_path / "j", b"one", b"two", b"three")
    for bit in (0, 5, 7):
        at = whole.index(b"two") + 1
        (tmp_path / "j").write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        journal = reopen(tmp_path / "j")
        assert journal.lines == [b"one", b"three"]
        journal.close()


async def test_another_version_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_bytes(encode(b"test 99") + encode(b"record of the future"))
    with pytest.raises(JournalError, match="another version"):
        reopen(path)
    assert b"of the future" in path.read_bytes()


@pytest.mark.parametrize("room", range(0, 24, 3))
async def test_full_disk_fails_the_append_and_leaves_no_trace(
    tmp_path: Path, disk: Disk, room: int
) -> None:
    journal = reopen(tmp_path / "j")
    await journal.append(b"kept")
    disk.room = room
    with pytest.raises(JournalError, match="No space left"):
        await journal.append(b"x" * 30)
    assert reopen(tmp_path / "j").lines == [b"kept"]
    disk.room = None
    await journal.append(b"later")
    journal.close()
    assert reopen(tmp_path / "j").lines == [b"kept", b"later"]


@pytest.mark.parametrize("fault", ["sync_fails", "truncate_fails"])
async def test_suspect_file_is_rewritten_before_the_next_append(
    tmp_path: Path, disk: Disk, fault: str
) -> None:
    journal = reopen(tmp_path / "j")
    await journal.append(b"kept")
    before = (tmp_path / "j").stat().st_ino
    setattr(disk, fault, True)
    if fault == "truncate_fails":
        disk.room = 5
    with pytest.raises(JournalError):
        await journal.append(b"never promised")
    disk.room = None
    if fault == "sync_fails":  # still broken: the rewrite fails too, and nothing is promised
        with pytest.raises(JournalError):
            await journal.append(b"nor this")
    setattr(disk, fault, False)
    await journal.append(b"later")
    journal.close()
    assert reopen(tmp_path / "j").lines == [b"kept", b"later"]
    assert (tmp_path / "j").stat().st_ino != before
    assert names(tmp_path) == ["j"]


async def test_torn_tail_on_a_full_disk_still_opens(tmp_path: Path, disk: Disk) -> None:
    whole = filled(tmp_path / "j", b"one", b"two")
    (tmp_path / "j").write_bytes(whole[:-2])
    disk.room = 0
    journal = reopen(tmp_path / "j")
    assert journal.lines == [b"one"]
    with pytest.raises(JournalError):
        await journal.append(b"three")
    disk.room = None
    await journal.append(b"four")
    journal.close()
    assert reopen(tmp_path / "j").lines == [b"one", b"four"]


async def test_a_hundred_at_once_share_syncs(tmp_path: Path, disk: Disk) -> None:
    journal = reopen(tmp_path / "j")
    disk.syncs = 0
    payloads = [b"%d" % n for n in range(100)]
    await asyncio.gather(*(journal.append(p) for p in payloads))
    journal.close()
    assert sorted(reopen(tmp_path / "j").lines) == sorted(payloads)
    assert disk.syncs <= 10


async def test_cancelled_caller_leaves_a_sound_file(tmp_path: Path) -> None:
    journal = reopen(tmp_path / "j")
    task = asyncio.create_task(journal.append(b"given up"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await journal.append(b"next")
    journal.close()
    assert reopen(tmp_path / "j").lines == [b"given up", b"next"]


async def test_compaction_replaces_history_and_keeps_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_MIN_LINES", 4)
    journal = reopen(tmp_path / "j")
    for n in range(4):
        await journal.append(b"history %d" % n)
    assert journal.long()
    pending = asyncio.create_task(journal.append(b"meanwhile"))
    await journal.compact([b"live"])
    await pending
    assert not journal.long()
    journal.close()
    lines = reopen(tmp_path / "j").lines
    assert lines[0] == b"live"
    assert set(lines) <= {b"live", b"meanwhile"}


async def test_failed_compaction_leaves_the_old_file(tmp_path: Path, disk: Disk) -> None:
    journal = reopen(tmp_path / "j")
    await journal.append(b"one")
    disk.room = 3
    await journal.compact([b"live"])
    disk.room = None
    await journal.append(b"two")
    journal.close()
    assert reopen(tmp_path / "j").lines == [b"one", b"two"]
    assert names(tmp_path) == ["j"]
