# SPDX-License-Identifier: Apache-2.0
"""Loads every program of every object with all settings on, all off, and native: `... OUTPUT`.

The verifier prunes what a constant rules out, so these ends together show it all the code.
Each object is loaded by itself: one refusal does not hide the next. Maps are small and nothing
is pinned or attached. Settings come from the dataclass, so that a new one needs no line here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from kernels.report import Load
from weir.api import address
from weir.datapath import errors, features, libbpf, loader
from weir.datapath.settings import Settings, Sizes

MAP_ENTRIES = 4096
ON: dict[str, object] = {
    "node_ipv4": address.parse("192.0.2.1"),
    "node_ipv6": address.parse("2001:db8::1"),
    "bool": True,
    "int": 1400,
}
OFF: dict[str, object] = {"Addr | None": None, "bool": False, "int": 0}


def all_on(kernel: features.Features) -> Settings:
    """What a kernel lacks stays off: the loader never turns it on there."""
    values: dict[str, object] = {}
    for field in dataclasses.fields(Settings):
        feature = field.name.removeprefix("has_")
        if feature != field.name:
            values[field.name] = getattr(kernel, feature)
        else:
            values[field.name] = ON.get(field.name, ON.get(str(field.type)))
    return Settings(**values)  # type: ignore[arg-type]  # checked by the codec of each constant


def all_off() -> Settings:
    values = {field.name: OFF[str(field.type)] for field in dataclasses.fields(Settings)}
    return Settings(**values)  # type: ignore[arg-type]  # as above


def load_object(opened: loader.ObjectFile, maps: dict[str, int], settings: str) -> list[Load]:
    for name in opened.maps:
        opened.handle.use_map(name, maps[name])
    try:
        opened.handle.load()
    except errors.DatapathError as error:
        first, *_, last = [*str(error).splitlines(), ""]
        why = f"{first} {last}".strip()
        return [Load(name, settings, 0, why) for name in opened.handle.programs()]
    found = []
    for name, fd in opened.handle.program_fds().items():
        found.append(Load(name, settings, libbpf.program_info(fd, name).verified))
        os.close(fd)
    return found


def load_all(chosen: Settings, name: str) -> list[Load]:
    objects = loader.open_objects(loader.OBJECTS.glob("*.bpf.o"), chosen)
    maps: dict[str, int] = {}
    try:
        for map_name, (_, _, wanted) in loader.wanted_maps(objects, Sizes()).items():
            entries = min(wanted.shape.max_entries, MAP_ENTRIES)
            shape = dataclasses.replace(wanted.shape, max_entries=entries)
            maps[map_name] = libbpf.create_map(map_name, shape, None, 0, 0)
        return [load for opened in objects for load in load_object(opened, maps, name)]
    finally:
        for fd in maps.values():
            os.close(fd)
        for opened in objects:
            opened.handle.close()


def main(output: Path) -> int:
    everything = all_on(features.probe())
    loads = load_all(everything, "on") + load_all(all_off(), "off")
    # With an overlay XDP leaves Services to tc.
    loads += load_all(dataclasses.replace(everything, tunnel=False), "native")
    output.write_text(json.dumps([dataclasses.asdict(load) for load in loads]))
    for load in loads:
        print(f"{load.program} {load.settings}: {load.error or load.instructions}", flush=True)
    return 1 if any(load.error for load in loads) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
