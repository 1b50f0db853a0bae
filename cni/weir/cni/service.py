# SPDX-License-Identifier: Apache-2.0
"""What each CNI command does, and in which order, so that no packet flows unjudged.

ADD: identity known → address → veth, host end down → map rows → programs → host end up →
remembered → answer. Until the host end is up the pod can neither send nor be reached. A
failure undoes what was done, in reverse. DEL does the same: the link goes first, so that
nothing can use it while rows and programs go, and the address last.

One container's calls run one after the other, different containers' side by side.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from weir.cni import protocol
from weir.cni.endpoint import EndpointHost, EndpointStore, LocalEndpoint, host_ifname
from weir.cni.errors import CniError, Code, JournalError, NotReady
from weir.cni.ipam import Key, Pool
from weir.cni.protocol import CniReply, CniRequest, Command
from weir.cni.wiring import Wiring

logger = logging.getLogger(__name__)

IDENTITY_SECONDS = 15.0
"""The runtime repeats a failed ADD after a second or more, a wait ends at once when the class
arrives; but the runtime also holds a slot meanwhile."""


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What `start` found: endpoints that are well, and what it took back."""

    kept: int
    endpoints_gone: int
    leases_gone: int
    links_removed: int


class KeyedLocks:
    """A lock for each key that somebody holds or awaits."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: dict[str, int] = {}

    @asynccontextmanager
    async def hold(self, key: str) -> AsyncIterator[None]:
        lock = self._locks.setdefault(key, asyncio.Lock())
        self._users[key] = self._users.get(key, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key], self._locks[key]

    def busy(self, key: str) -> bool:
        return key in self._users


class CniService:
    """Answers requests. Call `start` once before the first."""

    def __init__(
        self,
        ipam: Pool,
        wiring: Wiring,
        host: EndpointHost,
        store: EndpointStore,
        *,
        identity_seconds: float = IDENTITY_SECONDS,
    ) -> None:
        self._ipam = ipam
        self._wiring = wiring
        self._host = host
        self._store = store
        self._identity_seconds = identity_seconds
        self._locks = KeyedLocks()

    async def start(self) -> Reconciled:
        """Makes journal, endpoints and kernel agree after a crash, a reboot or a plain restart.

        The kernel is right: an endpoint whose link is gone is forgotten, a link or an address
        that no endpoint has is taken back.
        """
        links = await self._wiring.host_links()
        endpoints_gone = leases_gone = links_removed = 0
        for endpoint in list(self._store.endpoints.values()):
            link = links.get(endpoint.host_ifname)
            if link is not None and link.index == endpoint.ifindex and link.up:
                await self._ipam.claim(endpoint.container_id, endpoint.ifname, endpoint.addresses)
                await self._learn_cookie(endpoint)
                del links[endpoint.host_ifname]
                continue
            logger.info("%s: %s is gone, releasing it", endpoint.pod, endpoint.host_ifname)
            await self._tear_down((endpoint.container_id, endpoint.ifname))
            endpoints_gone += 1
        for key in list(self._ipam.leases):
            if key[0] not in self._store.endpoints:
                await self._tear_down(key)
                leases_gone += 1
        for name in links:
            await self._wiring.remove(name)
            links_removed += 1
        found = Reconciled(len(self._store.endpoints), endpoints_gone, leases_gone, links_removed)
        logger.info("pods on this node: %s", found)
        return found

    async def _learn_cookie(self, endpoint: LocalEndpoint) -> None:
        """Of a pod that was wired by a version which did not ask for it."""
        cookie = endpoint.netns_cookie or await self._wiring.netns_cookie(endpoint.netns)
        if cookie != endpoint.netns_cookie:
            await self._store.put(dataclasses.replace(endpoint, netns_cookie=cookie))

    async def handle(self, request: CniRequest) -> CniReply:
        """The answer to a request; every failure becomes a CNI error here."""
        try:
            reply = await self._dispatch(request)
        except CniError as failure:
            logger.warning("%s failed: %s", request, failure)
            return protocol.error(failure, request.version)
        except Exception as failure:
            logger.exception("%s failed", request)
            unexpected = CniError(f"internal error: {failure}", details=type(failure).__name__)
            return protocol.error(unexpected, request.version)
        # the runtime asks STATUS every few seconds
        usual = logging.DEBUG if request.command is Command.STATUS else logging.INFO
        logger.log(usual, "%s done", request)
        return reply

    async def _dispatch(self, request: CniRequest) -> CniReply:
        match request.command:
            case Command.ADD:
                async with self._locks.hold(request.container_id):
                    return await self._add(request)
            case Command.DEL:
                async with self._locks.hold(request.container_id):
                    await self._tear_down((request.container_id, request.ifname))
                return CniReply(0)
            case Command.CHECK:
                async with self._locks.hold(request.container_id):
                    return await self._check(request)
            case Command.GC:
                return await self._collect(request)
            case Command.STATUS:
                return self._status(request)
            case Command.VERSION:
                return protocol.versions(request.version)

    async def _add(self, request: CniRequest) -> CniReply:
        key = (request.container_id, request.ifname)
        known = self._store.endpoints.get(request.container_id)
        if known is not None and known.ifname != request.ifname:
            raise CniError(
                f"the container has the interface {known.ifname} of this plugin already",
                details=f"CNI_IFNAME {request.ifname!r} would be a second one",
                code=Code.INVALID_ENVIRONMENT,
            )
        await self._host.identity(request.pod, self._identity_seconds)
        try:
            if known is not None:  # asked again: wire anew, with the same addresses
                await self._unwire(key)
            addresses = await self._ipam.assign(*key)
            endpoint = await self._wiring.create(
                request.container_id,
                request.netns,
                request.ifname,
                addresses,
                request.pod,
                request.network,
            )
            await self._host.publish(endpoint)
            await self._host.attach(endpoint.host_ifname)
            await self._wiring.bring_up(endpoint)
            await self._store.put(endpoint)
        except BaseException:  # a cancelled ADD leaves nothing either
            await self._undo(request, key)
            raise
        return protocol.result(request, endpoint, self._wiring.mtu)

    async def _undo(self, request: CniRequest, key: Key) -> None:
        try:
            await self._tear_down(key)
        except CniError as failure:
            # the lease stays, so that DEL, GC or the next start finds it
            logger.error("%s: could not be undone: %s", request, failure)  # noqa: TRY400 expected

    async def _unwire(self, key: Key) -> None:
        """Link, then programs and rows: in between, nothing is reachable by the link."""
        endpoint = self._store.endpoints.get(key[0])
        await self._wiring.remove(host_ifname(*key))
        if endpoint is None or endpoint.ifname == key[1]:
            await self._host.withdraw(key[0])
            try:
                await self._store.drop(key[0])
            except JournalError as failure:
                logger.warning("%s: forgotten in memory only: %s", key[0], failure)

    async def _tear_down(self, key: Key) -> None:
        """Takes everything back; what is not there is fine. An address is given back only
        once nothing can use it: a kernel that refuses makes this fail, to be repeated."""
        await self._unwire(key)
        try:
            await self._ipam.release(*key)
        except JournalError as failure:
            logger.warning("%s: released in memory only: %s", key[0], failure)

    async def _check(self, request: CniRequest) -> CniReply:
        endpoint = self._store.endpoints.get(request.container_id)
        if endpoint is None or endpoint.ifname != request.ifname:
            raise CniError(
                f"container {request.container_id} has no interface {request.ifname} of ours",
                code=Code.UNKNOWN_CONTAINER,
            )
        seen = dataclasses.replace(endpoint, netns=request.netns)
        differences = protocol.prev_result_differs(request, endpoint)
        differences += await self._wiring.describe(seen)
        if differences:
            raise CniError(
                f"{request.ifname} is not as it was set up",
                details="; ".join(differences),
                code=Code.DIFFERS,
            )
        return CniReply(0)

    async def _collect(self, request: CniRequest) -> CniReply:
        """Takes back what the runtime no longer knows, and what no endpoint has.

        Without a list (cnitool sends none) only what has no link any more goes: to read it as
        "nothing lives" would cut off every pod. Containers with a call under way are left
        alone: the runtime may have made its list before it.
        """
        mine = [e for e in self._store.endpoints.values() if e.network == request.network]
        if request.valid is None:
            links = await self._wiring.host_links()
            gone = [e for e in mine if e.host_ifname not in links]
        else:
            gone = [e for e in mine if (e.container_id, e.ifname) not in request.valid]
        garbage = [(e.container_id, e.ifname) for e in gone]
        garbage += [key for key in self._ipam.leases if key[0] not in self._store.endpoints]
        failures = []
        for key in garbage:
            if self._locks.busy(key[0]):
                continue
            async with self._locks.hold(key[0]):
                try:
                    await self._tear_down(key)
                except CniError as failure:
                    failures.append(f"{key[0]}: {failure}")
                else:
                    logger.info("GC released %s %s", *key)
        if failures:
            raise CniError(
                "some containers could not be cleaned up",
                details="; ".join(failures),
                code=Code.WIRING,
            )
        return CniReply(0)

    def _status(self, request: CniRequest) -> CniReply:
        try:
            self._ipam.check()
            self._host.status()
        except NotReady as failure:
            code = Code.NOT_AVAILABLE_LIMITED if failure.limited else Code.NOT_AVAILABLE
            raise CniError(failure.message, details=failure.details, code=code) from failure
        return CniReply(0)
