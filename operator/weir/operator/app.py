# SPDX-License-Identifier: Apache-2.0
"""The operator's parts, put together: one TaskGroup owns every task, and SIGTERM ends them.

On SIGTERM streams end first, so that agents go to the other replica at once, then the rest.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from weir.operator import kinds, kubeconfig
from weir.operator.api import Api
from weir.operator.assignments import Assignments
from weir.operator.auth import Authenticator
from weir.operator.conditions import Conditions
from weir.operator.config import Config
from weir.operator.distribution import OPTIONS, Distribution
from weir.operator.handlers import KopfThread, node_handlers, problem_handlers
from weir.operator.leader import Leader
from weir.operator.liveness import Liveness
from weir.operator.model import Model
from weir.operator.objects import Problem
from weir.operator.reflector import Reflector, Timing
from weir.operator.relay import PeerWatch, Relay
from weir.operator.revisions import Revisions
from weir.operator.servers import ServerWatch
from weir.operator.status import Sample, StatusServer
from weir.operator.surroundings import Surroundings
from weir.operator.tls import Certificates
from weir.operator.troubles import Troubles
from weir.operator.writes import Reference, Writer

logger = logging.getLogger(__name__)

STOP_SECONDS = 2.0


def access(config: Config) -> kubeconfig.Access:
    """Blocks on files."""
    if config.kubeconfig:
        return kubeconfig.from_file(Path(config.kubeconfig).expanduser())
    return kubeconfig.in_cluster(config.api_server, config.kubelet_kubeconfig)


@dataclass(slots=True)
class App:
    """Everything that runs."""

    config: Config
    access: kubeconfig.Access
    timing: Timing = field(default_factory=Timing)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0  # where gRPC listens, once it does
    _reflectors: list[Reflector[Any]] = field(default_factory=list)
    _model: Model | None = None
    _distribution: Distribution | None = None
    _writer: Writer | None = None
    _troubles: Troubles | None = None
    _leader: Leader | None = None
    _assignments: Assignments | None = None
    _leading: asyncio.Event = field(default_factory=asyncio.Event)
    _following: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for name in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(name, self.stop.set)
        async with Api(self.access) as api:
            await self._run(api)

    async def _run(self, api: Api) -> None:
        revisions = Revisions(uuid.uuid4().hex)
        certificates = Certificates(api, self.config.namespace)
        gap = self.config.batch_milliseconds / 1000
        conditions = Conditions(self._leading)
        model = Model(revisions, gap, self._synced, self._report, conditions=conditions)
        relay = Relay(revisions.instance, certificates.ca)
        authenticate = Authenticator(api, self.config.namespace)
        self._troubles = troubles = Troubles(api, self._report)
        distribution = Distribution(
            revisions, authenticate, model, self._agent_ready, relay, troubles
        )
        self._model, self._distribution = model, distribution
        self._writer = writer = Writer(api, self.config.pod_name)
        self._leader = leader = Leader(api, self.config.namespace, self.config.pod_name, self._lead)
        consumer = PeerWatch(ServerWatch(model, api.learn), self.config.namespace, relay)
        surroundings = Surroundings(consumer)
        assignments = self._assignments = Assignments(
            api,
            surroundings,
            self._report,
            self._leading,
            self._following,
            self.config.load_balancer_class,
            self.config.classless_load_balancers,
            self.timing,
        )
        self._reflectors = [
            Reflector(api, kind, surroundings, self.timing)
            for kind in (
                kinds.NAMESPACE,
                kinds.NODE,
                kinds.POD,
                kinds.SERVICE,
                kinds.SLICE,
                kinds.POLICY,
                kinds.CLUSTER_POLICY,
                kinds.BLOCK_LIST,
                kinds.LOAD_BALANCER_POOL,
            )
        ]
        liveness = Liveness(model.silent)
        self._reflectors.append(Reflector(api, kinds.NODE_LEASE, liveness, self.timing))
        status = StatusServer(self._not_ready, self._samples)
        await status.start(self.config.health_listen, self.config.metrics_listen)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(reflector.run(), name=f"reflector {reflector.kind.name}")
                    for reflector in self._reflectors
                ]
                tasks.append(group.create_task(model.run(), name="model"))
                tasks.append(group.create_task(self._serve(certificates), name="grpc"))
                tasks.append(group.create_task(writer.run(), name="writer"))
                tasks.append(group.create_task(leader.run(), name="leader"))
                tasks.append(group.create_task(conditions.run(api), name="conditions"))
                tasks.append(group.create_task(assignments.run(), name="assignments"))
                tasks.append(group.create_task(liveness.run(), name="liveness"))
                tasks.append(group.create_task(troubles.run(), name="troubles"))
                tasks.append(group.create_task(self._handle_nodes(api), name="nodes"))
                tasks.append(group.create_task(self._handle_problems(api), name="problems"))
                await self.stop.wait()
                logger.info("stopping")
                distribution.closing.set()
                await leader.release()
                for task in tasks:
                    task.cancel()
        finally:
            await relay.close()
            await status.close()

    async def _serve(self, certificates: Certificates) -> None:
        if self._distribution is None:
            raise RuntimeError("not set up")
        await certificates.start()
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers([self._distribution.handler()])
        self.port = server.add_secure_port(self.config.listen, certificates.server_credentials())
        await server.start()
        logger.info("serving agents on port %d", self.port)
        try:
            await certificates.run()
        finally:
            self._distribution.closing.set()
            await server.stop(STOP_SECONDS)

    async def _handle_nodes(self, api: Api) -> None:
        """Taints can come back (a node is made anew): its agent's word still counts."""
        loop = asyncio.get_running_loop()

        def tainted(node: str) -> None:
            loop.call_soon_threadsafe(self._tainted, node)

        thread = KopfThread("nodes", self.access, node_handlers(tainted), lambda: api.server)
        thread.start()
        try:
            await thread.watch()
        finally:
            await thread.stop()

    async def _handle_problems(self, api: Api) -> None:
        """Events on bad objects, while leading."""
        loop = asyncio.get_running_loop()

        def report(about: Reference, problems: tuple[Problem, ...]) -> None:
            loop.call_soon_threadsafe(self._report, about, problems)

        while True:
            await self._leading.wait()
            registry = problem_handlers(report)
            thread = KopfThread("problems", self.access, registry, lambda: api.server)
            thread.start()
            watch = asyncio.create_task(thread.watch(), name="kopf problems")
            following = asyncio.create_task(self._following.wait(), name="following")
            try:
                done, _ = await asyncio.wait(
                    (watch, following), return_when=asyncio.FIRST_COMPLETED
                )
                if watch in done:
                    watch.result()
            finally:
                watch.cancel()
                following.cancel()
                await thread.stop()

    def _lead(self, leading: bool) -> None:
        now, before = self._leading, self._following
        if not leading:
            now, before = before, now
        now.set()
        before.clear()

    def _tainted(self, node: str) -> None:
        stream = self._distribution.streams.get(node) if self._distribution else None
        if self._writer is not None and stream is not None and stream.ready:
            self._writer.mark_ready(node)

    def _report(self, about: Reference, problems: tuple[Problem, ...]) -> None:
        """Of conflicts both replicas tell: an Event is posted once, whoever is first."""
        if self._writer is not None:
            self._writer.report(about, problems)

    def _synced(self) -> None:
        if self._distribution is not None:
            self._distribution.synced.set()

    def _agent_ready(self, node: str) -> None:
        logger.info("%s: ready", node)
        if self._writer is not None:
            self._writer.mark_ready(node)

    def _not_ready(self) -> str:
        if self._model is None or not self._model.ready:
            return "not all kinds are listed and compiled"
        return "" if self.port else "not serving agents yet"

    def _samples(self) -> Iterable[Sample]:
        if self._model is None or self._distribution is None:
            return
        for reflector in self._reflectors:
            label = ("kind", reflector.kind.name)
            yield Sample("weir_operator_objects", len(reflector.objects), label)
        for reflector in self._reflectors:
            label = ("kind", reflector.kind.name)
            yield Sample("weir_operator_relists_total", reflector.lists, label)
        for reflector in self._reflectors:
            label = ("kind", reflector.kind.name)
            yield Sample("weir_operator_watch_failures_total", reflector.failures, label)
        for name, count in self._model.compiler.counts().items():
            yield Sample("weir_operator_compiled", count, ("what", name))
        revisions = self._model.revisions
        streams = list(self._distribution.streams.values())
        yield Sample("weir_operator_resources", len(revisions))
        yield Sample("weir_operator_revision", revisions.revision)
        yield Sample("weir_operator_streams", len(streams))
        yield Sample("weir_operator_ready_nodes", sum(stream.ready for stream in streams))
        relay = self._distribution.relay
        yield Sample("weir_operator_relays", relay.streams if relay is not None else 0)
        yield Sample("weir_operator_snapshots", sum(stream.snapshots for stream in streams))
        yield Sample("weir_operator_compile_seconds_total", self._model.compile_seconds)
        yield Sample("weir_operator_compilations_total", self._model.compilations)
        yield Sample("weir_operator_problems_total", self._model.problem_count)
        conflicts = self._model.claims.counts()
        yield Sample("weir_operator_pod_cidr_conflicts", conflicts["Node"])
        yield Sample("weir_operator_service_conflicts", conflicts["Service"])
        yield Sample("weir_operator_host_port_conflicts", conflicts["Pod"])
        bad = self._model.blocklists.with_problems
        yield Sample("weir_operator_block_list_conflicts", bad)
        bad = self._model.cluster_policies.with_problems
        yield Sample("weir_operator_cluster_policies_invalid", bad)
        yield Sample("weir_operator_policies_without_room", len(self._troubles or ()))
        yield Sample("weir_operator_leader", bool(self._leader and self._leader.leading))
        yield Sample("weir_operator_announced_addresses", len(self._model.announcer.announced))
        if self._assignments is not None:
            yield from _pool_samples(self._assignments)


def _pool_samples(assignments: Assignments) -> Iterable[Sample]:
    """The leader's."""
    counts = assignments.counts.items()
    for at, family in enumerate(("ipv4", "ipv6")):
        for what in ("used", "free"):
            for key, pair in counts:
                value = pair[at].used if what == "used" else pair[at].free
                yield Sample(f"weir_operator_pool_{family}_{what}", value, ("pool", key.name))
    yield Sample("weir_operator_load_balancers_waiting", assignments.waiting)
