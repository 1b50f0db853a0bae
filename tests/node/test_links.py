# SPDX-License-Identifier: Apache-2.0
"""Attachments on real devices, with TCX and as on kernels without it, under traffic.

host netns: veth0 ── eth0 :pod netns
192.0.2.1                 192.0.2.2
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from node.conftest import Installation
from support.namespaces import NetNs, veth
from support.timing import SCALE

from weir.datapath import datapath as datapath_module
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.errors import DeviceGone
from weir.datapath.features import Features
from weir.datapath.links import Attachment
from weir.datapath.records import MetricKey

pytestmark = pytest.mark.core

SWAPS = 40
WAIT = f"-W{2 * SCALE:.0f}"
SO_RCVBUFFORCE = 33  # the socket module has no name for it


LASTING = (Attachment("to_pod", egress=True), Attachment("from_pod", egress=False))
BRIEF = datapath_module.POD


@pytest.fixture(autouse=True)
def lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test programs have a pod's names but are attached as to an uplink: by TCX, if there."""
    monkeypatch.setattr(datapath_module, "POD", LASTING)


@pytest.fixture
def pair(netns: Callable[[], NetNs]) -> tuple[NetNs, NetNs]:
    host, pod = netns(), netns()
    veth("veth0", host, "eth0", pod)
    host.run("ip", "addr", "add", "192.0.2.1/24", "dev", "veth0")
    pod.run("ip", "addr", "add", "192.0.2.2/24", "dev", "eth0")
    return host, pod


def bound(netns: NetNs, ip: str) -> socket.socket:
    with netns.entered():
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((ip, 0))
    made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    made.settimeout(2 * SCALE)
    return made


