# SPDX-License-Identifier: Apache-2.0
"""HTTP of the agent: the command line's API on a unix socket, health and metrics on a port."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec
from aiohttp import web

from weir.agent import metrics, views
from weir.agent.conntrack import BadFilter, Filter, parse_filter
from weir.agent.events import DROPS, EVERYTHING, Events
from weir.agent.flows import Flows
from weir.agent.reconciler import Reconciler
from weir.agent.stream import StreamState
from weir.agent.troubles import troubles as left_out
from weir.agent.walks import Exchanged
from weir.agent.why import BadQuestion
from weir.datapath.errors import DatapathError
from weir.datapath.records import Metric, MetricKey

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
EXCHANGED = "the datapath was exchanged meanwhile: do it again"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Agent(Protocol):
    """What the API shows."""

    reconciler: Reconciler
    events: Events
    flows: Flows

    @property
    def stream_state(self) -> StreamState: ...

    def status(self) -> views.StatusView: ...

    def why_not(self) -> str: ...

    async def counters(self) -> list[tuple[MetricKey, Metric]]: ...


def local_api(agent: Agent) -> web.Application:
    async def status(_request: web.Request) -> web.Response:
        return _json(agent.status())

    async def endpoints(_request: web.Request) -> web.Response:
        return _json(views.endpoints(agent.reconciler.projection))

    async def services(_request: web.Request) -> web.Response:
        return _json(views.services(agent.reconciler.projection))

    async def policies(_request: web.Request) -> web.Response:
        return _json(views.policies(agent.reconciler.projection))

    app = web.Application()
    app.router.add_get("/v1/status", status)
    app.router.add_get("/v1/endpoints", endpoints)
    app.router.add_get("/v1/services", services)
    app.router.add_get("/v1/policies", policies)
    app.router.add_get("/v1/events", _events(agent))
    app.router.add_get("/v1/policy/why", _why(agent))
    app.router.add_get("/v1/policy/denials", _denials(agent))
    app.router.add_get("/v1/ct", _ct_list(agent))
    app.router.add_post("/v1/ct/flush", _ct_flush(agent))
    return app


def _why(agent: Agent) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        try:
            troubles = left_out(agent.reconciler)
            return _json(await agent.flows.why.answer(request.query, troubles))
        except BadQuestion as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        except (DatapathError, Exchanged) as error:
            raise web.HTTPServiceUnavailable(text=str(error) or EXCHANGED) from error

    return answer


def _denials(agent: Agent) -> Handler:
    async def denials(_request: web.Request) -> web.Response:
        try:
            return _json(await agent.flows.denials.listed())
        except (DatapathError, Exchanged) as error:
            raise web.HTTPServiceUnavailable(text=str(error) or EXCHANGED) from error

    return denials


def _filter(request: web.Request) -> Filter:
    try:
        return parse_filter(request.query)
    except BadFilter as error:
        raise web.HTTPBadRequest(text=str(error)) from error


def _ct_list(agent: Agent) -> Handler:
    async def ct_list(request: web.Request) -> web.StreamResponse:
        wanted = _filter(request)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        try:
            async for lines in agent.flows.conntrack.lines(wanted):
                await response.write(lines)
            # The last line says that this was all of it.
            await response.write(b"{}\n")
        except (DatapathError, Exchanged) as error:
            logger.warning("listing flows: %s", error or "the datapath was exchanged")
        except ConnectionError:
            logger.debug("who listed flows has gone")
        return response

    return ct_list


def _ct_flush(agent: Agent) -> Handler:
    async def ct_flush(request: web.Request) -> web.Response:
        wanted = _filter(request)
        if not wanted and request.query.get("all") != "1":
            raise web.HTTPBadRequest(text="neither a filter nor all=1")
        try:
            gone = await agent.flows.conntrack.flush(wanted)
        except (DatapathError, Exchanged) as error:
            raise web.HTTPServiceUnavailable(text=str(error) or EXCHANGED) from error
        logger.info("flushed %d flows (%s)", gone, dict(request.query))
        return _json({"flows": gone})

    return ct_flush


def _events(agent: Agent) -> Handler:
    async def events(request: web.Request) -> web.StreamResponse:
        mask = EVERYTHING if request.query.get("all") == "1" else DROPS
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        async with agent.events.subscribe(mask) as subscriber:
            # The first line says that events flow from now on.
            await response.write(b"{}\n")
            while True:
                try:
                    async with asyncio.timeout(HEARTBEAT_SECONDS):
                        line = msgspec.json.encode(await subscriber.get())
                except TimeoutError:
                    # Finds out whether the client is still there.
                    line = b"{}"
                try:
                    await response.write(line + b"\n")
                except ConnectionError:
                    return response

    return events


def health(agent: Agent) -> web.Application:
    async def healthz(_request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_request: web.Request) -> web.Response:
        reason = agent.why_not()
        return web.Response(text=f"{reason or 'ok'}\n", status=503 if reason else 200)

    async def scrape(_request: web.Request) -> web.Response:
        counters = await agent.counters()
        families = metrics.datapath_families(counters)
        families += metrics.agent_families(
            agent.reconciler, agent.stream_state, not agent.why_not()
        )
        families += metrics.flow_families(agent.flows)
        return web.Response(
            text=metrics.render(families), headers={"Content-Type": "text/plain; version=0.0.4"}
        )

    app = web.Application()
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", scrape)
    return app


def unix_socket(path: Path) -> socket.socket:
    """Takes the path over by a rename; root's alone from the first moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(fresh))
        fresh.chmod(0o600)
        listener.listen(64)
        listener.setblocking(False)
        fresh.rename(path)
    except OSError:
        listener.close()
        raise
    return listener


def listeners(address: str, port: int) -> list[socket.socket]:
    """On the loopback, where the kubelet asks, and on the address, if the node has it."""
    wide = ipaddress.ip_address(address).is_unspecified  # the loopback is one of them
    found: list[socket.socket] = []
    for host in [address] if wide else dict.fromkeys(("127.0.0.1", address)):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            listener = socket.create_server(
                (host, port), family=family, backlog=64, dualstack_ipv6=wide and ":" in host
            )
        except OSError as error:
            if not found:
                raise
            logger.error("metrics are not served on %s: %s", host, error)  # noqa: TRY400  expected
            continue
        listener.setblocking(False)
        found.append(listener)
    return found


async def serve(app: web.Application, *bound: socket.socket) -> None:
    """Until cancelled. Streams under way are cut."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        for listener in bound:
            await web.SockSite(runner, listener).start()
        await asyncio.get_running_loop().create_future()
    finally:
        await runner.cleanup()


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
