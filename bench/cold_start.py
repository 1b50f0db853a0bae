# SPDX-License-Identifier: Apache-2.0
"""From empty maps to a full set of Services, as an agent does it that starts on a fresh node.

Timed: decoding the resources as the operator sends them, projecting them to rows, and the
reconciler's first full round, which compares with the kernel and writes. Each run has maps of its
own. What was written is counted in the kernel afterwards.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time

from bench import result
from bench.errors import BenchError
from bench.weir_node import WeirNode, weir_node
from weir.agent import resources
from weir.agent.reconciler import GROUPS, Reconciler
from weir.agent.tables import Projection
from weir.api import address
from weir.api.v1 import weir_pb2

RUNS = 5
# Services and endpoints of each.
SHAPES = ((10_000, 2), (5_000, 50))
TCP = 6


def encoded(services: int, endpoints: int) -> list[bytes]:
    """The operator's resources: a Service with one port and one slice each."""
    vips = ipaddress.ip_address("10.96.0.0")
    pods = ipaddress.ip_address("10.128.0.0")
    found = []
    for number in range(services):
        name = f"service-{number}"
        made = weir_pb2.Resource(name=f"service/bench/{name}")
        made.service.namespace, made.service.name = "bench", name
        made.service.cluster_ips.append(address.parse(str(vips + number + 1)))
        made.service.ports.add(name="http", protocol=TCP, port=80)
        slice_ = weir_pb2.Resource(name=f"slice/bench/{name}")
        slice_.slice.namespace, slice_.slice.service = "bench", name
        slice_.slice.ports.add(name="http", protocol=TCP, port=8080)
        for offset in range(endpoints):
            pod = address.parse(str(pods + number * endpoints + offset))
            slice_.slice.endpoints.add(address=pod, ready=True, serving=True)
        found += [made.SerializeToString(), slice_.SerializeToString()]
    return found


async def converge(node: WeirNode, wire: list[bytes]) -> float:
    """Seconds until everything is in the maps."""
    tables = {name: getattr(node.datapath.tables, name) for g in GROUPS.values() for name in g}
    start = time.perf_counter()
    projection = Projection()
    projection.apply(dict(resources.parse(item) for item in wire))
    reconciler = Reconciler(projection, tables, node.datapath)
    reconciler.release()
    running = asyncio.create_task(reconciler.run())
    await reconciler.first_done.wait()
    seconds = time.perf_counter() - start
    running.cancel()
    return seconds


def run_once(services: int, endpoints: int) -> float:
    with weir_node() as node:
        seconds = asyncio.run(converge(node, encoded(services, endpoints)))
        written = sum(1 for _ in node.datapath.tables.services.items())
        slots = sum(1 for _ in node.datapath.tables.backends.items())
        if (written, slots) != (services, services * endpoints):
            raise BenchError(f"{written} services and {slots} backends are in the maps")
    return seconds


def run() -> list[result.Result]:
    return [
        result.alone(
            f"cold start, {services} services of {endpoints} endpoints",
            "s",
            [run_once(services, endpoints) for _ in range(RUNS)],
        )
        for services, endpoints in SHAPES
    ]
