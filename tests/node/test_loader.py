# SPDX-License-Identifier: Apache-2.0
"""Start, restart, upgrade, changed settings, refusals: against the kernel, with own objects."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from node.conftest import Compile, Installation
from support.capabilities import AGENT, python_with
from support.namespaces import NetNs, veth
from support.packets import program_run

from weir.api import address
from weir.datapath import libbpf, pins
from weir.datapath.datapath import Datapath
from weir.datapath.errors import (
    LayoutChanged,
    LayoutMismatch,
    NotMounted,
    NotPermitted,
    VerifierRejected,
)
from weir.datapath.features import Features
from weir.datapath.records import Address, MetricKey
from weir.datapath.settings import Settings

pytestmark = pytest.mark.core

PACKET = bytes(12) + b"\x08\x00" + bytes(50)
WRITES = (
    "create_map",
    "pin",
    "create_link",
    "update_link",
    "detach_link",
    "tc_attach",
    "tc_detach",
    "update",
    "delete",
)


def kernel_ids(root: Path) -> dict[str, tuple[int, ...]]:
    """Path of each pin → the kernel's id of it, and of the program if it is a link."""
    found: dict[str, tuple[int, ...]] = {}
    for path in root.rglob("*"):
        if path.is_dir():
            continue
        with pins.opened(path) as fd:
            if path.parent.name == "maps":
                found[str(path)] = (libbpf.map_info(fd).id,)
            elif libbpf.is_link(fd):
                info = libbpf.link_info(fd)
                found[str(path)] = info.id, info.program_id
            else:
                found[str(path)] = (libbpf.program_info(fd).id,)
    return found


