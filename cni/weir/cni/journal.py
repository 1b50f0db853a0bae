# SPDX-License-Identifier: Apache-2.0
"""A crash-safe, append-only file of lines, each with its own checksum.

`append` returns when the line is on disk. Lines that arrive while a write is under way share
the next write and sync, so that a hundred at once cost a few syncs, not a hundred. One thread
does all writing, so that a cancelled caller can never leave two writers.

What a crash can leave is lines that nobody was promised: a torn last line, or parts of the
last write. Lines with a wrong checksum are therefore skipped, the good ones around them
kept, and a file that had any is rewritten before anything is appended. After a failed write
the file is cut back to what was promised; where that fails too (or a sync failed, after which
the kernel may have dropped pages), it is rewritten whole, under another name and then
renamed, before the next append succeeds.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from weir.cni.errors import JournalError

logger = logging.getLogger(__name__)

FORMAT = 1
COMPACT_MIN_LINES = 1000
"""Below this a rewrite saves nothing worth its sync."""


def encode(payload: bytes) -> bytes:
    """The line of a payload; the payload holds no newline."""
    if b"\n" in payload:
        raise ValueError(f"newline in a journal record: {payload!r}")
    return b"%08x %s\n" % (zlib.crc32(payload), payload)


def decode(line: bytes) -> bytes | None:
    """The payload of a line without its newline, or None when it is damaged."""
    if len(line) < 9 or line[8:9] != b" ":
        return None
    payload = line[9:]
    return payload if line[:8] == b"%08x" % zlib.crc32(payload) else None


class Journal:
    """Lines of one file. `lines` are the payloads found at opening, oldest first.

    A caller changes its own state first and appends then: what `compact` is given must hold
    every line that is being appended meanwhile.
    """

    def __init__(self, path: Path, *, kind: str, sync: bool) -> None:
        self.path = path
        self._header = f"{kind} {FORMAT}".encode()
        self._sync = sync
        self._lock = threading.Lock()
        self._waiting: list[tuple[bytes, Future[None]]] = []
        self._fd = -1
        self._size = 0  # bytes of the file that were promised
        self._mend: bytes | None = None  # what the file must be replaced by before an append
        self._count = 0
        self._compact_at = COMPACT_MIN_LINES
        try:
            self.lines = self._open()
        except OSError as error:
            raise JournalError(f"cannot open the journal {path}", details=str(error)) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=kind)

    async def append(self, payload: bytes) -> None:
        """Returns when the line is safe; JournalError when it is not, and then it is not there."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # a cancelled caller does not take its line back
        with self._lock:
            self._waiting.append((encode(payload), future))
        self._writer.submit(self._flush)
        await asyncio.wrap_future(future)

    def long(self) -> bool:
        """Whether most of the file is likely history, so that `compact` pays."""
        return self._count >= self._compact_at

    async def compact(self, live: Iterable[bytes]) -> None:
        """Replaces all lines by those of `live`. A failure is logged and leaves the old file."""
        payloads = list(live)
        self._compact_at = self._count + COMPACT_MIN_LINES  # no second one meanwhile, no hot retry
        await asyncio.wrap_future(self._writer.submit(self._compact, payloads))

    def close(self) -> None:
        """Waits for the writes under way."""
        self._writer.shutdown()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> list[bytes]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        *whole, torn = data.split(b"\n")
        payloads = [decode(line) for line in whole]
        good = [payload for payload in payloads if payload is not None]
        damaged = len(payloads) - len(good) + bool(torn)
        if good and good[0] != self._header:
            raise JournalError(
                f"{self.path} was written by another version",
                details=f"it begins with {good[0][:80]!r}, expected {self._header!r}",
            )
        if damaged:
            logger.warning("%s: skipped %d damaged lines of %d", self.path, damaged, len(whole) + 1)
        self._count = len(good[1:])
        if damaged or not good:
            self._mend = b"".join(encode(line) for line in [self._header, *good[1:]])
            try:
                self._replace(self._mend)
            except OSError as error:
                logger.warning("%s: not rewritten yet: %s", self.path, error)
        else:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            self._size = len(data)
        return good[1:]

    def _flush(self) -> None:
        with self._lock:
            batch, self._waiting = self._waiting, []
        if not batch:
            return
        data = b"".join(line for line, _ in batch)
        try:
            if self._mend is not None:
                self._replace(self._mend)
            self._write(self._fd, data)
        except OSError as error:
            self._cut_back()
            failure = JournalError(f"cannot write the journal {self.path}", details=str(error))
            for _, future in batch:
                future.set_exception(failure)
            return
        self._size += len(data)
        self._count += len(batch)
        for _, future in batch:
            future.set_result(None)

    def _cut_back(self) -> None:
        """After a failed write: what was promised, and nothing else, shall be in the file."""
        if self._mend is not None:
            return
        try:
            os.ftruncate(self._fd, self._size)
            self._settle(self._fd)
        except OSError as error:
            logger.warning("%s: cannot cut back, will rewrite it: %s", self.path, error)
            self._mend = os.pread(self._fd, self._size, 0)

    def _compact(self, payloads: list[bytes]) -> None:
        try:
            self._replace(b"".join(encode(line) for line in [self._header, *payloads]))
        except OSError as error:
            logger.warning("%s: cannot compact: %s", self.path, error)
            return
        self._count = len(payloads)
        self._compact_at = max(COMPACT_MIN_LINES, 2 * len(payloads))

    def _replace(self, data: bytes) -> None:
        """The file becomes `data`, or stays what it is."""
        partial = self.path.with_name(self.path.name + ".partial")
        fd = os.open(
            partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        try:
            self._write(fd, data)
            partial.rename(self.path)
        except OSError:
            os.close(fd)
            partial.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._size, self._mend = fd, len(data), None
        if self._sync:
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        self._settle(fd)

    def _settle(self, fd: int) -> None:
        if self._sync:
            os.fdatasync(fd)