class Traffic:
    """Numbered datagrams from the pod to the host, as fast as one thread sends them."""

    def __init__(self, stack: ExitStack, host: NetNs, pod: NetNs) -> None:
        self._receiver = stack.enter_context(bound(host, "192.0.2.1"))
        self._sender = stack.enter_context(bound(pod, "192.0.2.2"))
        self._sender.connect(self._receiver.getsockname())
        self._stop = threading.Event()
        self.sent = 0
        self.seen = 0
        self._threads = [threading.Thread(target=w) for w in (self._send, self._receive)]
        self._sender.send(b"")  # resolves the neighbour before it counts
        self._receiver.recv(64)
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._stop.is_set():
            self._sender.send(self.sent.to_bytes(8, "little"))
            self.sent += 1
            if self.sent % 64 == 0:
                time.sleep(0.0005)  # leaves the processor to the test
        self._sender.send(b"end")

    def _receive(self) -> None:
        while self._receiver.recv(64) != b"end":
            self.seen += 1

    def finish(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_swaps_lose_no_packet(
    installation: Installation, pair: tuple[NetNs, NetNs], kernel: Features
) -> None:
    host, pod = pair
    with host.entered(), ExitStack() as stack:
        datapath = installation.open(kernel=kernel, VARIANT=0)
        datapath.attach_pod("veth0")
        traffic = Traffic(stack, host, pod)
        try:
            for number in range(SWAPS):
                datapath = installation.open(kernel=kernel, VARIANT=1 + number % 2)
                assert datapath.attached() == {"veth0"}
        finally:
            traffic.finish()
        counts = {key.reason: row.packets for key, row in datapath.tables.metrics.items()}
    print(f"{traffic.sent} packets over {SWAPS} swaps, by variant: {counts}")
    assert traffic.seen == traffic.sent
    assert traffic.sent > 500
    # Each packet ran one variant, and every variant ran: at no moment there was none.
    assert counts.keys() == {0, 1, 2}
    assert sum(counts.values()) >= traffic.sent


@pytest.mark.parametrize("variant", [0, 1], ids=["restart", "upgrade"])
def test_a_device_that_is_gone_is_pruned(
    installation: Installation, netns: Callable[[], NetNs], kernel: Features, variant: int
) -> None:
    host, pod = netns(), netns()
    with host.entered():
        for name in ("gone", "stays"):
            veth(name, host, name, pod)
        datapath = installation.open(kernel=kernel, VARIANT=0)
        for name in ("gone", "stays"):
            datapath.attach_pod(name)
        host.run("ip", "link", "del", "gone")
        assert datapath.attached() == {"stays"}

        datapath = installation.open(kernel=kernel, VARIANT=variant)
        assert datapath.attached() == {"stays"}
        assert not (installation.root / "links" / "gone").exists()
        with pytest.raises(DeviceGone, match="gone"):
            datapath.attach_pod("gone")
        datapath.detach_pod("gone")


@pytest.mark.parametrize("restart", [False, True], ids=["running", "restarted"])
def test_a_new_device_of_the_same_name_is_attached_anew(
    installation: Installation, netns: Callable[[], NetNs], kernel: Features, restart: bool
) -> None:
    host, pod = netns(), netns()
    with host.entered():
        datapath = installation.open(kernel=kernel)
        for round_ in range(2):
            veth("veth0", host, "eth0", pod)
            host.run("ip", "addr", "add", "192.0.2.1/24", "dev", "veth0")
            pod.run("ip", "addr", "add", "192.0.2.2/24", "dev", "eth0")
            if restart and round_:
                datapath = installation.open(kernel=kernel)
                assert datapath.attached() == set()
            datapath.attach_pod("veth0")
            before = packets(datapath.tables.metrics.get(MetricKey(0, 0)))
            pod.run("ping", "-c1", WAIT, "192.0.2.1")
            assert packets(datapath.tables.metrics.get(MetricKey(0, 0))) > before
            host.run("ip", "link", "del", "veth0")


def packets(row: object) -> int:
    return int(getattr(row, "packets", 0))


def test_detach_stops_the_programs(
    installation: Installation, pair: tuple[NetNs, NetNs], kernel: Features
) -> None:
    host, pod = pair
    with host.entered():
        datapath = installation.open(kernel=kernel)
        datapath.attach_pod("veth0")
        pod.run("ping", "-c1", WAIT, "192.0.2.1")
        datapath.detach_pod("veth0")
        before = packets(datapath.tables.metrics.get(MetricKey(0, 0)))
        pod.run("ping", "-c1", WAIT, "192.0.2.1")
        assert before > 0
        assert packets(datapath.tables.metrics.get(MetricKey(0, 0))) == before
        assert datapath.attached() == set()
        datapath.detach_pod("veth0")


def test_half_attached_is_not_attached(
    installation: Installation, pair: tuple[NetNs, NetNs], kernel: Features
) -> None:
    """A pod whose packets one program misses must not be taken for wired after a crash."""
    host, _ = pair
    with host.entered():
        datapath = installation.open(kernel=kernel)
        datapath.attach_pod("veth0")
        for program in ("from_pod", "to_pod"):
            (installation.root / "links" / "veth0" / program).unlink()
            assert installation.open(kernel=kernel).attached() == set()
            datapath = installation.open(kernel=kernel)
            datapath.attach_pod("veth0")
            assert datapath.attached() == {"veth0"}


def test_clsact_filters_of_others_stay(
    installation: Installation, pair: tuple[NetNs, NetNs], kernel: Features
) -> None:
    host, _ = pair
    show = ("tc", "filter", "show", "dev", "veth0", "ingress")
    with host.entered():
        datapath = installation.open(kernel=kernel)
        ifindex = socket.if_nametoindex("veth0")
        libbpf.tc_attach(ifindex, False, datapath.programs["to_pod"], handle=5, priority=7)
        before = host.run(*show)
        datapath.attach_pod("veth0")
        installation.open(kernel=kernel, VARIANT=1)
        assert host.run(*show).count("handle 0x1 from_pod") == (0 if kernel.tcx else 1)
        Datapath.remove(installation.root)
    assert host.run(*show) == before
    assert "handle 0x5 to_pod" in before


def test_pods_are_attached_without_waiting_for_rcu(
    installation: Installation,
    netns: Callable[[], NetNs],
    kernel: Features,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By filters on every kernel; one removed behind our back is missed and put back."""
    monkeypatch.setattr(datapath_module, "POD", BRIEF)
    monkeypatch.setattr(datapath_module, "ROLES", (BRIEF,))
    host, pod = netns(), netns()
    veth("veth0", host, "eth0", pod)
    show = ("tc", "filter", "show", "dev", "veth0", "ingress")
    with host.entered():
        datapath = installation.open(kernel=kernel)
        datapath.attach_pod("veth0")
        assert "handle 0x1 from_pod" in host.run(*show)
        assert datapath.attached() == {"veth0"}
        host.run("tc", "filter", "del", "dev", "veth0", "ingress")
        assert datapath.attached() == set()
        datapath.attach_pod("veth0")
        assert datapath.attached() == {"veth0"}


def test_settling_loses_no_packet(
    installation: Installation,
    pair: tuple[NetNs, NetNs],
    kernel: Features,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The filters of a pod become links where there is TCX, and stay so after a restart."""
    monkeypatch.setattr(datapath_module, "POD", BRIEF)
    monkeypatch.setattr(datapath_module, "ROLES", (BRIEF,))
    host, pod = pair
    filters = ("tc", "filter", "show", "dev", "veth0", "ingress")
    with host.entered(), ExitStack() as stack:
        datapath = installation.open(kernel=kernel, VARIANT=1)
        datapath.attach_pod("veth0")
        traffic = Traffic(stack, host, pod)
        try:
            for _ in range(10):
                assert datapath.settle_pod("veth0") is kernel.tcx
                assert not datapath.settle_pod("veth0")
                assert ("from_pod" in host.run(*filters)) is not kernel.tcx
                datapath = installation.open(kernel=kernel, VARIANT=1)
                datapath.attach_pod("veth0")
                assert not datapath.settle_pod("veth0") or not kernel.tcx
                assert datapath.attached() == {"veth0"}
                datapath.detach_pod("veth0")
                assert datapath.attached() == set()
                assert "from_pod" not in host.run(*filters)
                datapath.attach_pod("veth0")
        finally:
            traffic.finish()
    assert traffic.seen == traffic.sent