def test_restart_finds_all_in_place_and_writes_nothing(
    installation: Installation,
    netns: Callable[[], NetNs],
    kernel: Features,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host, pod = netns(), netns()
    veth("pod0.1", host, "eth0", pod)
    with host.entered():
        datapath = installation.open(kernel=kernel)
        datapath.attach_pod("pod0.1")
        datapath.tables.addresses.update({address.parse("10.0.0.1"): Address(16)})
        before = kernel_ids(installation.root)
        assert {"links/pod0%2E1/from_pod", "links/cgroup/sock_connect4"} <= installation.pins()
        for name in WRITES:
            monkeypatch.setattr(libbpf, name, lambda *_args, n=name: pytest.fail(f"{n} was called"))
        monkeypatch.setattr(
            libbpf.Object, "load", lambda _self: pytest.fail("programs were loaded")
        )

        datapath = installation.open(kernel=kernel)
        datapath.attach_pod("pod0.1")

        assert datapath.attached() == {"pod0.1"}
        assert kernel_ids(installation.root) == before
        assert dict(datapath.tables.addresses.items()) == {address.parse("10.0.0.1"): Address(16)}
        monkeypatch.undo()


def test_changed_settings_load_new_programs(installation: Installation) -> None:
    def mark(datapath: Datapath) -> int:
        return libbpf.run_program(datapath.programs["to_pod"], PACKET).mark

    assert mark(installation.open(Settings(overlay_mtu=1450))) == 1450
    maps = {path: i for path, i in kernel_ids(installation.root).items() if "/maps/" in path}
    assert mark(installation.open(Settings(overlay_mtu=1400))) == 1400
    after = kernel_ids(installation.root)
    assert maps == {path: i for path, i in after.items() if "/maps/" in path}
    assert not any("passing" in path for path in after)
    # The old programs are gone with their folder.
    assert len(list((installation.root / "progs").iterdir())) == 1


def test_another_layout_is_refused_and_nothing_touched(
    installation: Installation, netns: Callable[[], NetNs]
) -> None:
    key = address.parse("10.0.0.1")
    installation.open().tables.addresses.update({key: Address(16)})
    before = kernel_ids(installation.root)
    with pytest.raises(LayoutChanged, match="addresses"):
        installation.open(OTHER_LAYOUT=1)
    assert kernel_ids(installation.root) == before
    assert installation.open().tables.addresses.get(key) == Address(16)


def test_a_rejected_program_is_named_and_nothing_changes(installation: Installation) -> None:
    installation.open()
    before = kernel_ids(installation.root)
    with pytest.raises(VerifierRejected) as caught:
        installation.open(BROKEN=1)
    assert caught.value.program == "from_pod"
    assert "invalid mem access" in caught.value.log
    assert len(str(caught.value).splitlines()) < 30
    assert kernel_ids(installation.root) == before


def test_half_pinned_programs_are_loaded_again(installation: Installation) -> None:
    installation.open()
    folder = next((installation.root / "progs").iterdir())
    (folder / "to_pod").unlink()
    assert set(installation.open().programs) == {"from_pod", "to_pod", "sock_connect4"}
    assert {path.name for path in folder.iterdir()} == {"from_pod", "to_pod", "sock_connect4"}


def test_metrics_are_summed_over_cpus(installation: Installation) -> None:
    datapath = installation.open()
    for cpu in sorted(os.sched_getaffinity(0)):
        command = ["taskset", "-c", str(cpu), sys.executable, "-c", RUN_PINNED]
        subprocess.run([*command, str(installation.root)], check=True)
    cpus = len(os.sched_getaffinity(0))
    (row,) = datapath.tables.metrics.items()
    assert row[0] == MetricKey(0, 0)
    assert (row[1].packets, row[1].bytes) == (cpus * 5, cpus * 5 * len(PACKET))
    assert datapath.tables.metrics.get(MetricKey(0, 0)) == row[1]


RUN_PINNED = """
import pathlib, sys
from weir.datapath import libbpf
path = next(pathlib.Path(sys.argv[1]).glob("progs/*/from_pod"))
libbpf.run_program(libbpf.get_pinned(path), bytes(12) + b"\\x08\\x00" + bytes(50), repeat=5)
"""


def test_no_bpffs(tmp_path: Path, installation: Installation, mini: Compile) -> None:
    with pytest.raises(NotMounted, match="mount -t bpf"):
        Datapath.open(tmp_path, installation.cgroup, Settings(), objects=[mini()])


def test_no_cgroup2(tmp_path: Path, installation: Installation, mini: Compile) -> None:
    with pytest.raises(NotMounted, match="mount -t cgroup2"):
        Datapath.open(installation.root, tmp_path, Settings(), objects=[mini()])


def test_no_objects(installation: Installation) -> None:
    with pytest.raises(LayoutMismatch, match="the build is incomplete"):
        Datapath.open(installation.root, installation.cgroup, Settings(), objects=[])


CONNECT = """
import pathlib, os, socket, sys
pathlib.Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
print(socket.socket().connect_ex(("127.0.0.1", 4791)))
"""


def connect(cgroup: Path) -> int:
    """The errno of a connect from inside that cgroup to the port that the program refuses."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECT, str(cgroup)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_cgroup_programs_come_and_go(installation: Installation) -> None:
    assert connect(installation.cgroup) == errno.ECONNREFUSED
    installation.open()
    assert connect(installation.cgroup) == errno.EPERM
    installation.open(VARIANT=1)
    assert connect(installation.cgroup) == errno.EPERM
    installation.open(WITHOUT_SOCKETS=1)
    assert connect(installation.cgroup) == errno.ECONNREFUSED
    installation.open()
    Datapath.remove(installation.root)
    assert connect(installation.cgroup) == errno.ECONNREFUSED
    assert not installation.root.exists()


OPEN = """
import pathlib, sys
from weir.datapath.datapath import Datapath
from weir.datapath.settings import Settings
root, cgroup, mini = map(pathlib.Path, sys.argv[1:])
datapath = Datapath.open(root, cgroup, Settings(), objects=[mini])
datapath.tables.runtime.update({0: datapath.runtime()})
datapath.attach_pod("lo")
datapath.detach_pod("lo")
"""


def open_with(installation: Installation, mini: Compile, capabilities: tuple[str, ...]) -> str:
    """What opening and attaching with these capabilities writes to standard error."""
    paths = (installation.root, installation.cgroup, mini())
    return python_with(capabilities, OPEN, *map(str, paths)).stderr


def test_three_capabilities_are_enough(
    installation: Installation, mini: Compile, netns: Callable[[], NetNs]
) -> None:
    with netns().entered():
        assert open_with(installation, mini, AGENT) == ""
        # The second time adopts what is pinned.
        assert open_with(installation, mini, AGENT) == ""


def test_a_missing_capability_is_named(installation: Installation, mini: Compile) -> None:
    error = open_with(installation, mini, ("net_admin",)).splitlines()[-1]
    assert NotPermitted.__name__ in error
    assert "CAP_BPF" in error


def test_packets_come_back_from_test_runs(installation: Installation) -> None:
    datapath = installation.open()
    assert program_run(datapath.programs["from_pod"], PACKET, repeat=3) == (0, PACKET)
