# SPDX-License-Identifier: Apache-2.0
"""SCTP packets with a checksum worked out here, by its definition and not by the datapath's way.

CRC32c as RFC 3720 and RFC 9260 define it: polynomial 0x1EDC6F41, bits of each byte lowest
first, started with ones, complemented at the end, stored lowest byte first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from typing import Self

PROTOCOL = 132
HEADER = 12
POLYNOMIAL = 0x1EDC6F41

DATA, INIT, INIT_ACK, HEARTBEAT, ABORT = 0, 1, 2, 4, 6
SHUTDOWN, SHUTDOWN_ACK, COOKIE_ECHO, SHUTDOWN_COMPLETE = 7, 8, 10, 14


def _mirrored(value: int, bits: int) -> int:
    return int(f"{value:0{bits}b}"[::-1], 2)


def _remainder(byte: int) -> int:
    """Of the byte's bits, lowest first, times x^32; the result mirrored likewise."""
    register = _mirrored(byte, 8) << 24
    for _ in range(8):
        register = (register << 1) ^ (POLYNOMIAL if register >> 31 else 0)
        register &= 0xFFFFFFFF
    return _mirrored(register, 32)


REMAINDERS = tuple(_remainder(byte) for byte in range(256))


def crc32c(data: bytes) -> int:
    register = 0xFFFFFFFF
    for byte in data:
        register = (register >> 8) ^ REMAINDERS[(register ^ byte) & 0xFF]
    return register ^ 0xFFFFFFFF


def chunk(kind: int, value: bytes = b"", flags: int = 0) -> bytes:
    padding = bytes(-len(value) % 4)
    return struct.pack("!BBH", kind, flags, 4 + len(value)) + value + padding


def init(tag: int = 0x01020304, kind: int = INIT) -> bytes:
    return chunk(kind, struct.pack("!IIHHI", tag, 65536, 10, 10, 1))


@dataclass(frozen=True, slots=True)
class Sctp:
    """A packet; `checksum` None: the right one."""

    sport: int
    dport: int
    chunks: bytes = b""
    tag: int = 0x0A0B0C0D
    checksum: bytes | None = None

    def __bytes__(self) -> bytes:
        ports_and_tag = struct.pack("!HHI", self.sport, self.dport, self.tag)
        checksum = self.checksum
        if checksum is None:
            plain = ports_and_tag + bytes(4) + self.chunks
            checksum = crc32c(plain).to_bytes(4, "little")
        return ports_and_tag + checksum + self.chunks

    def but(self, sport: int | None = None, dport: int | None = None) -> Self:
        """With other ports, and the checksum that belongs to them (or the one given)."""
        return replace(self, sport=sport or self.sport, dport=dport or self.dport)
