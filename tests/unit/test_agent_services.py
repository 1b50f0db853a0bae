# SPDX-License-Identifier: Apache-2.0
"""Service rows: which endpoints a cluster IP leads to."""

from __future__ import annotations

import pytest

from weir.agent.resources import Service, ServicePort, Slice, SliceEndpoint
from weir.agent.services import ServiceTables
from weir.api.address import parse, text

PORT = ServicePort("p", 6, 80)


def service_slice(address: str, *, ready: bool, draining: bool = False) -> Slice:
    endpoint = SliceEndpoint(parse(address), ready, ready or draining, draining)
    return Slice("ns", "s", (ServicePort("p", 6, 8080),), (endpoint,))


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
def test_endpoints_of_each_family(slices: list[Slice], v4: list[str], v6: list[str]) -> None:
    tables = ServiceTables()
    tables.set_service(Service("ns", "s", (parse("10.96.0.1"), parse("fd00:96::1")), (PORT,)))
    for number, item in enumerate(slices):
        tables.set_slice(f"slice/ns/s-{number}", item)
    tables.project()
    found = {
        text(key.address): [text(b.address) for b in tables.backends_of(key)]
        for _, _, key in tables.listing()
    }
    assert found == {"10.96.0.1": v4, "fd00:96::1": v6}
