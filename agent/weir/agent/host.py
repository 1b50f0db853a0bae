# SPDX-License-Identifier: Apache-2.0
"""What weir.cni asks of the agent for a pod (EndpointHost): identity, map rows, programs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable
from math import inf
from typing import Protocol

from weir.agent.errors import Rejected
from weir.agent.gate import Gate
from weir.agent.reconciler import Reconciler
from weir.agent.tables import Projection
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.cni.errors import NotReady, Refused
from weir.datapath.errors import DatapathError, DeviceGone

logger = logging.getLogger(__name__)

PUBLISH_SECONDS = 20.0
# Settling a pod holds the kernel's RTNL lock for some 30 ms, and so does its end: not beside ADDs,
# not in a row, and not for pods that come and go.
QUIET_SECONDS = 5.0
STAY_SECONDS = 60.0
SETTLE_GAP_SECONDS = 0.25


class Attacher(Protocol):
    """The part of a Datapath that pods need. Blocks."""

    def attach_pod(self, ifname: str) -> None: ...

    def settle_pod(self, ifname: str) -> bool: ...

    def detach_pod(self, ifname: str) -> None: ...


class Announcer(Protocol):
    def announce(self, endpoint: LocalEndpoint) -> None: ...

    def withdraw(self, uid: str) -> None: ...


class AgentHost:
    """`why_not` says what keeps the agent from wiring pods, "" if nothing does."""

    def __init__(
        self,
        projection: Projection,
        reconciler: Reconciler,
        datapath: Callable[[], Attacher],
        gate: Gate,
        announcer: Announcer,
        why_not: Callable[[], str],
        *,
        unmanaged: bool = False,
    ) -> None:
        self._projection = projection
        self._reconciler = reconciler
        self._datapath = datapath
        self._gate = gate
        self._announcer = announcer
        self._why_not = why_not
        self._unmanaged = unmanaged
        self._attached_at: dict[str, float] = {}

    async def identity(self, pod: PodRef, timeout: float) -> None:  # noqa: ASYNC109  EndpointHost's
        self.status()
        if not pod.uid:
            if self._unmanaged:
                return
            raise Refused(
                "not a pod: K8S_POD_UID is missing",
                details="set unmanaged in the agent's configuration to wire other containers",
            )
        try:
            async with asyncio.timeout(timeout):
                while not self._projection.placement.has_identity(pod.uid):
                    await self._reconciler.next_round()
        except TimeoutError as error:
            raise NotReady(
                f"the operator has not told the class of pod {pod} yet",
                details=f"waited {timeout:g} s for uid {pod.uid}",
            ) from error

    async def publish(self, endpoint: LocalEndpoint) -> None:
        self._projection.set_endpoint(endpoint)
        try:
            async with asyncio.timeout(PUBLISH_SECONDS):
                await self._reconciler.flush()
            keys: set[Hashable] = set(endpoint.addresses)
            located = [self._projection.placement.located(addr) for addr in endpoint.addresses]
            if any(item is None for item in located):
                raise NotReady(f"{endpoint.pod} was withdrawn while it was published")
            self._reconciler.require_written(
                f"pod {endpoint.pod}", {"endpoints": keys, "addresses": keys}
            )
        except Rejected as error:
            raise Refused(
                "no room in the datapath's maps",
                details=f"{error}: raise maps.* in the chart's values",
            ) from error
        except (DatapathError, TimeoutError) as error:
            raise NotReady(
                "the datapath's maps cannot be written now",
                details=str(error) or f"not done in {PUBLISH_SECONDS:g} s",
            ) from error
        self._announcer.announce(endpoint)

    async def attach(self, ifname: str) -> None:
        self._attached_at[ifname] = asyncio.get_running_loop().time()
        try:
            async with self._gate.use():
                await asyncio.to_thread(self._datapath().attach_pod, ifname)
        except DatapathError as error:
            raise Refused(f"cannot attach the programs to {ifname}", details=str(error)) from error

    async def settle(self) -> None:
        """Moves pods that have come to stay to the faster attachment, one at a time while no
        pod is being wired."""
        clock = asyncio.get_running_loop().time
        for container_id, endpoint in list(self._projection.placement.local.items()):
            ifname = endpoint.host_ifname
            if clock() - max(self._attached_at.values(), default=-inf) < QUIET_SECONDS:
                return
            if clock() - self._attached_at.get(ifname, -inf) < STAY_SECONDS:
                continue
            if container_id not in self._projection.placement.local:
                continue
            try:
                async with self._gate.use():
                    settled = await asyncio.to_thread(self._datapath().settle_pod, ifname)
            except DeviceGone:
                continue
            except DatapathError as error:
                logger.warning("%s stays on filters: %s", endpoint.pod, error)
                continue
            if settled:
                await asyncio.sleep(SETTLE_GAP_SECONDS)

    async def withdraw(self, container_id: str) -> None:
        endpoint = self._projection.placement.local.get(container_id)
        if endpoint is None:
            return
        self._attached_at.pop(endpoint.host_ifname, None)
        try:
            async with self._gate.use():
                await asyncio.to_thread(self._datapath().detach_pod, endpoint.host_ifname)
        except DeviceGone:
            pass
        except DatapathError as error:
            # The device goes with the pod, and its programs with it.
            logger.warning("%s: detaching: %s", endpoint.pod, error)
        self._projection.remove_endpoint(container_id)
        self._announcer.withdraw(endpoint.pod.uid)
        self._reconciler.wake()

    def status(self) -> None:
        reason = self._why_not()
        if reason:
            raise NotReady(f"the agent is not ready: {reason}")
