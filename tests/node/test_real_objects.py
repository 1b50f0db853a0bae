# SPDX-License-Identifier: Apache-2.0
"""The built objects as an agent opens them: time, capabilities, all roles attached."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from node.conftest import Installation
from support.capabilities import AGENT, python_with
from support.namespaces import NetNs, veth

from weir.api import address
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.features import Features
from weir.datapath.settings import Settings

pytestmark = pytest.mark.core

SETTINGS = Settings(node_ipv4=address.parse("192.0.2.1"), tunnel=True, masquerade=True)


def test_all_roles_stay_attached_over_a_restart(
    installation: Installation, netns: Callable[[], NetNs], kernel: Features
) -> None:
    host, other = netns(), netns()
    veth("uplink0", host, "eth0", other)
    veth("pod0", host, "eth1", other)
    host.run("ip", "link", "add", "weir_vxlan", "type", "vxlan", "external", "dstport", "8472")
    spent = []
    ids = []
    with host.entered():
        for first in (True, False):
            start = time.perf_counter()
            datapath = Datapath.open(
                installation.root, installation.cgroup, SETTINGS, features=kernel
            )
            spent.append(time.perf_counter() - start)
            if first:
                datapath.attach_pod("pod0")
                datapath.attach_uplink("uplink0")
                datapath.attach_overlay("weir_vxlan")
            assert datapath.attached() == {"pod0", "uplink0", "weir_vxlan"}
            fds = datapath.programs
            ids.append({name: libbpf.program_info(fd).id for name, fd in fds.items()})
            datapath.close()
    print(f"open: {spent[0] * 1000:.0f} ms, again: {spent[1] * 1000:.0f} ms")
    assert ids[0] == ids[1]
    assert len(ids[0]) == 16


OPEN = """
import pathlib, sys
from weir.datapath.datapath import Datapath
from weir.datapath.links import XDP_MODES
from weir.datapath.settings import Settings
datapath = Datapath.open(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), Settings())
datapath.attach_pod("lo")
datapath.attach_uplink("lo", XDP_MODES["generic"])
print(len(datapath.attached()), datapath.xdp["lo"].name)
"""


def test_three_capabilities_are_enough(
    installation: Installation, netns: Callable[[], NetNs]
) -> None:
    with netns().entered():
        done = python_with(AGENT, OPEN, str(installation.root), str(installation.cgroup))
    assert (done.stdout, done.stderr) == ("1 GENERIC\n", "")
