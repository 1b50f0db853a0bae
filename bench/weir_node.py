# SPDX-License-Identifier: Apache-2.0
"""A node of its own for Weir: a namespace, the loaded datapath, pods wired as the agent does it.

There is no agent and no cluster; this writes the map rows that the agent would. Pins are in a
bpffs that only this process sees (the runner gives it a mount namespace).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from bench.errors import BenchError
from bench.namespaces import Namespace
from weir.api import address
from weir.cni import wiring
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.datapath.datapath import Datapath
from weir.datapath.records import (
    Address,
    ClassNumber,
    Endpoint,
    Isolation,
    PolicyKey,
    PolicyLevel,
    PolicyOrder,
    PolicyVerdict,
    PrefixKey,
    Route,
    RouteFlag,
    Verdict,
)
from weir.datapath.settings import Settings

BPFFS = Path("/sys/fs/bpf")
POD_CIDR = address.parse_cidr("10.99.0.0/24")
MTU = 1500
PROTOCOLS = (6, 17)
T = TypeVar("T")


def cgroup2_root() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    raise BenchError("no cgroup v2 file system is mounted")


class WeirNode:
    """Made by `weir_node()`. Blocking work runs in a thread that stays in the node's namespace."""

    def __init__(self, pins: Path, cgroup: Path) -> None:
        self.namespace = Namespace()
        self.pods: list[LocalEndpoint] = []
        self._thread = ThreadPoolExecutor(1, initializer=self.namespace.enter_for_good)
        self.datapath = self.inside(lambda: Datapath.open(pins, cgroup, Settings()))
        self.inside(wiring.prepare_host)
        cidr = PrefixKey(POD_CIDR.bits, POD_CIDR.address)
        flags = RouteFlag.POD_CIDR | RouteFlag.LOCAL | RouteFlag.NO_MASQUERADE
        self.datapath.tables.routes.update({cidr: Route(address.parse("::"), flags)})
        self.datapath.bump()

    def inside(self, job: Callable[[], T]) -> T:
        """Runs it in the node's namespace."""
        return self._thread.submit(job).result()

    def add_pod(self, pod: Namespace, addr: str, class_: int) -> LocalEndpoint:
        """Wires a pod whose traffic is isolated both ways by rule sets of its class's number."""
        name = f"bench{class_}"
        planned = wiring.plan(
            name, pod.path, "eth0", (address.parse(addr),), PodRef("bench", name, name), "weir"
        )
        made = self.inside(lambda: wiring.create(planned, MTU))
        self.publish(made, class_)
        self.inside(lambda: self.datapath.attach_pod(made.host_ifname))
        self.inside(lambda: wiring.bring_up(made))
        # As the agent does with a pod that has come to stay.
        self.inside(lambda: self.datapath.settle_pod(made.host_ifname))
        self.pods.append(made)
        return made

    def add_uplink(self) -> None:
        """A node always has one, and the first attachment of all is another matter: for it the
        kernel patches its own code."""
        self.namespace.ip("link add uplink type veth peer name wire")
        self.inside(lambda: self.datapath.attach_uplink("uplink"))

    def publish(self, endpoint: LocalEndpoint, class_: int) -> None:
        """The map rows of an endpoint."""
        level = 1 << PolicyLevel.PORT_BITS_MAX
        row = Endpoint(
            endpoint.ifindex,
            class_,
            Isolation(egress_rules(class_), level),
            Isolation(ingress_rules(class_), level),
            endpoint.mac,
            endpoint.host_mac,
        )
        tables = self.datapath.tables
        tables.endpoints.update(dict.fromkeys(endpoint.addresses, row))
        tables.addresses.update(dict.fromkeys(endpoint.addresses, Address(class_)))

    def withdraw(self, endpoint: LocalEndpoint) -> None:
        """Takes back publish and attach."""
        self.datapath.detach_pod(endpoint.host_ifname)
        self.datapath.tables.endpoints.delete(endpoint.addresses)
        self.datapath.tables.addresses.delete(endpoint.addresses)

    def allow(self, client: int, server: int, port: int) -> None:
        """One policy on each side: egress to the server, ingress from the client, one port."""
        allowed = PolicyVerdict(1, PolicyOrder.NETWORK_POLICY, Verdict.ALLOW)
        sides = [(egress_rules(client), server), (ingress_rules(server), client)]
        rows = {
            PolicyKey(rules, peer, port, protocol, PolicyLevel.PORT_BITS_MAX): allowed
            for rules, peer in sides
            for protocol in PROTOCOLS
        }
        self.datapath.tables.policy.update(rows)

    def close(self) -> None:
        self.datapath.close()
        self._thread.shutdown()
        self.namespace.close()


def egress_rules(class_: int) -> int:
    return 2 * class_


def ingress_rules(class_: int) -> int:
    return 2 * class_ + 1


CLIENT_CLASS = int(ClassNumber.FIRST)
SERVER_CLASS = CLIENT_CLASS + 1


@contextmanager
def weir_node() -> Iterator[WeirNode]:
    """A loaded, empty node; everything it made is gone afterwards."""
    subprocess.run(["mount", "-t", "bpf", "bpf", BPFFS], check=True)
    cgroup = cgroup2_root() / f"weir-bench-{os.getpid()}"
    cgroup.mkdir()
    try:
        node = WeirNode(BPFFS / "weir", cgroup)
        try:
            yield node
        finally:
            node.close()
            Datapath.remove(BPFFS / "weir")
    finally:
        cgroup.rmdir()
        subprocess.run(["umount", BPFFS], check=True)
