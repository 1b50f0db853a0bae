# SPDX-License-Identifier: Apache-2.0
"""The agent put together: one task group owns every task.

Start: node facts and overlay → datapath → remembered state → pods that are wired → first
reconcile (as soon as the desired state is complete) → CNI socket → ready → CNI configuration.
Stopping leaves everything in the kernel in place, so traffic does not notice.
"""

from __future__ import annotations

import asyncio
import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from weir.agent import api, links, memory, node, numbering, troubles, views
from weir.agent.apply import AnyTable
from weir.agent.config import Config
from weir.agent.errors import NodeError
from weir.agent.events import Events
from weir.agent.explain import Explainer
from weir.agent.flows import Flows
from weir.agent.gate import Gate
from weir.agent.health_checks import HealthChecks
from weir.agent.herald import Herald
from weir.agent.host import AgentHost
from weir.agent.node import NodeFacts
from weir.agent.reconciler import GROUPS, Pace, Reconciler
from weir.agent.routes import HostRoute, RouteFacts
from weir.agent.servers import Servers
from weir.agent.state import DesiredState
from weir.agent.store import Store
from weir.agent.stream import OperatorStream, StreamState
from weir.agent.tables import Projection, ServiceSettings
from weir.api.address import text
from weir.cni import install
from weir.cni.endpoint import EndpointStore
from weir.cni.errors import CniError
from weir.cni.ipam import Pool
from weir.cni.netns import netns_cookie
from weir.cni.server import CniServer
from weir.cni.service import CniService
from weir.cni.wiring import Wiring
from weir.datapath.datapath import Datapath
from weir.datapath.errors import DatapathError
from weir.datapath.features import Features, probe
from weir.datapath.libbpf import XdpMode
from weir.datapath.links import XDP_MODES
from weir.datapath.records import Metric, MetricKey
from weir.datapath.settings import Settings

logger = logging.getLogger(__name__)

NODE_RETRY_SECONDS = 1.0
NODE_PERIOD_SECONDS = 30.0
NODE_SETTLE_SECONDS = 0.2
POD_SETTLE_SECONDS = 5.0
INSTALL_RETRY_SECONDS = 5.0
INSTALL_PERIOD_SECONDS = 30.0
ANNOUNCE_LOOK_SECONDS = 0.1
ANNOUNCE_LOOKS = 50


