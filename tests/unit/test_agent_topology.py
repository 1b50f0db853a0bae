# SPDX-License-Identifier: Apache-2.0
"""Which endpoints a node uses, as the Kubernetes documentation tells it.

The rows follow "Topology Aware Routing" (safeguards), "Traffic distribution" and "Virtual IPs and
Service Proxies" (traffic policies, terminating endpoints) of the concept pages, and KEP 3015 for
hints by node.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from weir.agent import topology
from weir.agent.resources import NO_HINTS, Hints, ServicePort, Slice
from weir.agent.topology import Place, choose
from weir.api.address import Addr, parse

PORT = ServicePort("http", 6, 80)
HERE = Place("here", "zone-a")


@dataclass(frozen=True)
class E:
    """An endpoint, 10.0.0.NUMBER."""

    number: int
    node: str = "elsewhere"
    ready: bool = True
    nodes: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()

    @property
    def address(self) -> Addr:
        return parse(f"10.0.0.{self.number}")


def slice_of(*endpoints: E, target: int = 8080, name: str = "http", protocol: int = 6) -> Slice:
    """Those that are not ready are terminating and still serve."""
    ready = [item for item in endpoints if item.ready]
    draining = [item for item in endpoints if not item.ready]
    hints = tuple(Hints(item.nodes, item.zones) for item in ready)
    return Slice(
        "ns",
        "s",
        (ServicePort(name, protocol, target),),
        b"".join(item.address for item in ready),
        b"".join(item.address for item in draining),
        tuple(item.node for item in (*ready, *draining)),
        hints if any(hint != NO_HINTS for hint in hints) else (),
    )


def numbers(backends: list[bytes]) -> list[int]:
    return sorted(backend[15] for backend in backends)


@pytest.mark.parametrize(
    ("endpoints", "cluster", "local"),
    [
        pytest.param([], [], [], id="none"),
        pytest.param([E(1), E(2, "here")], [1, 2], [2], id="ready everywhere"),
        pytest.param(
            [E(1), E(2, "here", ready=False)],
            [1],
            [2],
            id="Local falls back to what terminates here though others are ready elsewhere",
        ),
        pytest.param(
            [E(1, "here"), E(2, "here", ready=False)], [1], [1], id="ready goes before terminating"
        ),
        pytest.param(
            [E(1, ready=False), E(2, "here", ready=False)],
            [1, 2],
            [2],
            id="all terminate: Cluster uses all of them",
        ),
        pytest.param([E(1), E(2, ready=False)], [1], [], id="nothing here"),
        pytest.param(
            [E(1, zones=("zone-a",)), E(2, zones=("zone-b",)), E(3, zones=("zone-a", "zone-c"))],
            [1, 3],
            [],
            id="hints for this zone",
        ),
        pytest.param(
            [E(1, zones=("zone-a",)), E(2)],
            [1, 2],
            [],
            id="one ready endpoint has no hint: all hints are ignored",
        ),
        pytest.param(
            [E(1, zones=("zone-b",)), E(2, zones=("zone-c",))],
            [1, 2],
            [],
            id="no hint for this zone: all hints are ignored",
        ),
        pytest.param(
            [E(1, zones=("zone-a",)), E(2, ready=False)],
            [1],
            [],
            id="endpoints that are not ready need no hint",
        ),
        pytest.param(
            [E(1, "here", zones=("zone-b",)), E(2, zones=("zone-a",))],
            [2],
            [1],
            id="hints are for policy Cluster only",
        ),
        pytest.param(
            [E(1, nodes=("here",), zones=("zone-a",)), E(2, nodes=("there",), zones=("zone-a",))],
            [1],
            [],
            id="PreferSameNode: this node",
        ),
        pytest.param(
            [E(1, nodes=("there",), zones=("zone-a",)), E(2, nodes=("x",), zones=("zone-b",))],
            [1],
            [],
            id="PreferSameNode: nothing for this node, so its zone",
        ),
        pytest.param(
            [E(1, nodes=("there",), zones=("zone-b",)), E(2, nodes=("x",), zones=("zone-c",))],
            [1, 2],
            [],
            id="PreferSameNode: neither node nor zone",
        ),
        pytest.param(
            [E(1, nodes=("here",), zones=("zone-a",)), E(2, zones=("zone-a",))],
            [1, 2],
            [],
            id="PreferSameNode: one has no node, so the zone's",
        ),
        pytest.param(
            [E(1, ready=False, zones=("zone-a",)), E(2, ready=False)],
            [1, 2],
            [],
            id="terminating ones are used without regard to hints",
        ),
    ],
)
def test_choice(endpoints: list[E], cluster: list[int], local: list[int]) -> None:
    choice = choose([slice_of(*endpoints)], PORT, HERE, ipv4=True)
    assert (numbers(choice.cluster), numbers(choice.local)) == (cluster, local)
    assert choice.anywhere == bool(endpoints)


def test_a_node_without_a_zone_ignores_zones() -> None:
    hinted = slice_of(E(1, zones=("zone-a",)), E(2, zones=("zone-b",)))
    assert numbers(choose([hinted], PORT, Place("here", ""), ipv4=True).cluster) == [1, 2]


def test_ports_go_by_name_and_protocol_and_each_slice_has_its_own_number() -> None:
    slices = [
        slice_of(E(1), target=8080),
        slice_of(E(2), target=9090),
        slice_of(E(3), name="other"),
        slice_of(E(4), protocol=17),
    ]
    found = choose(slices, PORT, HERE, ipv4=True).cluster
    assert [(backend[15], int.from_bytes(backend[16:])) for backend in found] == [
        (1, 8080),
        (2, 9090),
    ]


def test_an_endpoint_in_two_slices_is_one_backend() -> None:
    """As while the controller moves it from one slice to another; ready goes before terminating."""
    slices = [slice_of(E(1, ready=False), E(2)), slice_of(E(1), E(2))]
    assert numbers(choose(slices, PORT, HERE, ipv4=True).cluster) == [1, 2]


def test_the_other_family_is_no_use() -> None:
    found = choose([slice_of(E(1))], PORT, HERE, ipv4=False)
    assert (found.cluster, found.anywhere) == ([], False)


def test_health_checks_count_ready_addresses_here_once() -> None:
    slices = [
        slice_of(E(1, "here"), E(2, "here", ready=False), E(3)),
        slice_of(E(1, "here"), E(4, "here"), name="metrics", target=9090),
    ]
    assert topology.local_ready(slices, "here", ipv4=True) == 2
    assert topology.local_ready(slices, "here", ipv4=False) == 0


def test_serving_is_what_may_have_flows() -> None:
    slices = [slice_of(E(1), E(2, ready=False))]
    assert numbers(list(topology.serving(slices, PORT))) == [1, 2]
    assert numbers(list(topology.terminating(slices, PORT))) == [2]
