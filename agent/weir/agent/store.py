# SPDX-License-Identifier: Apache-2.0
"""The resources by name, in memory in their encoded form, and on disk.

The file is a log of records, appended before their change reaches the maps and rewritten (new
file, rename) when most of it is outdated. So an agent that is killed never finds a state older
than its maps, to which it would take them back. The disk follows within a second: what a crash of
the machine loses, the maps lost too. A torn end is cut off at the next start. It lets the node
work with the operator away, across restart and reboot.

    record: length u32 · crc32 u32 · kind byte · payload
    P encoded resource · R name of a removed one · C JSON {instance, revision, complete}: commits
    what came before · N JSON numbers of classes, rule sets and rules
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from weir.agent.errors import BadResource
from weir.agent.resources import resource_name

logger = logging.getLogger(__name__)

HEAD = struct.Struct("<IIB")
PUT, REMOVE, COMMIT, NUMBERS = b"PRCN"
LONGEST = 64 << 20
SLACK = 4 << 20


class Position(msgspec.Struct, frozen=True):
    """Where the state came from. complete: a whole snapshot has been seen."""

    instance: str = ""
    revision: int = 0
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Transaction:
    """What one applied change did: encoded resources by name, None: gone."""

    changed: Mapping[str, bytes | None]


class Store:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._resources: dict[str, bytes] = {}
        self.position = Position()
        self.numbers = b""
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._size = 0
        self._live = 0
        self._rewrite = True
        self._unsynced = False
        self._load()
        self._live = sum(map(len, self._resources.values()))

    def __len__(self) -> int:
        return len(self._resources)

    @property
    def resources(self) -> Mapping[str, bytes]:
        return self._resources

    @property
    def dirty(self) -> bool:
        """Something is not in the file yet."""
        return bool(self._pending) or self._rewrite

    @property
    def unsynced(self) -> bool:
        """Something in the file may not be on the disk yet."""
        return self._unsynced

    # ---- changes

    def apply(
        self, resources: Iterable[bytes], removed: Iterable[str], position: Position
    ) -> Transaction:
        """A change: what it names is replaced or gone. Undecodable resources are logged."""
        changed: dict[str, bytes | None] = {}
        for encoded in resources:
            try:
                changed[resource_name(encoded)] = encoded
            except BadResource as error:
                logger.warning("%s: skipped", error)
        changed.update(dict.fromkeys(removed))
        return self._commit(changed, position)

    def replace(self, resources: Mapping[str, bytes], position: Position) -> Transaction:
        """A snapshot: what it does not name is gone."""
        changed: dict[str, bytes | None] = dict.fromkeys(self._resources.keys() - resources.keys())
        changed.update(resources)
        return self._commit(changed, position)

    def set_numbers(self, numbers: bytes) -> None:
        if numbers != self.numbers:
            self.numbers = numbers
            self._append(NUMBERS, numbers)

    def _commit(self, changed: dict[str, bytes | None], position: Position) -> Transaction:
        effective: dict[str, bytes | None] = {}
        for name, encoded in changed.items():
            if self._resources.get(name) == encoded:
                continue
            effective[name] = encoded
            self._live += len(encoded or b"") - len(self._resources.get(name, b""))
            if encoded is None:
                del self._resources[name]
                self._append(REMOVE, name.encode())
            else:
                self._resources[name] = encoded
                self._append(PUT, encoded)
        if effective or position != self.position:
            self.position = position
            self._append(COMMIT, msgspec.json.encode(position))
        return Transaction(effective)

    def _append(self, kind: int, payload: bytes) -> None:
        if self._rewrite:
            return
        record = encode(kind, payload)
        self._pending.append(record)
        self._pending_bytes += len(record)
        if self._outdated():
            self.failed()

    def _outdated(self) -> bool:
        return self._size + self._pending_bytes > 2 * self._live + SLACK

    # ---- disk

    def take_pending(self, *, durable: bool) -> Pending:
        """What to write now; `Pending.write` may run in a thread. `durable`: down to the disk."""
        whole = self._rewrite
        records = self._everything() if whole else self._pending
        self._pending = []
        self._pending_bytes = 0
        self._rewrite = False
        self._unsynced = not durable
        return Pending(self._path, records, whole, durable)

    def written(self, size: int) -> None:
        self._size = size

    def forget(self) -> None:
        """No file is better than one that is older than the maps. Blocks."""
        self._path.unlink(missing_ok=True)

    def failed(self) -> None:
        """Write everything next time: the disk did not take it, or it is shorter."""
        self._rewrite = True
        self._pending.clear()
        self._pending_bytes = 0

    def _everything(self) -> Iterator[bytes]:
        """Encoded while it is written: a copy of all of it would double the memory."""
        resources, numbers, position = list(self._resources.values()), self.numbers, self.position

        def records() -> Iterator[bytes]:
            for encoded in resources:
                yield encode(PUT, encoded)
            if numbers:
                yield encode(NUMBERS, numbers)
            yield encode(COMMIT, msgspec.json.encode(position))

        return records()

    def _load(self) -> None:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return
        end = 0
        uncommitted: dict[str, bytes | None] = {}
        for kind, payload, following in decode(data):
            try:
                if kind == PUT:
                    uncommitted[resource_name(payload)] = payload
                elif kind == REMOVE:
                    uncommitted[payload.decode()] = None
                elif kind == NUMBERS:
                    self.numbers = payload
                elif kind == COMMIT:
                    self.position = msgspec.json.decode(payload, type=Position)
                    self._take(uncommitted)
                    uncommitted = {}
            except (BadResource, UnicodeDecodeError, msgspec.MsgspecError) as error:
                logger.warning("%s: %s: the rest of it is ignored", self._path, error)
                break
            end = following
        if end != len(data) or uncommitted:
            logger.warning("%s: cut at byte %d of %d", self._path, end, len(data))
        else:
            self._size = end
            self._rewrite = False

    def _take(self, changed: Mapping[str, bytes | None]) -> None:
        for name, encoded in changed.items():
            if encoded is None:
                self._resources.pop(name, None)
            else:
                self._resources[name] = encoded


@dataclass(frozen=True, slots=True)
class Pending:
    """Records on their way to the disk, to be written once."""

    path: Path
    records: Iterable[bytes]
    whole: bool
    durable: bool

    def write(self) -> int:
        """Returns the file's size. Blocks; OSError when the disk does not take it."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target = self.path.with_suffix(".new") if self.whole else self.path
        mode = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        mode |= os.O_TRUNC if self.whole else os.O_APPEND
        fd = os.open(target, mode, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.writelines(self.records)
            file.flush()
            if self.durable:
                os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        if self.whole:
            target.rename(self.path)
        if self.durable:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return size


def encode(kind: int, payload: bytes) -> bytes:
    return HEAD.pack(len(payload), zlib.crc32(payload, kind), kind) + payload


def decode(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Kind, payload and where the next record begins, up to the first torn one."""
    offset = 0
    while offset + HEAD.size <= len(data):
        length, checksum, kind = HEAD.unpack_from(data, offset)
        start = offset + HEAD.size
        payload = data[start : start + length]
        if length > LONGEST or len(payload) != length or zlib.crc32(payload, kind) != checksum:
            return
        offset = start + length
        yield kind, payload, offset
