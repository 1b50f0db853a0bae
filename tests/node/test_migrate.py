# SPDX-License-Identifier: Apache-2.0
"""Maps change size with their entries kept, wherever it is interrupted."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from node.conftest import Compile, Installation
from support.timing import SCALE

from weir.api import address
from weir.datapath import libbpf, loader, pins
from weir.datapath.datapath import Datapath
from weir.datapath.errors import DatapathError
from weir.datapath.libbpf import MapShape, MapType
from weir.datapath.migrate import Migration
from weir.datapath.records import (
    Address,
    CtEntry,
    CtKey,
    PolicyKey,
    PolicyOrder,
    PolicyVerdict,
    Prefix,
    PrefixKey,
    Runtime,
    Service,
    ServiceKey,
    SnatEntry,
    SnatKey,
    SnatKind,
    Verdict,
)
from weir.datapath.settings import Settings, Sizes

pytestmark = pytest.mark.core

A = address.parse("10.0.0.1")
B = address.parse("2001:db8::1")
BIGGER = Sizes(services=9000, prefixes=200_000, ct=9000, events=524_288)
SERVICES = {ServiceKey(A, port, 6, 0): Service(port, 1, 0, 0) for port in range(1, 3001)}
FLOWS = {CtKey(A, B, port, 80, 6): CtEntry(port, 1, 1, 0, A, 0) for port in range(1, 1001)}
PREFIXES = {
    PrefixKey(128, address.parse(f"10.1.{n // 250}.{n % 250}")): Prefix(n) for n in range(500)
}


def fill(datapath: Datapath) -> None:
    datapath.tables.services.update(SERVICES)
    datapath.tables.ct.update(FLOWS)
    datapath.tables.prefixes.update(PREFIXES)


def assert_complete(datapath: Datapath, root: Path) -> None:
    assert dict(datapath.tables.services.items()) == SERVICES
    assert dict(datapath.tables.ct.items()) == FLOWS
    assert dict(datapath.tables.prefixes.items()) == PREFIXES
    assert not [path for path in (root / "maps").iterdir() if "~" in path.name]
    assert len(list((root / "progs").iterdir())) == 1


def assert_programs_use(datapath: Datapath, root: Path) -> None:
    """The program that runs counts into the map that is pinned."""
    before = sum(row.packets for _, row in datapath.tables.metrics.items())
    libbpf.run_program(datapath.programs["from_pod"], bytes(64))
    assert sum(row.packets for _, row in datapath.tables.metrics.items()) == before + 1


def test_a_new_size_keeps_the_entries(installation: Installation) -> None:
    fill(installation.open())
    datapath = installation.open(sizes=BIGGER)
    assert datapath.tables.services.max_entries == 9000
    assert datapath.tables.ct.max_entries == 9000
    assert_complete(datapath, installation.root)
    # And back again.
    datapath = installation.open()
    assert datapath.tables.services.max_entries == 4096
    assert_complete(datapath, installation.root)


def test_too_small_is_refused_and_nothing_changes(installation: Installation) -> None:
    fill(installation.open())
    with pytest.raises(DatapathError, match=r"migrate services.*the new size is 2000"):
        installation.open(sizes=Sizes(services=2000))
    assert_complete(installation.open(), installation.root)


class Stopped(BaseException):
    """The process ends here: no handler may go on."""


STEPS: list[tuple[Any, str]] = [
    (libbpf, "create_map"),
    (libbpf, "pin"),
    (libbpf, "update_link"),
    (libbpf, "update"),
    (libbpf.Object, "load"),
    (Path, "rename"),
    (Path, "unlink"),
    (Path, "mkdir"),
    (Path, "rmdir"),
]


class Stopper:
    """Lets the first `survive` steps that change something happen, and stops at the next."""

    def __init__(self, survive: int) -> None:
        self.left = survive

    def wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if self.left == 0:
                raise Stopped
            self.left -= 1
            return real(*args, **kwargs)

        return step


@pytest.mark.parametrize("then", [BIGGER, None], ids=["goes on", "goes back"])
def test_stopped_anywhere_the_next_start_completes(
    installation: Installation, then: Sizes | None
) -> None:
    survived = 0
    while True:
        fill(installation.open())
        stopper = Stopper(survived)
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(owner, name, stopper.wrap(getattr(owner, name)))
            try:
                installation.open(sizes=BIGGER)
                finished = True
            except Stopped:
                finished = False
        datapath = installation.open(sizes=then)
        expected = 9000 if then else 4096
        assert datapath.tables.services.max_entries == expected, f"after {survived} steps"
        assert_complete(datapath, installation.root)
        assert_programs_use(datapath, installation.root)
        installation.close()
        Datapath.remove(installation.root)
        if finished:
            break
        survived += 1 if SCALE == 1 else 5
    print(f"stopped at each of {survived} steps")
    assert survived > 20


def test_what_old_programs_wrote_meanwhile_comes_along(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that appears in the old map after the copy, before the links are swapped."""
    datapath = installation.open()
    fill(datapath)
    late = CtKey(A, B, 5000, 80, 6)
    real = libbpf.Object.load

    def load_later(self: libbpf.Object) -> None:
        datapath.tables.ct.update({late: CtEntry(1, 1, 1, 0, A, 0)})
        real(self)

    # Another descriptor of the old map, as the old programs have one.
    datapath.tables.ct.fd = os.dup(datapath.tables.ct.fd)
    monkeypatch.setattr(libbpf.Object, "load", load_later)
    after = installation.open(sizes=BIGGER)
    os.close(datapath.tables.ct.fd)
    assert after.tables.ct.get(late) is not None


