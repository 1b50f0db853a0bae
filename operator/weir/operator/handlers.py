# SPDX-License-Identifier: Apache-2.0
"""kopf handlers: what acts on objects, as opposed to the bulk state that reflectors carry.

kopf runs in a thread and loop of its own, because on exit it cancels every task of its loop, and
its work would delay streams. Handlers decide nothing and keep nothing: they parse and hand over
to the main loop. They return None, or kopf would patch the object.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, cast

import kopf
import msgspec

from weir.operator import policy, services, wire
from weir.operator.kubeconfig import Access
from weir.operator.objects import Problem
from weir.operator.writes import TAINT, Reference

logger = logging.getLogger(__name__)

LOGIN_LIFE = datetime.timedelta(minutes=1)  # then kopf asks for server and token again
LOOK_SECONDS = 1.0
RETRY_SECONDS = 5.0

Report = Callable[[Reference, tuple[Problem, ...]], None]
OnTainted = Callable[[str], None]


class _NoProgress(kopf.ProgressStorage):
    """Event handlers have no progress to keep on objects."""

    def fetch(self, **_: object) -> None:
        return None

    def store(self, **_: object) -> None:
        return None

    def purge(self, **_: object) -> None:
        return None

    def touch(self, **_: object) -> None:
        return None

    def clear(self, *, essence: Any) -> Any:
        return essence


class _NoDiffBase(kopf.DiffBaseStorage):
    """Nor a last state to compare with."""

    def build(self, **_: object) -> Any:
        return {}

    def fetch(self, **_: object) -> None:
        return None

    def store(self, **_: object) -> None:
        return None


def node_handlers(on_tainted: OnTainted) -> kopf.OperatorRegistry:
    """Every replica runs these: which one takes the taint off depends on where the agent is."""
    registry = kopf.OperatorRegistry()

    @kopf.on.event("", "v1", "nodes", registry=registry)
    async def node_seen(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002
        taints = body.get("spec", {}).get("taints") or []
        if type != "DELETED" and any(taint.get("key") == TAINT for taint in taints):
            on_tainted(str(body["metadata"]["name"]))

    return registry


def problem_handlers(report: Report) -> kopf.OperatorRegistry:
    """The leader runs these."""
    registry = kopf.OperatorRegistry()

    @kopf.on.event("", "v1", "services", registry=registry)
    async def service_seen(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002
        if type != "DELETED":
            raw = cast("Mapping[str, object]", body)
            judge("v1", "Service", raw, service_problems, report)

    @kopf.on.event("networking.k8s.io", "v1", "networkpolicies", registry=registry)
    async def policy_seen(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002
        if type != "DELETED":
            raw = cast("Mapping[str, object]", body)
            judge("networking.k8s.io/v1", "NetworkPolicy", raw, policy_problems, report)

    return registry


def service_problems(body: Mapping[str, object]) -> tuple[Problem, ...]:
    return services.parse_service(msgspec.convert(dict(body), wire.Service)).problems


def policy_problems(body: Mapping[str, object]) -> tuple[Problem, ...]:
    return policy.parse_policy(msgspec.convert(dict(body), wire.NetworkPolicy)).problems


def judge(
    api_version: str,
    kind: str,
    body: Mapping[str, object],
    problems_of: Callable[[Mapping[str, object]], tuple[Problem, ...]],
    report: Report,
) -> None:
    try:
        meta = msgspec.convert({"metadata": dict(cast("Any", body["metadata"]))}, wire.Named)
    except (KeyError, TypeError, ValueError, msgspec.ValidationError) as error:
        logger.warning("%s: an object without readable metadata: %s", kind, error)
        return
    try:
        problems = problems_of(body)
    except msgspec.ValidationError as error:
        problems = (Problem("", f"cannot be read: {error}"),)
    if problems:
        about = meta.metadata
        reference = Reference(
            api_version,
            kind,
            about.namespace,
            about.name,
            about.uid,
            about.resource_version,
            about.generation or 0,
        )
        report(reference, problems)


class KopfThread:
    """One kopf operator over a registry, from `start` to `stop`."""

    def __init__(
        self,
        name: str,
        access: Access,
        registry: kopf.OperatorRegistry,
        server: Callable[[], str],
    ) -> None:
        """`server` tells, from any thread, which API server answers at present."""
        self._name = name
        self._registry = registry
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"kopf {name}", daemon=True)

        @kopf.on.login(registry=registry)
        def login(**_: Any) -> kopf.ConnectionInfo:
            return kopf.ConnectionInfo(
                server=server(),
                ca_data=access.ca or None,
                token=access.current_token() or None,
                certificate_data=access.cert or None,
                private_key_data=access.key or None,
                expiration=datetime.datetime.now(datetime.UTC) + LOGIN_LIFE,
            )

    def start(self) -> None:
        self._thread.start()

    async def watch(self) -> None:
        """Never returns. RuntimeError if the thread is dead, which must not go unnoticed."""
        while self._thread.is_alive():  # noqa: ASYNC110 - threads tell nobody when they die
            await asyncio.sleep(LOOK_SECONDS)
        raise RuntimeError(f"kopf {self._name}: its thread is dead")

    async def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, 5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                asyncio.run(self._operate())
            except (Exception, asyncio.CancelledError):
                # kopf ends on errors that it does not know; its watch then starts afresh.
                logger.exception("kopf %s failed", self._name)
            if not self._stop.wait(RETRY_SECONDS):
                logger.warning("kopf %s ended: again", self._name)

    async def _operate(self) -> None:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.scanning.disabled = True
        settings.persistence.progress_storage = _NoProgress()
        settings.persistence.diffbase_storage = _NoDiffBase()
        settings.queueing.idle_timeout = 0.5
        settings.watching.chunk_size = 500
        await kopf.operator(
            registry=self._registry,
            settings=settings,
            clusterwide=True,
            standalone=True,
            stop_flag=self._stop,
        )
