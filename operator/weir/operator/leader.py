# SPDX-License-Identifier: Apache-2.0
"""Which replica writes: the holder of Lease `weir-operator`.

Only for what every replica sees alike (Events on bad objects); all replicas serve agents. Time
is measured by our own clock from when the Lease was last seen to change, never by comparing
clocks. A holder that cannot renew steps down before others may take over.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import Callable

import msgspec

from weir.operator.api import Api, ApiError
from weir.operator.wire import Struct

logger = logging.getLogger(__name__)

NAME = "weir-operator"
LEASE_SECONDS = 15.0
RENEW_SECONDS = 10.0  # without a renewal for so long, the holder steps down
RETRY_SECONDS = 2.0
RELEASE_SECONDS = 2.0  # at most, for an API server that does not answer must not delay the end


class _Meta(Struct):
    resource_version: str = ""


class _Spec(Struct):
    holder_identity: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None
    acquire_time: str | None = None


class _Lease(Struct):
    metadata: _Meta
    spec: _Spec = msgspec.field(default_factory=_Spec)


class Leader:
    """Runs until cancelled; `leading` and `on_change` tell the outcome."""

    def __init__(
        self,
        api: Api,
        namespace: str,
        identity: str,
        on_change: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._path = f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
        self._identity = identity
        self._on_change = on_change
        self._clock = clock
        self._seen: tuple[str | None, str | None] = (None, None)  # holder and time of renewal
        self._seen_at = clock()
        self._renewed = clock()
        self.leading = False

    async def run(self) -> None:
        while True:
            await self.step()
            await asyncio.sleep(RETRY_SECONDS)

    async def step(self) -> None:
        """One attempt to take or keep the Lease."""
        asked = self._clock()
        try:
            held = await asyncio.wait_for(self._attempt(), RENEW_SECONDS / 2)
        except (ApiError, TimeoutError) as error:
            logger.warning("lease: %s", error or "no answer in time")
            if self.leading and self._clock() - self._renewed > RENEW_SECONDS:
                self._set(False)
            return
        if held:
            self._renewed = asked
        self._set(held)

    async def release(self) -> None:
        """Let another replica lead at once."""
        if not self.leading:
            return
        self._set(False)
        try:
            await asyncio.wait_for(self._give_up(), RELEASE_SECONDS)
        except (ApiError, TimeoutError) as error:
            logger.info("lease not released: %s", error or "no answer in time")

    async def _give_up(self) -> None:
        lease = await self._get()
        if lease is not None and lease.spec.holder_identity == self._identity:
            await self._put(lease, holder="")

    async def _attempt(self) -> bool:
        lease = await self._get()
        try:
            if lease is None:
                await self._api.post(self._path, self._body(_Lease(_Meta()), self._identity))
                return True
            holder = lease.spec.holder_identity or ""
            if holder and holder != self._identity:
                now = self._clock()
                seen = (holder, lease.spec.renew_time)
                if seen != self._seen:
                    self._seen, self._seen_at = seen, now
                if now - self._seen_at < LEASE_SECONDS:
                    return False
            await self._put(lease, self._identity)
        except ApiError as error:
            if error.status == 409:  # another was first
                return False
            raise
        return True

    async def _get(self) -> _Lease | None:
        try:
            return msgspec.json.decode(await self._api.get(f"{self._path}/{NAME}"), type=_Lease)
        except msgspec.DecodeError as error:
            raise ApiError(f"GET {self._path}/{NAME}", 200, f"cannot be read: {error}") from error
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _put(self, lease: _Lease, holder: str) -> None:
        await self._api.put(f"{self._path}/{NAME}", self._body(lease, holder))

    def _body(self, lease: _Lease, holder: str) -> dict[str, object]:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        now = now.replace("+00:00", "Z")
        changes = lease.spec.holder_identity != holder
        metadata = {"name": NAME}
        if lease.metadata.resource_version:
            metadata["resourceVersion"] = lease.metadata.resource_version
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": int(LEASE_SECONDS) if holder else 1,
                "acquireTime": now if changes else lease.spec.acquire_time,
                "renewTime": now,
                "leaseTransitions": (lease.spec.lease_transitions or 0) + changes,
            },
        }

    def _set(self, leading: bool) -> None:
        if leading != self.leading:
            self.leading = leading
            logger.info("lease: %s", "leading" if leading else "not leading")
            self._on_change(leading)
