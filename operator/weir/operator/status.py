# SPDX-License-Identifier: Apache-2.0
"""Health, readiness and metrics over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from aiohttp import web

from weir.operator.config import split_listen


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of the Prometheus text format. `label` is (name, value)."""

    name: str
    value: float
    label: tuple[str, str] | None = None


HELP = {
    "weir_operator_objects": ("gauge", "Objects known, by kind."),
    "weir_operator_relists_total": ("counter", "Times that a kind was listed, by kind."),
    "weir_operator_watch_failures_total": ("counter", "Failed lists and watches, by kind."),
    "weir_operator_compiled": ("gauge", "Things that the compiler holds, by what."),
    "weir_operator_resources": ("gauge", "Resources in distribution."),
    "weir_operator_revision": ("gauge", "Revision of the resources, of this process alone."),
    "weir_operator_streams": ("gauge", "Agents connected."),
    "weir_operator_ready_nodes": ("gauge", "Agents connected that said that they are ready."),
    "weir_operator_relays": ("gauge", "Agents' announcements passed on, by agent and replica."),
    "weir_operator_snapshots": ("gauge", "Snapshots sent on streams that are open."),
    "weir_operator_compile_seconds_total": ("counter", "Time spent compiling and encoding."),
    "weir_operator_compilations_total": ("counter", "Compilations."),
    "weir_operator_problems_total": ("counter", "Problems found in objects."),
    "weir_operator_pod_cidr_conflicts": ("gauge", "Nodes whose pod CIDR is another node's."),
    "weir_operator_service_conflicts": (
        "gauge",
        "Services that claim an address or port that something else has.",
    ),
    "weir_operator_host_port_conflicts": (
        "gauge",
        "Pods that claim a port of their node that something else has.",
    ),
    "weir_operator_block_list_conflicts": (
        "gauge",
        "BlockLists with prefixes that cannot be read or would cut the cluster itself.",
    ),
    "weir_operator_cluster_policies_invalid": (
        "gauge",
        "ClusterNetworkPolicies with something that cannot be understood.",
    ),
    "weir_operator_policies_without_room": (
        "gauge",
        "Policies of which some node connected here has not all in its maps, for want of room.",
    ),
    "weir_operator_leader": ("gauge", "1 on the replica that writes to the API server."),
    "weir_operator_announced_addresses": ("gauge", "Addresses that some node announces."),
    "weir_operator_pool_ipv4_used": ("gauge", "IPv4 addresses given, by pool; the leader's."),
    "weir_operator_pool_ipv4_free": ("gauge", "IPv4 addresses left, by pool; the leader's."),
    "weir_operator_pool_ipv6_used": ("gauge", "IPv6 addresses given, by pool; the leader's."),
    "weir_operator_pool_ipv6_free": ("gauge", "IPv6 addresses left, by pool; the leader's."),
    "weir_operator_load_balancers_waiting": (
        "gauge",
        "LoadBalancer Services that did not get all that they ask for; the leader's.",
    ),
}


def render(samples: Iterable[Sample]) -> str:
    lines: list[str] = []
    last = ""
    for sample in samples:
        if sample.name != last:
            kind, text = HELP[sample.name]
            lines += [f"# HELP {sample.name} {text}", f"# TYPE {sample.name} {kind}"]
            last = sample.name
        label = f'{{{sample.label[0]}="{sample.label[1]}"}}' if sample.label else ""
        lines.append(f"{sample.name}{label} {sample.value:.10g}")
    return "\n".join(lines) + "\n"


class StatusServer:
    """Serves until closed."""

    def __init__(self, ready: Callable[[], str], samples: Callable[[], Iterable[Sample]]) -> None:
        self._ready = ready  # empty: ready; else what is missing
        self._samples = samples
        self._runners: list[web.AppRunner] = []

    async def start(self, health: str, metrics: str) -> None:
        """Listen at both "host:port"; an empty `metrics` only at `health`."""
        get_metrics = web.get("/metrics", self._get_metrics)
        routes = [
            web.get("/healthz", self._get_health),
            web.get("/readyz", self._get_ready),
            get_metrics,
        ]
        await self._serve(health, routes)
        if metrics:
            await self._serve(metrics, [get_metrics])

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()

    async def _serve(self, listen: str, routes: list[web.RouteDef]) -> None:
        app = web.Application()
        app.add_routes(routes)
        runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, *split_listen(listen)).start()

    async def _get_health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_ready(self, _request: web.Request) -> web.Response:
        missing = self._ready()
        if missing:
            return web.Response(text=f"{missing}\n", status=503)
        return web.Response(text="ok\n")

    async def _get_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            text=render(self._samples()), content_type="text/plain", charset="utf-8"
        )
