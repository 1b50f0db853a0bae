# SPDX-License-Identifier: Apache-2.0
"""Bytes of every kind of record, written out, and their way back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.objects import compile_mini

from weir.api import address
from weir.datapath import codec, loader, records
from weir.datapath.btf import Btf, BtfError, Kind
from weir.datapath.settings import Settings

V4 = address.parse("10.1.2.3")
V6 = address.parse("2001:db8::7")
V4_HEX = "00000000 00000000 0000ffff 0a010203"
V6_HEX = "20010db8 00000000 00000000 00000007"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> loader.ObjectFile:
    settings = Settings(node_ipv6=V6, overlay_mtu=1450, tunnel=True, snat_port_first=0x1234)
    (entry,) = loader.open_objects([compile_mini(tmp_path_factory.mktemp("mini"))], settings)
    return entry


def codec_of(btf: Btf, name: str, record: type[Any]) -> codec.Codec[Any]:
    number = btf.named(Kind.STRUCT, name)
    assert number is not None
    return codec.codec_for(btf, number, record)


CASES = [
    # All numbers big-endian, all little-endian, mixed, nested, with pads.
    ("service_key", records.ServiceKey(V4, 80, 6, 1), f"{V4_HEX} 0050 06 01"),
    ("service", records.Service(1, 2, 3, 10800, 5), "01000000 02000000 03000000 302a0000 05000000"),
    ("backend_key", records.BackendKey(7, 65536), "07000000 00000100"),
    ("backend", records.Backend(V6, 8080), f"{V6_HEX} 1f90 0000"),
    (
        "sock_nat_key",
        records.SockNatKey(0x0102030405060708, V4, 53, 17),
        f"0807060504030201 {V4_HEX} 0035 11 0000000000",
    ),
    ("sock_nat", records.SockNat(V4, 53, 9), f"{V4_HEX} 0035 0000 09000000"),
    ("ct_key", records.CtKey(V4, V6, 1, 2, 58), f"{V4_HEX} {V6_HEX} 0001 0002 3a 000000"),
    (
        "ct_entry",
        records.CtEntry(60, 2, records.CtFlag.SERVICE, 4, V6, 443),
        f"3c000000 02000000 20000000 04000000 {V6_HEX} 01bb 0000",
    ),
    (
        "endpoint",
        records.Endpoint(
            5,
            16,
            records.Isolation(1, 2),
            records.Isolation(3, 0x20000),
            bytes.fromhex("020000000001"),
            bytes.fromhex("0200000000ff"),
        ),
        "05000000 10000000 01000000 02000000 03000000 00000200 020000000001 0200000000ff",
    ),
    ("prefix_key", records.PrefixKey(120, V4), f"78000000 {V4_HEX}"),
    ("prefix", records.Prefix(17), "11000000"),
    ("route", records.Route(V6, records.RouteFlag.TUNNEL), f"{V6_HEX} 04000000"),
    ("policy_key", records.PolicyKey(1, 2, 8080, 6, 16), "01000000 02000000 901f 06 10"),
    ("policy_verdict", records.PolicyVerdict(258, 3, 1), "02010000 0300 01 00"),
    ("metric", records.Metric(1, 1 << 40), "0100000000000000 0000000000010000"),
]


@pytest.mark.parametrize(("name", "record", "written"), CASES, ids=[case[0] for case in CASES])
def test_bytes(opened: loader.ObjectFile, name: str, record: Any, written: str) -> None:
    made = codec_of(opened.btf, name, type(record))
    expected = bytes.fromhex(written)
    assert made.encode(record) == expected
    assert made.decode(expected) == record
    assert made.encode_all([record, record]) == expected * 2
    assert list(made.decode_all(expected * 2)) == [record, record]


def test_address_and_number_keys(opened: loader.ObjectFile) -> None:
    endpoints = codec.codec_for(opened.btf, opened.maps["endpoints"].key_type, bytes)
    assert endpoints.encode_all([V4, V6]) == V4 + V6
    assert list(endpoints.decode_all(V4 + V6)) == [V4, V6]
    runtime = codec.codec_for(opened.btf, opened.maps["runtime"].key_type, int)
    assert runtime.encode(258) == bytes.fromhex("02010000")
    assert runtime.decode(bytes.fromhex("02010000")) == 258


def test_constants_reach_the_data_section(opened: loader.ObjectFile) -> None:
    offsets = {v.name: v.offset for v in opened.btf.variables(".rodata")}

    def at(name: str, size: int) -> bytes:
        return opened.rodata[offsets[name] : offsets[name] + size]

    assert at("node_ipv4", 16) == bytes(16)
    assert at("node_ipv6", 16) == V6
    assert at("overlay_mtu", 4) == (1450).to_bytes(4, "little")
    assert at("tunnel", 1) == b"\1"
    assert at("snat_port_first", 2) == b"\x34\x12"


def test_signature_tells_layouts_of_equal_size_apart(tmp_path: Path) -> None:
    plain, other = (
        loader.open_objects([path], Settings())[0]
        for path in (compile_mini(tmp_path), compile_mini(tmp_path, OTHER_LAYOUT=1))
    )
    texts = [codec.signature(o.btf, o.maps["addresses"].value_type) for o in (plain, other)]
    assert texts == ["8[class:I@0 flags:I@4]", "8[class:H@0 zone:H@2 flags:I@4]"]


def test_what_is_no_btf_is_refused() -> None:
    with pytest.raises(BtfError):
        Btf(bytes(64))
