# SPDX-License-Identifier: Apache-2.0
"""abi.h and the records, both ways: every struct and member, every enum and value, every map."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
from support.objects import ROOT, compile_mini, compiler_flags

from weir.datapath import codec, datapath, libbpf, loader, records
from weir.datapath.btf import Btf, Kind
from weir.datapath.errors import LayoutMismatch
from weir.datapath.settings import Settings

ABI = ROOT / "datapath" / "include" / "weir" / "abi.h"


def names(kind: str) -> list[str]:
    return re.findall(rf"^{kind} (\w+) \{{", ABI.read_text(), re.MULTILINE)


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


@pytest.fixture(scope="module")
def btf(tmp_path_factory: pytest.TempPathFactory) -> Btf:
    """BTF that has everything that abi.h declares, whether a map uses it or not."""
    folder = tmp_path_factory.mktemp("abi")
    anchors = [
        f"{kind} {name} anchor_{kind}_{name};"
        for kind in ("struct", "enum")
        for name in names(kind)
    ]
    source = folder / "abi.c"
    source.write_text("\n".join(['#include "weir/abi.h"', *anchors]))
    output = folder / "abi.o"
    subprocess.run(["clang", *compiler_flags(), "-c", source, "-o", output], check=True)
    handle = libbpf.Object("abi", output.read_bytes())
    parsed = Btf(handle.btf())
    handle.close()
    return parsed


@pytest.mark.parametrize("name", [n for n in names("struct") if n != "ip_addr"])
def test_struct_is_a_record(btf: Btf, name: str) -> None:
    number = btf.named(Kind.STRUCT, name)
    assert number is not None
    record = getattr(records, camel(name))
    assert codec.codec_for(btf, number, record).size == btf.size(number)


def test_every_record_is_a_struct() -> None:
    here = {
        name
        for name, entry in vars(records).items()
        if dataclasses.is_dataclass(entry) and entry is not records.EnumBinding
    }
    assert here == {camel(name) for name in names("struct")} - {"IpAddr"}


@pytest.mark.parametrize("binding", records.ENUMS, ids=lambda b: b.c_name)
def test_enum_values(btf: Btf, binding: records.EnumBinding) -> None:
    written = {f"{binding.prefix}{member.name}": member.value for member in binding.type}
    declared = btf.enums()[binding.c_name]
    assert written == {name: v for name, v in declared.items() if name != binding.counter}


def test_every_enum_is_bound() -> None:
    assert {binding.c_name for binding in records.ENUMS} == set(names("enum"))


def test_a_record_with_another_field_is_refused(btf: Btf) -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class Backend:
        port: int
        address: bytes

    number = btf.named(Kind.STRUCT, "backend")
    assert number is not None
    with pytest.raises(LayoutMismatch, match=r"address.*port"):
        codec.codec_for(btf, number, Backend)


def test_maps_and_settings_of_the_built_objects() -> None:
    """What the build made is what the records say: maps both ways, constants both ways."""
    objects = loader.open_objects(loader.OBJECTS.glob("*.bpf.o"), Settings())
    declared = set()
    constants = set()
    for opened in objects:
        constants |= opened.constants
        for name, entry in opened.maps.items():
            declared.add(name)
            if name == datapath.EVENTS or name in datapath.PRIVATE:
                continue
            key, value = datapath.RECORDS[name]
            assert codec.codec_for(opened.btf, entry.key_type, key).size == entry.shape.key_size
            assert (
                codec.codec_for(opened.btf, entry.value_type, value).size == entry.shape.value_size
            )
        opened.handle.close()
    assert declared - datapath.PRIVATE == {*datapath.RECORDS, datapath.EVENTS}
    assert constants == {field.name for field in dataclasses.fields(Settings)}


def test_an_object_without_a_setting_is_refused(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, slots=True)
    class More(Settings):
        unheard_of: int = 1

    with pytest.raises(LayoutMismatch, match="unheard_of"):
        loader.open_objects([compile_mini(tmp_path)], More())
