# SPDX-License-Identifier: Apache-2.0
"""Bytes of the maps ↔ records, laid out as the BTF of the loaded objects says.

Speed matters, as a node's tables have hundreds of thousands of entries: a record is taken
apart by one attrgetter and packed by one precompiled Struct. A Struct has one byte order,
so members of the other one (__be16 among host order fields) are swapped on their own.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar, get_type_hints

from weir.datapath.btf import Btf, Kind, Type
from weir.datapath.errors import LayoutMismatch

R = TypeVar("R")
Values = tuple[Any, ...]

_BIG = {"__be16", "__be32", "__be64"}
_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}
_ADDRESS = "ip_addr"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A scalar, address or byte string at a place in a struct."""

    path: str
    offset: int
    form: str
    size: int
    big: bool


class Codec(Protocol[R]):
    """One type of map keys, values or records."""

    size: int

    @property
    def leaves(self) -> Sequence[Leaf]: ...
    def encode(self, item: R) -> bytes: ...
    def encode_all(self, items: Iterable[R]) -> bytes: ...
    def decode(self, data: bytes) -> R: ...
    def decode_all(self, data: bytes) -> Iterator[R]: ...


def leaves(btf: Btf, number: int, path: str = "", offset: int = 0) -> list[Leaf]:
    """The members of a type in order, nested ones by dotted path, pads left out."""
    named = btf.types[btf.plain(number)]
    entry = btf.resolve(number)
    size = btf.size(number)
    if entry.kind is Kind.STRUCT and entry.name != _ADDRESS:
        found: list[Leaf] = []
        for member in entry.members:
            if not member.name.startswith("pad"):
                name = f"{path}.{member.name}" if path else member.name
                found += leaves(btf, member.type, name, offset + member.offset)
        return found
    if entry.kind is Kind.STRUCT or _is_plain_array(btf, entry):
        return [Leaf(path, offset, f"{size}s", size, big=False)]
    if entry.kind in {Kind.INT, Kind.ENUM}:
        form = _UNSIGNED[size].lower() if entry.signed else _UNSIGNED[size]
        return [Leaf(path, offset, form, size, big=named.name in _BIG)]
    raise LayoutMismatch("lay out", path or entry.name, 0, f"{entry.kind.name} is not supported")


def _is_plain_array(btf: Btf, entry: Type) -> bool:
    """Such a member is bytes here, whatever its numbers are to the programs."""
    return entry.kind is Kind.ARRAY and btf.resolve(entry.target).kind is Kind.INT


def signature(btf: Btf, number: int) -> str:
    """The layout in one line, equal for equal layouts: kept beside pinned maps."""
    if not number:
        return ""
    parts = (f"{x.path}:{'>' if x.big else ''}{x.form}@{x.offset}" for x in leaves(btf, number))
    return f"{btf.size(number)}[{' '.join(parts)}]"


def layout_of(found: list[Leaf], size: int, order: str) -> str:
    form, at = [order], 0
    for leaf in found:
        form.append(f"{leaf.offset - at}x" if leaf.offset > at else "")
        form.append(leaf.form)
        at = leaf.offset + leaf.size
    form.append(f"{size - at}x" if size > at else "")
    return "".join(form)


def _swapper(leaf: Leaf) -> Callable[[int], int]:
    size = leaf.size
    return lambda value: int.from_bytes(value.to_bytes(size, "big"), "little")


class Scalar:
    """Addresses and byte strings as they are (`form` "16s"), or single numbers ("I")."""

    def __init__(self, btf: Btf, number: int) -> None:
        (leaf,) = self.leaves = leaves(btf, number)
        order = ">" if leaf.big else "<"
        self._struct = struct.Struct(order + leaf.form)
        self.size = self._struct.size

    def encode(self, item: Any) -> bytes:
        return self._struct.pack(item)

    def encode_all(self, items: Iterable[Any]) -> bytes:
        return b"".join(map(self._struct.pack, items))

    def decode(self, data: bytes) -> Any:
        return self._struct.unpack(data)[0]

    def decode_all(self, data: bytes) -> Iterator[Any]:
        return (row[0] for row in self._struct.iter_unpack(data))


class Record(Generic[R]):
    """A struct as a dataclass whose fields are the struct's members, in order."""

    def __init__(self, btf: Btf, number: int, record: type[R]) -> None:
        found = self.leaves = leaves(btf, number)
        paths = [leaf.path for leaf in found]
        self._build, expected = _builder(record)
        if paths != [path.rstrip("_") for path in expected]:
            raise LayoutMismatch(
                "match", record.__name__, 0, f"fields {expected}, members in BTF {paths}"
            )
        numbers = [leaf for leaf in found if leaf.size > 1 and not leaf.form.endswith("s")]
        all_big = bool(numbers) and all(leaf.big for leaf in numbers)
        self.size = btf.size(number)
        self._struct = struct.Struct(layout_of(found, self.size, ">" if all_big else "<"))
        self._swaps = tuple(
            (at, _swapper(leaf)) for at, leaf in enumerate(found) if leaf.big and not all_big
        )
        # With one path, attrgetter gives the value itself instead of a tuple.
        getter = attrgetter(*expected)
        self._split: Callable[[R], Values] = (
            getter if len(expected) > 1 else lambda item: (getter(item),)
        )

    def _swap(self, values: Values) -> Values:
        swapped = list(values)
        for at, swap in self._swaps:
            swapped[at] = swap(swapped[at])
        return tuple(swapped)

    def encode(self, item: R) -> bytes:
        values = self._split(item)
        return self._struct.pack(*(self._swap(values) if self._swaps else values))

    def encode_all(self, items: Iterable[R]) -> bytes:
        if self._swaps:
            return b"".join(map(self.encode, items))
        pack, split = self._struct.pack, self._split
        return b"".join([pack(*split(item)) for item in items])

    def decode(self, data: bytes) -> R:
        values = self._struct.unpack(data)
        return self._build(self._swap(values) if self._swaps else values)

    def decode_all(self, data: bytes) -> Iterator[R]:
        rows: Iterable[Values] = self._struct.iter_unpack(data)
        if self._swaps:
            rows = map(self._swap, rows)
        return map(self._build, rows)


def _builder(record: type[R]) -> tuple[Callable[[Values], R], list[str]]:
    """What makes a record from its leaves' values, and the paths of its leaves."""
    hints = get_type_hints(record)
    paths: list[str] = []
    nested: list[tuple[int, int, Callable[[Values], Any] | None]] = []
    for field in dataclasses.fields(record):  # type: ignore[arg-type]  # R is a dataclass
        kind, first = hints[field.name], len(paths)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            build, inner = _builder(kind)
            paths += [f"{field.name}.{name}" for name in inner]
            nested.append((first, len(paths), build))
        else:
            paths.append(field.name)
            nested.append((first, first + 1, None))
    if all(build is None for _, _, build in nested):
        return lambda values: record(*values), paths

    def assemble(values: Values) -> R:
        parts = (build(values[a:b]) if build else values[a] for a, b, build in nested)
        return record(*parts)

    return assemble, paths


def codec_for(btf: Btf, number: int, record: type[Any]) -> Codec[Any]:
    """The codec of a BTF type for a record, or for a plain address or number."""
    if sys.byteorder != "little":
        raise LayoutMismatch("lay out", record.__name__, 0, "big-endian hosts are not supported")
    if dataclasses.is_dataclass(record):
        return Record(btf, number, record)
    return Scalar(btf, number)
