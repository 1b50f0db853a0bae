# SPDX-License-Identifier: Apache-2.0
"""Runs tc programs on packets, and compares whole packets with both sides decoded."""

from __future__ import annotations

from weir.datapath import libbpf

TC_ACT_OK = 0
TC_ACT_SHOT = 2
TC_ACT_REDIRECT = 7
XDP_DROP = 1
XDP_PASS = 2
XDP_TX = 3
XDP_REDIRECT = 4
TCX_NEXT = -1


def program_run(
    program: int, packet: bytes, ifindex: int = 0, repeat: int = 1, mark: int = 0
) -> tuple[int, bytes]:
    """(return code, packet afterwards) of one run of a tc program.

    `ifindex`: the device of the current network namespace that has the packet, 0: loopback.
    The return code is signed, as tc's actions are.
    """
    result = libbpf.run_program(program, bytes(packet), ifindex=ifindex, repeat=repeat, mark=mark)
    code = result.retval - (1 << 32) if result.retval >= 1 << 31 else result.retval
    return code, result.packet


def program_time(program: int, packet: bytes, repeat: int, ifindex: int = 0) -> int:
    """Nanoseconds that one of `repeat` runs took."""
    result = libbpf.run_program(program, bytes(packet), ifindex=ifindex, repeat=repeat)
    return result.duration_ns


def assert_packet(actual: bytes, expected: bytes) -> None:
    """Compares bytes; a difference is shown as two decoded packets and the first offset."""
    actual, expected = bytes(actual), bytes(expected)
    if actual == expected:
        return
    at = next(
        (i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b),
        min(len(actual), len(expected)),
    )
    raise AssertionError(
        f"packets differ from byte {at} on ({len(actual)} bytes, expected {len(expected)})\n"
        f"--- actual\n{decoded(actual)}\n--- expected\n{decoded(expected)}"
    )


def decoded(packet: bytes) -> str:
    from scapy.layers.l2 import Ether  # noqa: PLC0415  half a second that unit tests do not need

    return f"{packet.hex(' ', 4)}\n{Ether(packet).show(dump=True)}"
