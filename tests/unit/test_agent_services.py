# SPDX-License-Identifier: Apache-2.0
"""Service rows: which endpoints a cluster IP leads to."""

from __future__ import annotations

import pytest

from weir.agent.backends import backend_rows, pack
from weir.agent.resources import Service, ServicePort, Slice
from weir.agent.resources import parse as parse_resource
from weir.agent.services import ServiceTables
from weir.agent.tables import Projection
from weir.api.address import parse, text
from weir.api.v1 import weir_pb2 as pb
from weir.datapath.records import Backend, BackendKey

PORT = ServicePort("p", 6, 80)


def service_slice(address: str, *, ready: bool, draining: bool = False) -> pb.Slice:
    endpoint = pb.SliceEndpoint(
        address=parse(address), ready=ready, serving=ready or draining, terminating=draining
    )
    ports = [pb.SlicePort(name="p", protocol=6, port=8080)]
    return pb.Slice(namespace="ns", service="s", ports=ports, endpoints=[endpoint])


def projected(resources: list[pb.Resource]) -> Projection:
    projection = Projection()
    projection.apply(dict(parse_resource(item.SerializeToString()) for item in resources))
    projection.take()
    return projection


@pytest.mark.parametrize(
    ("slices", "v4", "v6"),
    [
        pytest.param(
            [
                service_slice("10.0.0.1", ready=True),
                service_slice("fd00::1", ready=False, draining=True),
            ],
            ["10.0.0.1"],
            ["fd00::1"],
            id="one family drains while the other is ready",
        ),
        pytest.param(
            [
                service_slice("10.0.0.1", ready=True),
                service_slice("10.0.0.2", ready=False, draining=True),
            ],
            ["10.0.0.1"],
            [],
            id="ready ones go before those that drain",
        ),
        pytest.param(
            [service_slice("10.0.0.1", ready=False), service_slice("fd00::1", ready=True)],
            [],
            ["fd00::1"],
            id="not ready",
        ),
    ],
)
def test_endpoints_of_each_family(slices: list[pb.Slice], v4: list[str], v6: list[str]) -> None:
    vips = [parse("10.96.0.1"), parse("fd00:96::1")]
    ports = [pb.ServicePort(name="p", protocol=6, port=80)]
    service = pb.Service(namespace="ns", name="s", cluster_ips=vips, ports=ports)
    named = [pb.Resource(name=f"slice/ns/s-{n}", slice=item) for n, item in enumerate(slices)]
    projection = projected([pb.Resource(name="service/ns/s", service=service), *named])
    backends = projection.table("backends").rows
    found = {
        text(key.address): [
            text(backends[BackendKey(row.id, slot)].address) for slot in range(row.count)
        ]
        for key, row in projection.table("services").rows.items()
    }
    assert found == {"10.96.0.1": v4, "fd00:96::1": v6}


def test_packed_rows_are_a_mapping_of_records() -> None:
    rows = backend_rows()
    first, second = (Backend(parse(a), 8080) for a in ("10.0.0.1", "fd00::1"))
    rows.put(7, pack([first, second]))
    assert dict(rows.rows) == {BackendKey(7, 0): first, BackendKey(7, 1): second}
    assert len(rows) == len(rows.rows) == 2
    assert rows.rows.get(BackendKey(7, 2)) is None
    assert rows.rows.get(BackendKey(8, 0)) is None
    assert {key: change.new for key, change in rows.take().items()} == dict(rows.rows)
    assert rows.take() == {}
    rows.drop(7)
    assert {key: change.old for key, change in rows.take().items()} == {
        BackendKey(7, 0): first,
        BackendKey(7, 1): second,
    }
    assert not rows.rows


def test_an_id_that_came_and_went_between_two_plans_is_no_change() -> None:
    rows = backend_rows()
    rows.put(7, pack([Backend(parse("10.0.0.1"), 80)]))
    rows.drop(7)
    assert rows.take() == {}
    assert len(rows) == 0


def test_a_claimed_address_goes_to_who_waits_for_it() -> None:
    tables = ServiceTables()
    vip = parse("10.96.0.1")
    for name, address in (("first", "10.0.0.1"), ("second", "10.0.0.2"), ("third", "10.0.0.3")):
        tables.set_service(Service("ns", name, (vip,), (PORT,)))
        tables.set_slice(
            f"slice/ns/{name}",
            Slice("ns", name, (ServicePort("p", 6, 8080),), parse(address), b""),
        )
        tables.project()
    (key,) = tables.services.rows
    seen = []
    for name in ("first", "third", "second"):
        seen.append([text(backend.address) for backend in tables.backends_of(key)])
        tables.remove_service(("ns", name))
        tables.project()
    assert seen == [["10.0.0.1"], ["10.0.0.2"], ["10.0.0.2"]]
    assert not tables.services.rows
    assert not tables.backends.rows