def count(path: Path) -> int:
    with pins.opened(path) as fd:
        shape = libbpf.map_info(fd).shape
        chunks = libbpf.walk(fd, shape.key_size, shape.value_size, 4096)
        return sum(len(keys) // shape.key_size for keys, _ in chunks)


def test_programs_never_see_an_empty_map(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Make before break: the successor is full when the first link gets a new program."""
    fill(installation.open())
    real = libbpf.update_link
    seen = []

    def look_first(link: int, program: int, name: str) -> None:
        seen.append(count(installation.root / "maps" / "services~new"))
        real(link, program, name)

    monkeypatch.setattr(libbpf, "update_link", look_first)
    installation.open(sizes=BIGGER)
    assert set(seen) == {len(SERVICES)}


def test_what_new_programs_wrote_survives_a_change_of_mind(
    installation: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when links run the successor already, then started with the old size again."""
    fill(installation.open())
    late = CtKey(A, B, 5000, 80, 6)

    def stop(*_: object) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(loader, "finish", stop)
        with pytest.raises(Stopped):
            installation.open(sizes=BIGGER)
    with pins.opened(installation.root / "maps" / "ct~new") as fd:
        key = late.low + late.high + bytes.fromhex("1388 0050 06 000000")
        assert libbpf.update(fd, key, 40, bytes(36), 36) == (1, 0)
    assert installation.open().tables.ct.get(late) is not None


def noted(root: Path, name: str) -> list[str]:
    return [p.name.partition("~")[2] for p in (root / "layouts").glob(f"{name}~*")]


def test_a_registered_migration_converts(installation: Installation, mini: Compile) -> None:
    """class: 32 bits → 16 bits, as OTHER_LAYOUT has it; zone 7 is new; class 9 is left out."""
    datapath = installation.open()
    datapath.tables.addresses.update({A: Address(258, 3), B: Address(9, 1)})
    installation.close()
    (layout,) = noted(installation.root, "addresses")

    def convert(key: bytes, value: bytes) -> tuple[bytes, bytes] | None:
        return None if value[0] == 9 else (key, value[:2] + b"\7\0" + value[4:])

    migration = Migration("addresses", layout, "addresses", convert)
    tree = pins.Pins(installation.root)
    ids = []
    for _ in range(2):  # the second start finds it done, and converts nothing twice
        objects = loader.open_objects([mini(OTHER_LAYOUT=1)], Settings())
        loaded = loader.load(tree, objects, Sizes(), [migration])
        loader.finish(tree, loaded)
        fd = loaded.maps["addresses"]
        ids.append(libbpf.map_info(fd).id)
        assert list(libbpf.walk(fd, 16, 8, 64)) == [(A, bytes.fromhex("0201 0700 03000000"))]
        assert len(noted(installation.root, "addresses")) == 1
        assert noted(installation.root, "addresses") != [layout]
        loaded.close()
    assert ids[0] == ids[1]


def test_a_renamed_map_hands_its_entries_over(installation: Installation, mini: Compile) -> None:
    installation.open().tables.addresses.update({A: Address(258, 3), B: Address(9, 1)})
    installation.close()
    (layout,) = noted(installation.root, "addresses")
    for folder, name in (("maps", "addresses"), ("layouts", f"addresses~{layout}")):
        path = installation.root / folder / name
        path.rename(path.with_name(name.replace("addresses", "addresses_v0")))
    migration = Migration("addresses_v0", layout, "addresses", lambda key, value: (key, value))
    datapath = Datapath.open(
        installation.root,
        installation.cgroup,
        Settings(),
        objects=[mini()],
        migrations=[migration],
    )
    assert dict(datapath.tables.addresses.items()) == {A: Address(258, 3), B: Address(9, 1)}
    assert not (installation.root / "maps" / "addresses_v0").exists()
    assert noted(installation.root, "addresses_v0") == []
    datapath.close()


NO_PREALLOC = 1
RELEASED = {
    "services": (
        "20[address:16s@0 port:>H@16 protocol:B@18 scope:B@19]",
        "16[id:I@0 count:I@4 flags:I@8 affinity_seconds:I@12]",
    ),
    "runtime": ("4[:I@0]", "8[policy_generation:I@0 event_mask:I@4]"),
    "policy": (
        "12[rule_set:I@0 peer:I@4 port:H@8 protocol:B@10 port_bits:B@11]",
        "8[rule:I@0 verdict:B@4]",
    ),
    "snat": (
        "40[remote:16s@0 local:16s@16 remote_port:>H@32 local_port:>H@34 protocol:B@36 kind:B@37]",
        "24[address:16s@0 port:>H@16 expires:I@20]",
    ),
}


def leave_behind(
    tree: pins.Pins, name: str, kind: int, rows: dict[bytes, bytes], flags: int = 0
) -> None:
    """A pinned map as an earlier version made it."""
    layout = hashlib.sha256(" -> ".join(RELEASED[name]).encode()).hexdigest()[:16]
    size = len(rows) if name == "runtime" else 64
    sizes = [int(text.split("[")[0]) for text in RELEASED[name]]
    shape = MapShape(kind, sizes[0], sizes[1], size, flags)
    fd = libbpf.create_map(name, shape, None, 0, 0)
    libbpf.pin(fd, tree.map(name))
    pins.note_layout(tree, name, layout)
    libbpf.update(fd, b"".join(rows), sizes[0], b"".join(rows.values()), sizes[1])
    os.close(fd)


def test_maps_of_earlier_versions(installation: Installation) -> None:
    """Services without identity, runtime without features, ports without a state and policy rows
    without an order keep what they have; the ports those of live flows."""
    tree = pins.Pins(installation.root)
    pins.make_folder(tree.maps)
    key = bytes.fromhex("00000000000000000000ffff0a600001 0050 06 00")
    value = struct.pack("<IIII", 7, 2, 0, 60)
    leave_behind(tree, "services", MapType.HASH, {key: value})
    leave_behind(tree, "runtime", MapType.ARRAY, {bytes(4): struct.pack("<II", 9, 6)})
    flow = SnatKey(
        address.parse("192.0.2.9"), address.parse("10.0.0.2"), 80, 4000, 6, SnatKind.FORWARD
    )
    raw_key = flow.remote + flow.local + struct.pack(">HHBB2x", 80, 4000, 6, flow.kind)
    node = address.parse("192.0.2.1")
    leave_behind(
        tree, "snat", MapType.LRU_HASH,
        {raw_key: node + struct.pack(">H2x", 61000) + struct.pack("<I", 77)},
    )  # fmt: skip
    rule = struct.pack("<IIHBB", 1000, 17, 80, 6, 16)
    leave_behind(tree, "policy", MapType.HASH, {rule: struct.pack("<IB3x", 258, 1)}, NO_PREALLOC)
    datapath = installation.open()
    verdict = PolicyVerdict(258, PolicyOrder.NETWORK_POLICY, Verdict.ALLOW)
    assert dict(datapath.tables.policy.items()) == {PolicyKey(1000, 17, 80, 6, 16): verdict}
    [(kept, entry)] = datapath.tables.snat.items()
    assert (kept, entry) == (flow, SnatEntry(node, 61000, 3, 77))
    vip = ServiceKey(address.parse("10.96.0.1"), 80, 6, 0)
    assert dict(datapath.tables.services.items()) == {vip: Service(7, 2, 0, 60)}
    assert datapath.runtime() == Runtime(9, 6)
