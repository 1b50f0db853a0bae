# SPDX-License-Identifier: Apache-2.0
"""XDP on real devices: its modes, over restarts and under traffic, and without it.

node netns: uplink ── wire :outside netns
192.0.2.1                 192.0.2.2 (blocked)
2001:db8::1             2001:db8::2
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from node.conftest import Installation
from support.namespaces import NetNs, veth
from support.timing import SCALE

from weir.api.address import parse
from weir.datapath import libbpf, pins
from weir.datapath.datapath import Datapath
from weir.datapath.libbpf import XdpMode
from weir.datapath.records import Blocked, DropReason, MetricKey, PrefixKey, RuntimeFeature
from weir.datapath.settings import Settings, Sizes

WAIT = f"-W{SCALE:.0f}"
MODES = {
    "off": (),
    "native": (XdpMode.NATIVE,),
    "generic": (XdpMode.GENERIC,),
    "auto": (XdpMode.NATIVE, XdpMode.GENERIC),
}
BLOCKED = {
    PrefixKey(128, parse("192.0.2.2")): Blocked(1),
    PrefixKey(128, parse("2001:db8::2")): Blocked(1),
}


@pytest.fixture
def pair(netns: Callable[[], NetNs]) -> tuple[NetNs, NetNs]:
    node, outside = netns(), netns()
    veth("uplink", node, "wire", outside)
    for ns, number, device in ((node, 1, "uplink"), (outside, 2, "wire")):
        ns.run("ip", "addr", "add", f"192.0.2.{number}/24", "dev", device)
        ns.run("ip", "addr", "add", f"2001:db8::{number}/64", "dev", device, "nodad")
    return node, outside


def opened(installation: Installation) -> Datapath:
    return Datapath.open(installation.root, installation.cgroup, Settings())


def answers(outside: NetNs, target: str) -> bool:
    try:
        outside.run("ping", "-c1", WAIT, target)
    except AssertionError:
        return False
    return True


def blocked_packets(datapath: Datapath) -> int:
    found = datapath.tables.metrics.get(MetricKey(DropReason.BLOCKED, 1))
    return found.packets if found else 0


def mode_of(node: NetNs) -> str:
    """As `ip` tells: what others see."""
    text = node.run("ip", "link", "show", "uplink")
    words = {"xdpgeneric": "generic", "xdp": "native"}
    return next((words[word] for word in text.split() if word in words), "off")


@pytest.mark.core
@pytest.mark.parametrize("name", MODES)
def test_blocks_in_each_mode(
    installation: Installation, pair: tuple[NetNs, NetNs], name: str
) -> None:
    """Blocked: nothing passes and it is counted. Taken back: all passes again."""
    node, outside = pair
    with node.entered():
        datapath = opened(installation)
        datapath.attach_uplink("uplink", MODES[name])
        expected = "native" if name == "auto" else name
        assert mode_of(node) == expected
        mode = {"off": None, "native": XdpMode.NATIVE, "generic": XdpMode.GENERIC}[expected]
        assert datapath.xdp == {"uplink": mode}
        in_xdp = bool(datapath.runtime().features & RuntimeFeature.XDP_BLOCKS)
        assert in_xdp == (name != "off")
        for target in ("192.0.2.1", "2001:db8::1"):
            assert answers(outside, target)
            before = blocked_packets(datapath)
            datapath.tables.blocked.update(BLOCKED)
            assert not answers(outside, target)
            assert blocked_packets(datapath) > before
            datapath.tables.blocked.delete(BLOCKED)
            assert answers(outside, target)
        datapath.close()


def test_stays_over_restarts_and_changes_mode(
    installation: Installation, pair: tuple[NetNs, NetNs]
) -> None:
    """A restart keeps the link and updates its program; another mode replaces it; off ends it."""
    node, outside = pair
    with node.entered():
        link_ids = []
        for name in ("native", "native", "auto", "generic", "off", "native"):
            datapath = opened(installation)
            datapath.tables.blocked.update(BLOCKED)
            datapath.attach_uplink("uplink", MODES[name])
            assert mode_of(node) == ("native" if name == "auto" else name)
            assert not answers(outside, "192.0.2.1")
            path = installation.root / "links" / "uplink" / "xdp_uplink"
            fd = libbpf.get_pinned(path)
            assert (fd is None) == (name == "off")
            link_ids.append(0 if fd is None else libbpf.link_info(fd).id)
            if fd is not None:
                os.close(fd)
            datapath.close()
        assert link_ids[0] == link_ids[1] == link_ids[2]
        assert len(set(link_ids)) == 4


def test_program_is_updated_in_place(installation: Installation, pair: tuple[NetNs, NetNs]) -> None:
    """Another map is another program: the pinned link runs the new one, at no moment none."""
    node, _ = pair
    with node.entered():
        ids = []
        for sizes in (Sizes(), Sizes(blocked=1024)):
            datapath = Datapath.open(installation.root, installation.cgroup, Settings(), sizes)
            datapath.attach_uplink("uplink", MODES["native"])
            with pins.opened(installation.root / "links" / "uplink" / "xdp_uplink") as fd:
                info = libbpf.link_info(fd)
            assert info.program_id == libbpf.program_info(datapath.programs["xdp_uplink"]).id
            ids.append((info.id, info.program_id))
            datapath.close()
        assert ids[0][0] == ids[1][0]
        assert ids[0][1] != ids[1][1]


def test_another_program_there_is_left_alone(
    installation: Installation, pair: tuple[NetNs, NetNs]
) -> None:
    """Somebody else's XDP stays; tc does the blocking."""
    node, outside = pair
    with node.entered():
        datapath = opened(installation)
        theirs = libbpf.create_link(
            datapath.programs["xdp_uplink"],
            _index(node),
            libbpf.AttachType.XDP,
            "theirs",
            flags=XdpMode.GENERIC,
        )
        datapath.attach_uplink("uplink", MODES["auto"])
        assert datapath.xdp == {"uplink": None}
        assert not datapath.runtime().features & RuntimeFeature.XDP_BLOCKS
        datapath.tables.blocked.update(BLOCKED)
        # Ours, as theirs is the same program: it drops. Without it tc does.
        assert not answers(outside, "192.0.2.1")
        os.close(theirs)
        assert mode_of(node) == "off"
        assert not answers(outside, "192.0.2.1")
        datapath.close()


