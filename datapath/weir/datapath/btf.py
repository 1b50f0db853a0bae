# SPDX-License-Identifier: Apache-2.0
"""Reads BTF, the type information in object files, into plain records.

Format: https://docs.kernel.org/bpf/btf.html. Only what user space needs to lay out map
keys, values, events and settings: no relocations, no functions.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MAGIC = 0xEB9F


class Kind(IntEnum):
    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# Kind → format of what follows the common part, once or once a member.
_ONCE = {Kind.INT: "<I", Kind.ARRAY: "<III", Kind.VAR: "<I", Kind.DECL_TAG: "<i"}
_EACH = {
    Kind.STRUCT: "<III",
    Kind.UNION: "<III",
    Kind.ENUM: "<Ii",
    Kind.FUNC_PROTO: "<II",
    Kind.DATASEC: "<III",
    Kind.ENUM64: "<III",
}
_QUALIFIERS = {Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG}


@dataclass(frozen=True, slots=True)
class Member:
    """Of a struct or data section (`offset` in bytes) or an enum (`value`)."""

    name: str
    type: int = 0
    offset: int = 0
    value: int = 0


@dataclass(frozen=True, slots=True)
class Type:
    """`target` is the type referred to, `count` an array's length, `size` in bytes."""

    kind: Kind
    name: str
    size: int = 0
    target: int = 0
    count: int = 0
    signed: bool = False
    members: tuple[Member, ...] = ()


class BtfError(ValueError):
    """The bytes are not BTF as we know it."""


class Btf:
    """The types of one object, by id."""

    def __init__(self, data: bytes) -> None:
        magic, _version, _flags, header, type_at, type_len, str_at, str_len = _HEADER.unpack_from(
            data
        )
        if magic != _MAGIC:
            raise BtfError(f"magic {magic:#x} instead of {_MAGIC:#x}")
        self._strings = data[header + str_at : header + str_at + str_len]
        self.types: list[Type] = [Type(Kind.VOID, "")]
        at, end = header + type_at, header + type_at + type_len
        while at < end:
            entry, at = self._parse(data, at)
            self.types.append(entry)

    def _name(self, at: int) -> str:
        return self._strings[at : self._strings.index(b"\0", at)].decode()

    def _parse(self, data: bytes, at: int) -> tuple[Type, int]:
        name_at, info, size = _TYPE.unpack_from(data, at)
        at += _TYPE.size
        kind, length, name = Kind(info >> 24 & 0x1F), info & 0xFFFF, self._name(name_at)
        if kind in _ONCE:
            values = struct.unpack_from(_ONCE[kind], data, at)
            at += struct.calcsize(_ONCE[kind])
            if kind is Kind.ARRAY:
                return Type(kind, name, target=values[0], count=values[2]), at
            if kind is Kind.INT:
                return Type(kind, name, size, signed=bool(values[0] >> 24 & 1)), at
            return Type(kind, name, target=size), at
        if kind not in _EACH:
            return Type(kind, name, size if kind is Kind.FLOAT else 0, size), at
        form = struct.Struct(_EACH[kind])
        rows = [form.unpack_from(data, at + form.size * i) for i in range(length)]
        members = tuple(self._member(kind, row) for row in rows)
        return Type(kind, name, size, members=members), at + form.size * length

    def _member(self, kind: Kind, row: tuple[int, ...]) -> Member:
        if kind is Kind.DATASEC:
            return Member("", row[0], row[1])
        name = self._name(row[0])
        if kind is Kind.ENUM:
            return Member(name, value=row[1])
        if kind is Kind.ENUM64:
            return Member(name, value=row[1] | row[2] << 32)
        if kind is Kind.FUNC_PROTO:
            return Member(name, row[1])
        # Bit offsets; the contract forbids bitfields, so they are whole bytes.
        return Member(name, row[1], (row[2] & 0xFFFFFF) // 8)

    def plain(self, number: int) -> int:
        """The type without const, volatile and the like; typedefs stay."""
        while self.types[number].kind in _QUALIFIERS:
            number = self.types[number].target
        return number

    def resolve(self, number: int) -> Type:
        """The type behind all typedefs and qualifiers."""
        entry = self.types[self.plain(number)]
        while entry.kind is Kind.TYPEDEF:
            entry = self.types[self.plain(entry.target)]
        return entry

    def size(self, number: int) -> int:
        entry = self.resolve(number)
        if entry.kind is Kind.ARRAY:
            return entry.count * self.size(entry.target)
        return 8 if entry.kind is Kind.PTR else entry.size

    def named(self, kind: Kind, name: str) -> int | None:
        """The id of the first type of that kind and name."""
        for number, entry in enumerate(self.types):
            if entry.kind is kind and entry.name == name:
                return number
        return None

    def enums(self) -> dict[str, dict[str, int]]:
        """Enum name → its members."""
        return {
            entry.name: {member.name: member.value for member in entry.members}
            for entry in self.types
            if entry.kind in {Kind.ENUM, Kind.ENUM64} and entry.name
        }

    def variables(self, section: str) -> tuple[Member, ...]:
        """The global variables of a data section; `type` is that of the value."""
        number = self.named(Kind.DATASEC, section)
        if number is None:
            return ()
        return tuple(
            Member(self.types[m.type].name, self.types[m.type].target, m.offset)
            for m in self.types[number].members
        )
