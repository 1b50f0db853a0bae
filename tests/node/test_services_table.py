# SPDX-License-Identifier: Apache-2.0
"""Every kind of Service from every place to every place, by real traffic, against an oracle.

The oracle (support/service_oracle.py) is written from kube-proxy's documentation; a case is
right if the answer, the server that gave it and the client's address that it saw are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.places import Outcome, Probe
from support.service_oracle import (
    ANY,
    DROPPED,
    REACHED,
    Backend,
    Case,
    Client,
    Expected,
    Kind,
    expect,
)
from support.service_world import SERVERS, ServiceWorld, Ways, service_world
from support.timing import SCALE

ANSWER_SECONDS = 8.0 * SCALE
SILENCE_SECONDS = 1.0 * SCALE
SOURCE_PORT = 20000
POD_BACKENDS = (Backend.SELF, Backend.NEAR, Backend.FAR)


WAYS = {
    "vxlan": Ways("vxlan"),
    "native": Ways("native"),
    "vxlan-dsr": Ways("vxlan", dsr=True),
    "native-dsr": Ways("native", dsr=True),
    "native-xdp": Ways("native", xdp=True),
    "native-xdp-dsr": Ways("native", dsr=True, xdp=True),
}


@pytest.fixture(scope="module", params=list(WAYS.values()), ids=list(WAYS))
def world(
    request: pytest.FixtureRequest, private_mounts: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceWorld]:
    with service_world(tmp_path_factory.mktemp("services"), request.param) as made:
        yield made


def cases(kind: Kind) -> list[Case]:
    if kind is Kind.HOST_PORT:  # has no traffic policy, and no place but the pod's
        found = itertools.product([False], (4, 6), ("tcp", "udp"), Client, POD_BACKENDS)
    else:
        found = itertools.product((False, True), (4, 6), ("tcp", "udp"), Client, Backend)
    return [Case(kind, *rest) for rest in found]


def wrong(world: ServiceWorld, case: Case, expected: Expected, outcome: Outcome) -> str:
    """Empty if the outcome is as expected."""
    if outcome.answer != expected.answer:
        return f"{outcome.answer} {outcome.detail}".strip()
    if expected.answer != REACHED:
        return ""
    if outcome.server != SERVERS[case.backend]:
        return f"{outcome.server} answered"
    seen = "" if expected.source == ANY else world.source_seen(case, expected.source)
    return f"seen as {outcome.source}, not {seen}" if seen not in {"", outcome.source} else ""


def failures(
    world: ServiceWorld, client: Client, wanted: list[Case], source_port: int = 0
) -> list[tuple[str, str]]:
    """(what is wrong, in which family and protocol) of each case that is."""
    expected = [expect(case, world.ways.dsr) for case in wanted]
    probes = [
        Probe(
            case.protocol,
            *world.target(case),
            SILENCE_SECONDS if one.answer == DROPPED else ANSWER_SECONDS,
            source_port,
        )
        for case, one in zip(wanted, expected, strict=True)
    ]
    found = world.place_of(client).probe(probes)
    return [
        (f"{case}: expected {one.answer}, but {problem}", f"v{case.family} {case.protocol}")
        for case, one, outcome in zip(wanted, expected, found, strict=True)
        if (problem := wrong(world, case, one, outcome))
    ]


def summary(found: Iterable[tuple[str, str]]) -> str:
    """A line for what fails alike in all families and protocols."""
    where: dict[str, list[str]] = {}
    for problem, variant in found:
        where.setdefault(problem, []).append(variant)
    return "\n".join(f"{problem} ({', '.join(names)})" for problem, names in where.items())


@pytest.mark.parametrize("kind", list(Kind))
def test_every_client_of_every_backend(world: ServiceWorld, kind: Kind) -> None:
    wanted = cases(kind)
    # One after the other would wait for each one's silence.
    with ThreadPoolExecutor(len(Client)) as threads:
        lists = threads.map(
            lambda client: failures(world, client, [c for c in wanted if c.client is client]),
            Client,
        )
        found = [problem for problems in lists for problem in problems]
    assert not found, f"{len(found)} of {len(wanted)} cases:\n" + summary(found)


@pytest.mark.parametrize("backend", [Backend.NEAR, Backend.NEAR_HOST])
def test_one_port_asks_in_every_way(world: ServiceWorld, backend: Backend) -> None:
    """One after the other: some choose the backend in the client's socket, others on the way, and
    to the backend they are one flow. What it answers comes from whom that client asked last."""
    kinds = [kind for kind in Kind if kind is not Kind.HOST_PORT]
    for client, family, kind in itertools.product(Client, (4, 6), (*kinds, *kinds)):
        case = Case(kind, True, family, "udp", client, backend)
        if expect(case, world.ways.dsr).answer == REACHED:
            found = failures(world, client, [case], SOURCE_PORT)
            assert not found, summary(found)
