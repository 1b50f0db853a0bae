# SPDX-License-Identifier: Apache-2.0
"""Brings object files into the kernel: maps adopted or made, programs found or loaded.

Loading is level-triggered: the pins are read back and only what differs is written, so a
restart with the same objects, settings and sizes writes nothing. Programs are known by a
hash over the object's bytes, its constants and the ids of the maps it uses.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from weir.datapath import codec, libbpf, migrate, pins, settings
from weir.datapath.btf import Btf
from weir.datapath.errors import LayoutMismatch
from weir.datapath.libbpf import MapDefinition, MapShape
from weir.datapath.migrate import Action, Desired, Migration, Pinned, Step
from weir.datapath.settings import Settings, Sizes

logger = logging.getLogger(__name__)

OBJECTS = Path(__file__).with_name("objects")


@dataclass(slots=True)
class ObjectFile:
    """An opened object, with the constants set."""

    name: str
    data: bytes
    handle: libbpf.Object
    btf: Btf
    rodata: bytes
    maps: dict[str, MapDefinition]
    constants: set[str]


@dataclass(slots=True)
class Loaded:
    """Descriptors of all maps and programs in use; `attach_types` as sections imply."""

    maps: dict[str, int] = field(default_factory=dict)
    definitions: dict[str, tuple[Btf, MapDefinition]] = field(default_factory=dict)
    programs: dict[str, int] = field(default_factory=dict)
    program_ids: dict[str, int] = field(default_factory=dict)
    attach_types: dict[str, int] = field(default_factory=dict)
    btfs: list[Btf] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    migrating: list[tuple[Action, str]] = field(default_factory=list)

    def forget_types(self) -> None:
        """Once codecs are made of them: a megabyte in a process that runs on every node."""
        self.btfs.clear()
        self.definitions.clear()

    def close(self) -> None:
        pins.close_all(self.maps)
        pins.close_all(self.programs)


def open_objects(paths: Iterable[Path], chosen: Settings) -> list[ObjectFile]:
    """Opens object files (no privilege needed) and sets their constants."""
    opened = []
    for path in sorted(paths):
        name, data = path.name.split(".")[0], path.read_bytes()
        handle = libbpf.Object(name, data)
        btf = Btf(handle.btf())
        rodata = handle.rodata()
        known = settings.apply(btf, rodata, chosen)
        handle.set_rodata(rodata)
        maps = {entry.name: entry for entry in handle.maps()}
        opened.append(ObjectFile(name, data, handle, btf, bytes(rodata), maps, known))
    if not opened:
        raise LayoutMismatch("open", "objects", 0, "there are none: the build is incomplete")
    missing = settings.constants(chosen).keys() - set().union(*(o.constants for o in opened))
    if missing:
        raise LayoutMismatch("set", ", ".join(sorted(missing)), 0, "no object has such a constant")
    return opened


def wanted_maps(
    objects: Iterable[ObjectFile], sizes: Sizes
) -> dict[str, tuple[ObjectFile, MapDefinition, Desired]]:
    """Every map of the objects once; LayoutMismatch when two objects disagree."""
    found: dict[str, tuple[ObjectFile, MapDefinition, Desired]] = {}
    for opened in objects:
        for name, entry in opened.maps.items():
            shape = replace(entry.shape, max_entries=sizes.of(name) or entry.shape.max_entries)
            layout = _layout(opened.btf, entry)
            if name not in found:
                found[name] = opened, entry, Desired(shape, layout)
            elif found[name][2] != Desired(shape, layout):
                raise LayoutMismatch(
                    "share map", name, 0, f"{found[name][0].name} and {opened.name} differ"
                )
    return found


def _layout(btf: Btf, entry: MapDefinition) -> str:
    text = " -> ".join(codec.signature(btf, n) for n in (entry.key_type, entry.value_type))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def pinned_maps(tree: pins.Pins) -> dict[str, Pinned]:
    shapes = {name: _pinned_shape(path) for name, path in pins.files(tree.maps).items()}
    return {
        name: Pinned(shape, frozenset(pins.layouts(tree, name)), shapes.get(name + pins.NEW))
        for name, shape in shapes.items()
        if not name.endswith(pins.NEW)
    }


def _pinned_shape(path: Path) -> MapShape:
    fd = libbpf.get_pinned(path)
    if fd is None:
        raise LayoutMismatch("open pin", str(path), 0, "vanished")
    try:
        return libbpf.map_info(fd, path.name).shape
    finally:
        os.close(fd)


def load(
    tree: pins.Pins,
    objects: list[ObjectFile],
    sizes: Sizes,
    migrations: Iterable[Migration] = migrate.MIGRATIONS,
) -> Loaded:
    """All maps and programs in the kernel and pinned. The caller moves the links to them,
    then calls `finish`."""
    wanted = wanted_maps(objects, sizes)
    plan = migrate.plan(
        {name: want for name, (_, _, want) in wanted.items()}, pinned_maps(tree), migrations
    )
    result = Loaded(btfs=[o.btf for o in objects])
    btf_fds: dict[str, int] = {}
    try:
        for action in plan:
            opened, entry, want = wanted[action.name]
            result.maps[action.name] = _open_map(tree, action, opened, entry, want, btf_fds)
            result.definitions[action.name] = opened.btf, entry
            if action.step in {Step.REPLACE, Step.RESUME} or action.migration:
                result.migrating.append((action, want.layout))
        for action, _ in result.migrating:
            if action.step is not Step.REPLACE:
                _copy_again(tree, action, result.maps[action.name])
        for opened in objects:
            _load_programs(tree, opened, result)
    except BaseException:
        result.close()
        raise
    finally:
        pins.close_all(btf_fds)
    return result


def _open_map(
    tree: pins.Pins,
    action: Action,
    opened: ObjectFile,
    entry: MapDefinition,
    want: Desired,
    btf_fds: dict[str, int],
) -> int:
    path, successor = tree.map(action.name), tree.successor(action.name)
    if action.step in {Step.ADOPT, Step.RESUME}:
        return pins.must_get(path if action.step is Step.ADOPT else successor)
    if opened.name not in btf_fds and (btf_fd := opened.handle.load_btf()) is not None:
        btf_fds[opened.name] = btf_fd
    fd = libbpf.create_map(
        action.name, want.shape, btf_fds.get(opened.name), entry.key_type, entry.value_type
    )
    try:
        _check_shape(fd, action.name, want.shape)
        if action.step is Step.CREATE:
            libbpf.pin(fd, path)
            pins.note_layout(tree, action.name, want.layout)
        else:
            _fill(tree, action, want, fd)
            pins.pin_over(fd, successor)
    except BaseException:
        os.close(fd)
        raise
    logger.info("map %s: %s, %d entries", action.name, action.step.value, want.shape.max_entries)
    return fd


def _check_shape(fd: int, name: str, wanted: MapShape) -> None:
    """A kernel that changed what we ask for would make each restart a migration."""
    actual = libbpf.map_info(fd, name).shape
    if actual != wanted:
        raise LayoutMismatch("create map", name, 0, f"asked for {wanted}, got {actual}")


def _fill(tree: pins.Pins, action: Action, want: Desired, fd: int) -> None:
    """Fills a fresh successor: from the map in use, then from an earlier successor that a
    change of mind left behind, as programs may already write to it."""
    convert = action.migration.convert if action.migration else None
    with pins.opened(tree.map(action.name)) as source:
        count = migrate.copy_entries(source, fd, action.name, convert)
    logger.info("map %s: %d entries copied to its successor", action.name, count)
    if tree.successor(action.name).exists():
        with pins.opened(tree.successor(action.name)) as earlier:
            shape = libbpf.map_info(earlier, action.name).shape
            if replace(shape, max_entries=want.shape.max_entries) == want.shape:
                migrate.copy_entries(earlier, fd, action.name)


def _copy_again(tree: pins.Pins, action: Action, fd: int) -> None:
    """Brings over what the predecessor has and the successor has not."""
    name = action.migration.source if action.migration else action.name
    convert = action.migration.convert if action.migration else None
    with pins.opened(tree.map(name)) as source:
        migrate.copy_entries(source, fd, action.name, convert, libbpf.BPF_NOEXIST)


def identity(opened: ObjectFile, map_ids: Mapping[str, int]) -> str:
    """Equal exactly if loading the object again would give the same programs."""
    digest = hashlib.sha256(opened.data)
    digest.update(opened.rodata)
    digest.update(repr(sorted((name, map_ids[name]) for name in opened.maps)).encode())
    return digest.hexdigest()[:16]


def _load_programs(tree: pins.Pins, opened: ObjectFile, result: Loaded) -> None:
    map_ids = {name: libbpf.map_info(result.maps[name], name).id for name in opened.maps}
    folder = tree.programs / f"{opened.name}~{identity(opened, map_ids)}"
    attach_types = opened.handle.programs()
    result.attach_types.update(attach_types)
    result.folders.add(folder.name)
    if pins.files(folder).keys() == attach_types.keys():
        found = {name: pins.must_get(path) for name, path in pins.files(folder).items()}
    else:
        for name in opened.maps:
            opened.handle.use_map(name, result.maps[name])
        opened.handle.load()
        found = opened.handle.program_fds()
        result.programs.update(found)
        # What is there was left half-done: pins of one object come all or not at all.
        pins.remove_tree(folder)
        pins.make_folder(folder)
        for name, fd in found.items():
            libbpf.pin(fd, folder / name)
        logger.info("loaded %s as %s", ", ".join(sorted(found)), folder.name)
    result.programs.update(found)
    for name, fd in found.items():
        result.program_ids[name] = libbpf.program_info(fd, name).id


def finish(tree: pins.Pins, result: Loaded) -> None:
    """Ends what `load` began, once no link runs an old program any more."""
    for action, layout in result.migrating:
        _copy_again(tree, action, result.maps[action.name])
        if action.step in {Step.REPLACE, Step.RESUME}:
            pins.note_layout(tree, action.name, layout)
            tree.successor(action.name).rename(tree.map(action.name))
        pins.forget_layouts(tree, action.name, keep=layout)
        if action.migration and action.migration.source != action.name:
            tree.map(action.migration.source).unlink(missing_ok=True)
            pins.forget_layouts(tree, action.migration.source, keep="")
        logger.info("map %s: migrated", action.name)
    result.migrating.clear()
    for name, path in pins.files(tree.maps).items():
        if "~" in name:
            path.unlink()  # of a start that was stopped between pin and rename
    for name, entry in result.definitions.items():
        if not any(pins.layouts(tree, name)):
            pins.note_layout(tree, name, _layout(*entry))
    for folder in pins.folders(tree.programs):
        if folder.name not in result.folders:
            pins.remove_tree(folder)
