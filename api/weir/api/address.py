# SPDX-License-Identifier: Apache-2.0
"""Addresses and prefixes, in the one form that the wire, the maps and the programs use.

An address is 16 bytes: IPv6, or IPv4 mapped as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). Both
families then share every table and every algorithm. Text exists only at the edges.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import NewType

Addr = NewType("Addr", bytes)

V4_PREFIX = b"\0" * 10 + b"\xff\xff"
V4_BITS = 96


def parse(text: str) -> Addr:
    """The address that `text` writes. ValueError if it is none."""
    try:
        if ":" in text:
            return Addr(socket.inet_pton(socket.AF_INET6, text))
        return Addr(V4_PREFIX + socket.inet_pton(socket.AF_INET, text))
    except OSError as error:
        raise ValueError(f"{text!r} is not an IP address") from error


def text(addr: Addr) -> str:
    """The usual text of an address, for logs, the command line and JSON."""
    if is_ipv4(addr):
        return socket.inet_ntop(socket.AF_INET, addr[12:])
    return socket.inet_ntop(socket.AF_INET6, addr)


def is_ipv4(addr: Addr) -> bool:
    return addr.startswith(V4_PREFIX)


@dataclass(frozen=True, slots=True, order=True)
class Cidr:
    """A prefix. `bits` counts from the top of all 128: an IPv4 /n has 96 + n."""

    address: Addr
    bits: int

    def __post_init__(self) -> None:
        if not 0 <= self.bits <= 128 or len(self.address) != 16:
            raise ValueError(f"bad prefix: {self.address.hex()}/{self.bits}")
        if self.address != _masked(self.address, self.bits):
            raise ValueError(f"{self.text()} has host bits set")

    @property
    def is_ipv4(self) -> bool:
        return self.bits >= V4_BITS and is_ipv4(self.address)

    def text(self) -> str:
        if self.is_ipv4:
            return f"{text(self.address)}/{self.bits - V4_BITS}"
        return f"{text(self.address)}/{self.bits}"

    def contains(self, addr: Addr) -> bool:
        return _masked(addr, self.bits) == self.address

    def overlaps(self, other: Cidr) -> bool:
        short, long = (self, other) if self.bits <= other.bits else (other, self)
        return short.contains(long.address)


def cidr(addr: Addr, bits: int) -> Cidr:
    """The prefix of `bits` (of 128) that contains `addr`."""
    return Cidr(_masked(addr, bits), bits)


def parse_cidr(source: str) -> Cidr:
    """The prefix that `source` writes; host bits are cleared, as the API server allows them.

    ValueError if it is none. A bare address is a prefix of full length.
    """
    head, slash, tail = source.partition("/")
    before = 0 if ":" in head else V4_BITS
    bits = int(tail) + before if tail.isascii() and tail.isdecimal() else -1
    if not slash:
        bits = 128
    try:
        addr = parse(head)
    except ValueError as error:
        raise ValueError(f"{source!r} is not a CIDR") from error
    if not before <= bits <= 128:
        raise ValueError(f"{source!r} is not a CIDR")
    return cidr(addr, bits)


def _masked(addr: Addr, bits: int) -> Addr:
    mask = ((1 << bits) - 1) << (128 - bits)
    return Addr((int.from_bytes(addr, "big") & mask).to_bytes(16, "big"))
