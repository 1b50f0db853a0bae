# SPDX-License-Identifier: Apache-2.0
"""Decides what becomes of pinned maps when new objects come, and moves their entries.

`plan` is pure: desired maps and what is pinned in, one action a map out. A map is adopted,
created, resized, or converted by a registered migration; anything else is refused, as an
emptied map would cut connections and policies in silence.

Resizing is make before break: the successor is pinned as NAME~new and filled, programs
that use it replace the old ones link by link, a last copy brings what the old programs
still wrote, and a rename makes it NAME. A crash at any point leaves either NAME alone or
both, and the next start goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum

from weir.datapath import libbpf
from weir.datapath.errors import DatapathError, LayoutChanged
from weir.datapath.libbpf import MapShape, MapType

Convert = Callable[[bytes, bytes], tuple[bytes, bytes] | None]
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Desired:
    """A map as the objects and the settings want it. `layout` is the codec's signature."""

    shape: MapShape
    layout: str


@dataclass(frozen=True, slots=True)
class Pinned:
    """A pinned map and its successor, if a migration was under way.

    `layouts` are the hashes noted beside it: none if we stopped before the note was made,
    two if we stopped while the successor took its place.
    """

    shape: MapShape
    layouts: frozenset[str]
    successor: MapShape | None = None

    def layout(self, wanted: str) -> str | None:
        """Which of them the map under the plain name has; `wanted` is the successor's."""
        others = self.layouts - {wanted}
        if wanted in self.layouts and (self.successor is None or not others):
            return wanted
        return min(others, default=None)


@dataclass(frozen=True, slots=True)
class Migration:
    """Turns the entries of the map `source` with this layout into those of `target`, which
    may have the same name. `convert` gives None for an entry to leave out."""

    source: str
    layout: str
    target: str
    convert: Convert


def longer(zeros: int) -> Convert:
    """Values that gained members at their end, which begin as zero."""
    return lambda key, value: (key, value + bytes(zeros))


def masqueraded(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    """Ports of flows whose state was not kept: as if both ends had talked for long, so that none
    is given away under a flow that lives."""
    replied_stream = b"\3"
    return key, value[:18] + replied_stream + value[19:]


def unordered(key: bytes, value: bytes) -> tuple[bytes, bytes]:
    """Rows of NetworkPolicies, before others had an order: ORDER_NETWORK_POLICY."""
    return key, value[:4] + b"\x00\x80" + value[4:5] + b"\0"


MIGRATIONS: tuple[Migration, ...] = (
    # Before ports of the node's address had a state.
    Migration("snat", "59fe2671e383757d", "snat", masqueraded),
    # Before services had an identity, and runtime its features.
    Migration("services", "72e857f7cdabe6c6", "services", longer(4)),
    Migration("runtime", "01e3d5c287942f89", "runtime", longer(8)),
    # Before ClusterNetworkPolicies.
    Migration("policy", "19ea2d1e26e2cd07", "policy", unordered),
)


class Step(Enum):
    CREATE = "create"
    ADOPT = "adopt"
    REPLACE = "replace"
    RESUME = "resume"


@dataclass(frozen=True, slots=True)
class Action:
    """What to do for the map `name`, and how entries of its predecessor are converted."""

    name: str
    step: Step
    migration: Migration | None = None


def plan(
    desired: Mapping[str, Desired],
    pinned: Mapping[str, Pinned],
    migrations: Iterable[Migration] = MIGRATIONS,
) -> list[Action]:
    """One action for each desired map. LayoutChanged when there is no way to keep entries."""
    return [_action(name, want, pinned, list(migrations)) for name, want in desired.items()]


def _action(
    name: str, want: Desired, pinned: Mapping[str, Pinned], migrations: list[Migration]
) -> Action:
    known = [
        m
        for m in migrations
        if m.target == name
        and (old := pinned.get(m.source)) is not None
        and old.layout(want.layout) == m.layout
    ]
    # A renamed map, whose predecessor is still there (perhaps because we stopped half-way).
    renamed = next((m for m in known if m.source != name), None)
    have = pinned.get(name)
    if have is None:
        return Action(name, Step.CREATE, renamed)
    replacing = Step.RESUME if have.successor == want.shape else Step.REPLACE
    if same_layout(want, have):
        if have.successor is None and have.shape == want.shape:
            return Action(name, Step.ADOPT, renamed)
        return Action(name, replacing)
    converted = next((m for m in known if m.source == name), None)
    if converted is None:
        raise LayoutChanged(
            "adopt map",
            name,
            0,
            f"pinned: {have.shape}, layout {have.layout(want.layout)}; wanted: {want.shape},"
            f" layout {want.layout}; no migration is known, so nothing was changed",
        )
    return Action(name, replacing, converted)


def same_layout(want: Desired, have: Pinned) -> bool:
    """Whether only the size may differ. An unknown layout counts as equal if all sizes are."""
    unsized = replace(have.shape, max_entries=want.shape.max_entries)
    return unsized == want.shape and have.layout(want.layout) in {None, want.layout}


def copy_entries(
    source: int, target: int, name: str, convert: Convert | None = None, flags: int = 0
) -> int:
    """Copies all entries between two maps; returns how many. Those of a ring buffer stay."""
    old = libbpf.map_info(source, name).shape
    new = libbpf.map_info(target, name).shape
    if old.type == MapType.RINGBUF:
        return 0
    copied = 0
    value_size = _copied_size(old)
    for keys, values in libbpf.walk(source, old.key_size, value_size, min(CHUNK, old.max_entries)):
        chunk = keys, values
        if convert:
            chunk = _converted(chunk, old.key_size, value_size, convert)
        done, number = libbpf.update(
            target, chunk[0], new.key_size, chunk[1], _copied_size(new), flags
        )
        copied += done
        if number:
            hint = f"{copied} entries copied; the new size is {new.max_entries}"
            raise DatapathError("migrate", name, number, hint)
    return copied


def _copied_size(shape: MapShape) -> int:
    if MapType(shape.type).per_cpu:
        return -(-shape.value_size // 8) * 8 * libbpf.possible_cpus()
    return shape.value_size


def _converted(
    chunk: tuple[bytes, bytes], key_size: int, value_size: int, convert: Convert
) -> tuple[bytes, bytes]:
    keys, values = chunk
    rows = (
        convert(
            keys[i * key_size : (i + 1) * key_size], values[i * value_size : (i + 1) * value_size]
        )
        for i in range(len(keys) // key_size)
    )
    kept = [row for row in rows if row is not None]
    return b"".join(key for key, _ in kept), b"".join(value for _, value in kept)
