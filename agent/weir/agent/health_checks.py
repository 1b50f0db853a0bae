# SPDX-License-Identifier: Apache-2.0
"""What load balancers outside ask a node: may it have traffic? Answers as kube-proxy gives them.

A Service's healthCheckNodePort says whether the node has ready endpoints of it. /healthz on a port
of its own says whether the node serves Services at all. Clouds and MetalLB-like tools go by status,
headers and body, so these are kube-proxy's to the letter (pkg/proxy/healthcheck).

The set of ports follows the projection; each is bound on all node-port addresses, and one that is
taken is tried again later while the rest goes on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from aiohttp import web

from weir.agent.frontends import NodePortRule
from weir.agent.services import ServiceName, ServiceTables
from weir.api.address import Addr, is_ipv4, text

logger = logging.getLogger(__name__)

RETRY_SECONDS = 10.0
BACKLOG = 64
# Where kube-proxy serves its metrics. Programs that look for its mode there find ours.
MODE_PORT = 10249
MODE = "ebpf"
ANY = {True: "0.0.0.0", False: "::"}  # noqa: S104  as kube-proxy; nodePortAddresses narrows it
FAMILIES = {True: "IPv4", False: "IPv6"}


class Place(NamedTuple):
    ipv4: bool
    address: str
    port: int


class Listening(NamedTuple):
    """What a port answers for; service None: /healthz, or /proxyMode at its port."""

    site: web.SockSite
    service: ServiceName | None


class HealthChecks:
    """`healthy`: whether Services are served as they should be. `eligible`: whether this node is
    there to stay. `proxy_port` 0: neither /healthz nor /proxyMode."""

    def __init__(
        self,
        tables: ServiceTables,
        rule: NodePortRule,
        proxy_port: int,
        healthy: Callable[[], bool],
        eligible: Callable[[], bool],
    ) -> None:
        self._tables = tables
        self._rule = rule
        self._proxy_port = proxy_port
        self._healthy = healthy
        self._eligible = eligible
        self._listening: dict[Place, Listening] = {}
        self.errors: dict[Place, str] = {}
        self._updated = datetime.now(UTC)

    async def run(self, changed: Callable[[], Awaitable[None]]) -> None:
        """Until cancelled. `changed` returns an awaitable that ends when something may have."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            while True:
                if await self.converge(runner) != self.wanted():
                    continue  # a change that `changed` was not there for
                try:
                    async with asyncio.timeout(RETRY_SECONDS if self.errors else None):
                        await changed()
                except TimeoutError:
                    continue
        finally:
            self._listening.clear()
            await runner.cleanup()

    async def converge(self, runner: web.AppRunner) -> dict[Place, ServiceName | None]:
        """Returns what was wanted as it began."""
        wanted = self.wanted()
        for place in [place for place in self._listening if place not in wanted]:
            await self._listening.pop(place).site.stop()
        for place in self.errors.keys() - wanted.keys():
            del self.errors[place]
        for place, service in wanted.items():
            known = self._listening.get(place)
            if known is not None:
                self._listening[place] = known._replace(service=service)
                continue
            try:
                listener = _bind(place)
            except OSError as error:
                if self.errors.get(place) != str(error):
                    what = "/healthz" if service is None else f"service {'/'.join(service)}"
                    logger.error(  # noqa: TRY400  expected, and told once
                        "health check of %s: port %d at %s: %s",
                        what,
                        place.port,
                        place.address,
                        error,
                    )
                self.errors[place] = str(error)
                continue
            self.errors.pop(place, None)
            site = web.SockSite(runner, listener)
            await site.start()
            self._listening[place] = Listening(site, service)
        return wanted

    def wanted(self) -> dict[Place, ServiceName | None]:
        ports: dict[int, ServiceName | None] = {}
        for name, port in self._tables.health_checks.items():
            ports.setdefault(port, name)
        addresses = self._tables.facts.node_ports_at
        found: dict[Place, ServiceName | None] = {
            place: service
            for port, service in ports.items()
            for place in _places(self._rule, addresses, port)
        }
        if self._proxy_port:
            everywhere = _places(NodePortRule(), addresses, self._proxy_port)
            found |= dict.fromkeys([*everywhere, Place(True, "127.0.0.1", MODE_PORT)])
        return found

    async def _answer(self, request: web.Request) -> web.Response:
        transport = request.transport
        local = transport.get_extra_info("sockname") if transport is not None else None
        for place, (_, service) in self._listening.items():
            if local is not None and place.port == local[1] and place.ipv4 == (len(local) == 2):
                if place.port == MODE_PORT and service is None:
                    return _mode(request.path)
                if service is None:
                    return self._proxy(request.path)
                return self._service(service, ipv4=place.ipv4)
        return web.Response(status=503)  # the Service went while the client was asking

    def _service(self, name: ServiceName, *, ipv4: bool) -> web.Response:
        count = self._tables.local_endpoints(name, ipv4=ipv4)
        healthy = self._healthy()
        namespace, service = name
        body = (
            f'{{\n\t"service": {{\n\t\t"namespace": "{namespace}",\n'
            f'\t\t"name": "{service}"\n\t}},\n'
            f'\t"localEndpoints": {count},\n\t"serviceProxyHealthy": {str(healthy).lower()}\n}}'
        )
        return _json(
            body.encode(),
            200 if count and healthy else 503,
            {"X-Load-Balancing-Endpoint-Weight": str(count)},
        )

    def _proxy(self, path: str) -> web.Response:
        if path not in {"/healthz", "/livez"}:
            return web.Response(status=404, text="404 page not found\n")
        healthy, eligible, now = self._healthy(), self._eligible(), datetime.now(UTC)
        fine = healthy and (eligible or path == "/livez")
        if fine:
            self._updated = now
        body: dict[str, object] = {"lastUpdated": self._updated, "currentTime": now}
        if path == "/healthz":
            body["nodeEligible"] = eligible
        families = {FAMILIES[is_ipv4(addr)] for addr in self._tables.facts.node_ports_at}
        one = {"lastUpdated": self._updated, "healthy": healthy}
        body |= {"healthy": healthy, "status": dict.fromkeys(sorted(families), one)}
        return _json(msgspec.json.encode(body), 200 if fine else 503, {})


def _mode(path: str) -> web.Response:
    if path != "/proxyMode":
        return web.Response(status=404, text="404 page not found\n")
    return web.Response(text=MODE)


def _places(rule: NodePortRule, addresses: tuple[Addr, ...], port: int) -> list[Place]:
    """All of a family by one socket, as the loopback is then one of them."""
    found: list[Place] = []
    for ipv4 in (True, False):
        narrowed = rule.primary or any(cidr.is_ipv4 == ipv4 for cidr in rule.cidrs)
        of_family = [text(addr) for addr in addresses if is_ipv4(addr) == ipv4]
        if of_family and not narrowed:
            of_family = [ANY[ipv4]]
        found += [Place(ipv4, address, port) for address in of_family]
    return found


def _bind(place: Place) -> socket.socket:
    family = socket.AF_INET if place.ipv4 else socket.AF_INET6
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if not place.ipv4:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((place.address, place.port))
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _json(body: bytes, status: int, headers: dict[str, str]) -> web.Response:
    return web.Response(
        body=body,
        status=status,
        content_type="application/json",
        headers={"X-Content-Type-Options": "nosniff", **headers},
    )