def _index(node: NetNs) -> int:
    return int(node.run("ip", "-o", "link", "show", "uplink").split(":")[0])


def test_an_uplink_that_is_none_any_more(
    installation: Installation, pair: tuple[NetNs, NetNs]
) -> None:
    """Another agent attached to it, with other settings; a pod's device stays."""
    node, _ = pair
    with node.entered():
        node.run("ip", "link", "add", "pod", "type", "veth", "peer", "name", "peer")
        node.run("ip", "link", "set", "pod", "up")
        datapath = opened(installation)
        datapath.attach_uplink("uplink", MODES["native"])
        datapath.attach_pod("pod")
        assert datapath.attached() == {"uplink", "pod"}
        datapath.close()
        datapath = opened(installation)
        datapath.keep_uplinks(["uplink"])
        assert datapath.attached() == {"uplink", "pod"}
        datapath.keep_uplinks(["other"])
        assert datapath.attached() == {"pod"}
        assert mode_of(node) == "off"
        assert not (installation.root / "links" / "uplink").exists()
        datapath.close()


def test_device_gone_and_back(installation: Installation, pair: tuple[NetNs, NetNs]) -> None:
    """A device of the same name is another one: attached anew. All gone after detach."""
    node, outside = pair
    with node.entered():
        datapath = opened(installation)
        datapath.attach_uplink("uplink", MODES["native"])
        datapath.close()
        node.run("ip", "link", "del", "uplink")
        veth("uplink", node, "wire", outside)
        datapath = opened(installation)
        assert not (installation.root / "links" / "uplink" / "xdp_uplink").exists()
        datapath.attach_uplink("uplink", MODES["native"])
        assert mode_of(node) == "native"
        datapath.detach_uplink("uplink")
        assert mode_of(node) == "off"
        assert datapath.xdp == {}
        datapath.close()