class App:
    """Made once the node's facts are known and the datapath is open."""

    def __init__(self, config: Config, facts: NodeFacts, features: Features, datapath: Datapath):
        paths = config.paths
        self._config = config
        self._facts = facts
        self._features = features
        self._datapath = datapath
        self._gate = Gate()
        self._settings = settings_of(config, facts, features)
        self._version = _version()
        self.projection = Projection(
            ServiceSettings(config.node_ports, config.maglev_table_size, config.dsr),
            audit=config.policy_audit,
        )
        self._store = Store(paths.state / "state")
        explainer = Explainer(self.projection, self._store.resources)
        self.flows = Flows(
            self.projection,
            explainer,
            self._gate,
            lambda: self._datapath.tables,
            lambda: [endpoint.netns for endpoint in self._endpoints.endpoints.values()],
        )
        self.reconciler = Reconciler(
            self.projection,
            tables_of(datapath),
            self,
            Pace(resync=config.resync_seconds),
            follower=self.flows,
        )
        self._state = DesiredState(self._store, self.projection, self.reconciler)
        self._servers = Servers(config)
        self._stream = OperatorStream(
            config.node, self._version, self._servers.find, paths.token, self._state
        )
        self._health_checks = HealthChecks(
            self.projection.services,
            config.node_ports,
            config.proxy_health_port,
            healthy=lambda: not self.reconciler.health["services"].error,
            eligible=lambda: self.projection.routes.stays,
        )
        self._herald = Herald(lambda: self.projection.announced.announcing)
        self._host = AgentHost(
            self.projection,
            self.reconciler,
            lambda: self._datapath,
            self._gate,
            self._stream,
            self.why_not_wire,
            unmanaged=config.unmanaged,
        )
        self.events = Events(lambda: self._datapath, explainer)
        self._wiring = Wiring(facts.mtu, sysctls=paths.sysctls)
        self._pool = Pool(paths.state / "ipam.journal")
        self._endpoints = EndpointStore(paths.state / "endpoints")
        self._cni = CniService(self._pool, self._wiring, self._host, self._endpoints)
        self._server = CniServer(self._cni, paths.run / "cni.sock")
        self._node_changed = asyncio.Event()
        self._routed = asyncio.Event()
        self._earlier: list[Path] = []
        self._host_routes: frozenset[HostRoute] = frozenset()

    # ---- what others ask

    def bump(self) -> int:
        return self._datapath.bump()

    def set_features(self, features: int) -> None:
        self._datapath.set_features(features)

    @property
    def stream_state(self) -> StreamState:
        return self._stream.state

    async def counters(self) -> list[tuple[MetricKey, Metric]]:
        async with self._gate.use():
            return await asyncio.to_thread(lambda: list(self._datapath.tables.metrics.items()))

    def why_not_wire(self) -> str:
        """Why an ADD would not work now; "" if it would."""
        if not self._state.position.complete:
            return f"no state from an operator yet ({self._stream.state.error})"
        if not self.reconciler.first_done.is_set():
            errors = "; ".join(h.error for h in self.reconciler.health.values() if h.error)
            return f"the first reconcile is not done{': ' + errors if errors else ''}"
        if not self._pool.cidrs:
            return f"node {self._config.node} has no pod CIDR"
        return ""

    def why_not(self) -> str:
        if not self._server.listening.is_set():
            return self.why_not_wire() or "the CNI socket is not open yet"
        return self.why_not_wire()

    def status(self) -> views.StatusView:
        return views.status(
            node=self._config.node,
            version=self._version,
            kernel=self._features.kernel,
            why_not=self.why_not(),
            stream=self._stream.state,
            state=self._state,
            reconciler=self.reconciler,
            addresses=[text(addr) for addr in self._facts.addresses],
            uplinks=list(self._facts.uplinks),
            mtu=self._facts.mtu,
            routing="vxlan" if self._config.tunnel else "native",
            audit=self._config.policy_audit,
            xdp={name: self._xdp(mode) for name, mode in self._datapath.xdp.items()},
            flow_warnings=self.flows.warnings(),
        )

    def _xdp(self, mode: XdpMode | None) -> str:
        if mode is not None:
            return mode.name.lower()
        return "off" if self._config.xdp == "off" else "refused"

    # ---- running

    async def run(self) -> None:
        """Until cancelled."""
        await self._wiring.prepare_host()
        await self._state.restore()
        await self._attach()
        found = await self._cni.start()
        for endpoint in self._endpoints.endpoints.values():
            self.projection.set_endpoint(endpoint)
        self._use_facts()
        await asyncio.to_thread(self._adopt)
        logger.info("node %s: %s; %s", self._config.node, self._facts, found)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.reconciler.run(), name="reconciler")
                group.create_task(self._stream.run(), name="operator stream")
                group.create_task(self._state.keep_persisting(), name="state file")
                group.create_task(self._acknowledge(), name="acknowledgements")
                telling = troubles.keep_telling(self.reconciler, self._stream)
                group.create_task(telling, name="troubles")
                group.create_task(self._keep_node(), name="node")
                group.create_task(self._wire_pods(), name="CNI")
                group.create_task(self._settle_pods(), name="settling")
                group.create_task(self.flows.run(), name="flows")
                group.create_task(self._serve_api(), name="API")
                group.create_task(self._serve_health(), name="health")
                group.create_task(self._serve_health_checks(), name="health checks")
                group.create_task(self._announce(), name="announcing")
        finally:
            await self._close()

    async def _close(self) -> None:
        try:
            await self._state.persist()
        except OSError as error:
            logger.warning("the desired state cannot be saved: %s", error)
        self._wiring.close()
        self._endpoints.close()
        self._pool.close()
        self._datapath.close()

    async def _attach(self) -> None:
        # Only now: while it runs, an uplink without an address may get it back any moment.
        await asyncio.to_thread(self._datapath.keep_uplinks, self._facts.uplinks)
        await asyncio.to_thread(attach_devices, self._datapath, self._facts, self._config)
        # Their devices are up already; a pod without programs would be one without policy.
        for endpoint in self._endpoints.endpoints.values():
            try:
                await asyncio.to_thread(self._datapath.attach_pod, endpoint.host_ifname)
            except DatapathError as error:
                logger.warning("%s: %s", endpoint.pod, error)

    def _adopt(self) -> None:
        """Learn from the kernel which numbers are taken, and which services are as they were."""
        tables = self._datapath.tables
        identities = {key.identity for key, _ in tables.affinity.items()}
        identities |= {key.identity for key, _ in tables.source_ranges.items()}
        services = dict(tables.services.items())
        self.flows.adopt(services)
        self.projection.services.adopt(services, dict(tables.backends.items()), identities)
        numbering.reserve(self.projection, tables)

    async def _acknowledge(self) -> None:
        snapshots = 0
        while True:
            await self._state.changed.wait()
            self._state.changed.clear()
            revision = self._state.applied
            try:
                await self.reconciler.flush()
            except DatapathError:
                self._state.changed.set()
                await self.reconciler.next_round()
                continue
            self._use_own_node()
            self._stream.acknowledge(revision, not self.why_not())
            if self._stream.state.snapshots != snapshots:
                snapshots = self._stream.state.snapshots
                memory.give_back()

    async def _wire_pods(self) -> None:
        """CNI once the maps are right, then the configuration that turns the node Ready."""
        await self.reconciler.first_done.wait()
        self._use_own_node()
        self._node_changed.set()
        await self._routed.wait()
        memory.give_back()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._server.run())
            await self._server.listening.wait()
            while self.why_not():
                await self.reconciler.next_round()
                self._use_own_node()
            self._state.changed.set()
            logger.info("ready")
            while self._config.install_cni:
                pause = min(INSTALL_PERIOD_SECONDS, self._config.resync_seconds)
                try:
                    await asyncio.to_thread(self._install)
                except install.InstallError as error:
                    pause = INSTALL_RETRY_SECONDS
                    logger.warning("%s; again in %g s", error, pause)
                await asyncio.sleep(pause)

    async def _settle_pods(self) -> None:
        while True:
            await asyncio.sleep(POD_SETTLE_SECONDS)
            await self._host.settle()

    def _install(self) -> None:
        """Also puts back what somebody took away or changed."""
        paths, name = self._config.paths, self._config.cni_conf_name
        install.install_shim(paths.shim, paths.cni_bin)
        # The path as the runtime sees it: the folder is mounted at the same place.
        install.install_config(paths.cni_conf, name, paths.run / "cni.sock")
        before = install.earlier(paths.cni_conf, name)
        if before != self._earlier:
            self._earlier = before
            for other in before:
                logger.warning("%s comes before %s: the runtime uses it instead", other, name)

    async def _serve_api(self) -> None:
        await api.serve(api.local_api(self), api.unix_socket(self._config.paths.run / "agent.sock"))

    async def _serve_health(self) -> None:
        if not self._config.metrics_port:
            return
        listeners = api.listeners(self._config.metrics_address, self._config.metrics_port)
        await api.serve(api.health(self), *listeners)

    async def _serve_health_checks(self) -> None:
        await self.reconciler.first_done.wait()
        await self._health_checks.run(self.reconciler.next_round)

    async def _announce(self) -> None:
        """What is remembered may be another node's by now: the operators come first, if there are
        any."""
        await self.reconciler.first_done.wait()
        for _ in range(ANNOUNCE_LOOKS):
            if self._stream.state.connected:
                break
            await asyncio.sleep(ANNOUNCE_LOOK_SECONDS)
        await self._herald.run(self.reconciler.next_round)

    # ---- the node's own network

    async def _keep_node(self) -> None:
        loop = asyncio.get_running_loop()
        listener = links.monitor()

        def heard() -> None:
            try:
                while listener.recv(1 << 16):
                    pass
            except BlockingIOError:
                pass
            except OSError as error:  # ENOBUFS: something was missed, which is all the same
                logger.debug("rtnetlink monitor: %s", error)
            self._node_changed.set()

        loop.add_reader(listener, heard)
        try:
            while True:
                self._node_changed.clear()
                try:
                    await self._converge_node()
                except (NodeError, CniError, DatapathError) as error:
                    logger.warning("%s; again in %g s", error, NODE_RETRY_SECONDS)
                    await asyncio.sleep(NODE_RETRY_SECONDS)
                    continue
                try:
                    async with asyncio.timeout(NODE_PERIOD_SECONDS):
                        await self._node_changed.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(NODE_SETTLE_SECONDS)
        finally:
            loop.remove_reader(listener)
            listener.close()

    async def _converge_node(self) -> None:
        own = self.projection.routes.own_node
        facts = await asyncio.to_thread(node.observe, self._config, own.addresses if own else ())
        if facts != self._facts:
            logger.info("node changed: %s", facts)
            await self._follow(facts)
        # Also what was wired while the MTU changed, or changed while no agent was there.
        wired = list(self.projection.placement.local.values())
        await asyncio.to_thread(node.converge_pod_mtus, wired, facts.mtu)
        if self.reconciler.first_done.is_set():
            wanted = self.projection.host_routes
            changed = await asyncio.to_thread(node.converge_routes, wanted, facts)
            if changed:
                logger.info("%d host routes put right", changed)
            self._routed.set()

    async def _follow(self, facts: NodeFacts) -> None:
        """Facts count as followed once all of it succeeded: else the next round tries again."""
        settings = settings_of(self._config, facts, self._features)
        self._wiring.mtu = facts.mtu
        async with self.reconciler.paused, self._gate.exchange():
            if settings != self._settings:
                opened = await asyncio.to_thread(open_datapath, self._config, settings)
                before, self._datapath, self._settings = self._datapath, opened, settings
                self.reconciler.tables.update(tables_of(opened))
                try:
                    await self.events.refresh()
                finally:
                    before.close()
            await asyncio.to_thread(attach_devices, self._datapath, facts, self._config)
        self._facts = facts
        self._use_facts()
        self.reconciler.wake()

    def _use_facts(self) -> None:
        self.projection.set_facts(
            RouteFacts(
                node=self._config.node,
                addresses=self._facts.addresses,
                local=self._facts.local,
                tunnel=self._config.tunnel,
                no_masquerade=self._config.no_masquerade,
            ),
            self._facts.segments,
        )
        self._use_own_node()

    def _use_own_node(self) -> None:
        """Pod CIDRs to give addresses from, and host routes when they changed."""
        own = self.projection.routes.own_node
        cidrs = own.pod_cidrs if own else ()
        if cidrs and tuple(cidrs) != tuple(self._pool.cidrs):
            self._pool.set_cidrs(cidrs)
        if self.projection.host_routes != self._host_routes:
            self._host_routes = self.projection.host_routes
            self._node_changed.set()


def tables_of(datapath: Datapath) -> dict[str, AnyTable]:
    return {name: getattr(datapath.tables, name) for names in GROUPS.values() for name in names}


def settings_of(config: Config, facts: NodeFacts, features: Features) -> Settings:
    return Settings(
        node_ipv4=facts.first(ipv4=True),
        node_ipv6=facts.first(ipv4=False),
        overlay_ifindex=facts.overlay_ifindex,
        overlay_mtu=facts.mtu if config.tunnel else 0,
        overlay_port=links.VXLAN_PORT if config.tunnel else 0,
        snat_port_first=facts.snat_ports[0],
        snat_port_last=facts.snat_ports[1],
        tunnel=config.tunnel,
        masquerade=config.masquerade,
        xdp_services=config.xdp_services and config.xdp != "off",
        host_netns_cookie=netns_cookie(),
        maglev_table_size=config.maglev_table_size,
        has_set_retval=features.set_retval,
    )


def cgroup_of(path: Path) -> Path:
    """The cgroup v2 hierarchy at or below a host's /sys/fs/cgroup."""
    for candidate in (
        path,
        path / "unified",
        Path("/sys/fs/cgroup"),
        Path("/sys/fs/cgroup/unified"),
    ):
        if (candidate / "cgroup.procs").exists():
            return candidate
    return path


def open_datapath(config: Config, settings: Settings) -> Datapath:
    return Datapath.open(config.paths.pins, cgroup_of(config.paths.cgroup), settings, config.sizes)


def attach_devices(datapath: Datapath, facts: NodeFacts, config: Config) -> None:
    for name in facts.uplinks:
        datapath.attach_uplink(name, XDP_MODES[config.xdp])
    if config.tunnel:
        datapath.attach_overlay(links.OVERLAY)


async def start(config: Config) -> None:
    """Facts and datapath first, however long the node takes to have an address; then the app."""
    loop = asyncio.get_running_loop()
    while True:
        try:
            facts = await loop.run_in_executor(None, node.observe, config, ())
            break
        except (NodeError, CniError) as error:
            logger.warning("%s; again in %g s", error, NODE_RETRY_SECONDS)
            await asyncio.sleep(NODE_RETRY_SECONDS)
    features = await asyncio.to_thread(probe)
    settings = settings_of(config, facts, features)
    datapath = await asyncio.to_thread(open_datapath, config, settings)
    await App(config, facts, features, datapath).run()


def _version() -> str:
    try:
        return version("weir")
    except PackageNotFoundError:
        return "unknown"
