# SPDX-License-Identifier: Apache-2.0
"""API objects all the way into maps of the kernel, and packets through real programs.

    JSON → parse → Compiler → Revisions → encoded Updates → Assembler → DesiredState (store,
    projection) → Reconciler → maps;  packets → from_pod, from_uplink, to_pod → verdict

All of it is the product's but the gRPC stream and the wiring of pods. The tested node is
`oracle_scripts.HERE` with native routing, so that what other nodes send comes by the uplink.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from support.namespaces import NetNs
from support.oracle import Cluster, Json, Name, pod_addresses, version
from support.oracle_scripts import ELSEWHERE, HERE, NODES, Action, change
from weir.agent.app import App
from weir.agent.apply import AnyTable
from weir.agent.reconciler import GROUPS, Reconciler
from weir.agent.routes import RouteFacts
from weir.agent.state import DesiredState
from weir.agent.store import Position, Store
from weir.agent.stream import Assembler
from weir.agent.tables import Projection
from weir.api.address import parse, text
from weir.api.v1 import weir_pb2 as pb
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.datapath import libbpf
from weir.datapath.datapath import Datapath
from weir.datapath.records import DropReason, Event, EventKind
from weir.datapath.table import TableLike
from weir.operator import kinds
from weir.operator.compiler import Compiler
from weir.operator.objects import Key
from weir.operator.revisions import Revisions

SLOTS = 12
NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132}
SHOT, OK, REDIRECT = 2, 0, 7
SYN, SYN_ACK, ACK = 2, 18, 16
# Told of each row that was written or, without a value, deleted: table, key, value.
Watcher = Callable[[str, Any, Any], None]
READERS: dict[str, Any] = {
    kind.name: kind.read
    for kind in (
        kinds.NAMESPACE,
        kinds.NODE,
        kinds.POD,
        kinds.SERVICE,
        kinds.SLICE,
        kinds.POLICY,
        kinds.CLUSTER_POLICY,
    )
}


class Devices:
    """A namespace with the host ends of pods (d0 …) and an uplink (ul)."""

    def __init__(self) -> None:
        self.ns = NetNs()
        names = [f"d{i}" for i in range(SLOTS)] + ["ul"]
        for name in names:
            self.ns.run("ip", "link", "add", name, "type", "veth", "peer", "name", f"{name}p")
            self.ns.run("ip", "link", "set", "dev", f"{name}p", "up")
            self.ns.run("ip", "link", "set", "dev", name, "up")
        self.ns.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        (v4, v6), _ = NODES[HERE]
        self.ns.run("ip", "address", "add", f"{v4}/24", "dev", "ul")
        self.ns.run("ip", "address", "add", f"{v6}/64", "dev", "ul", "nodad")
        self.ns.run("ip", "-4", "route", "add", "default", "via", "192.0.2.254")
        self.ns.run("ip", "-6", "route", "add", "default", "via", "2001:db8::fe")
        found = [self.ns.run("ip", "-o", "link", "show", name).split(":")[0] for name in names]
        self.index = dict(zip(names, map(int, found), strict=True))


@dataclass
class Watched(TableLike[Any, Any]):
    """A table that writes row by row, and tells the row after each."""

    name: str
    table: AnyTable
    then: Watcher
    max_entries: int = 0

    def items(self) -> Iterator[tuple[Any, Any]]:
        return self.table.items()

    def get(self, key: Any) -> Any:
        return self.table.get(key)

    def update(self, rows: Mapping[Hashable, Any]) -> None:
        for key, row in rows.items():
            self.table.update({key: row})
            self.then(self.name, key, row)

    def delete(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self.table.delete([key])
            self.then(self.name, key, None)


class Operator:
    """Compiler and log of one operator instance, fed with the API's JSON."""

    def __init__(self, instance: str) -> None:
        self.compiler = Compiler()
        self.revisions = Revisions(instance)

    def set(self, kind: str, at: Name, content: Json | None) -> None:
        parsed = None
        if content is not None:
            parsed = READERS[kind](msgspec.Raw(msgspec.json.encode(content))).value
        update: Any = {
            "Namespace": self.compiler.namespace,
            "Node": self.compiler.node,
            "Pod": self.compiler.pod,
            "Service": self.compiler.service,
            "EndpointSlice": self.compiler.slice,
            "NetworkPolicy": self.compiler.policy,
            "ClusterNetworkPolicy": lambda key, new: self.compiler.policy(key, new and new.policy),
        }[kind]
        update(Key(*at), parsed)

    def feed(self, kind: str, at: Name, content: Json | None) -> None:
        """As `set`; a pod whose addresses its agent announces has none in its status yet."""
        if content is not None and content.get("announced") and _announces(content):
            bare = {**content["status"], "podIPs": []}
            self.set(kind, at, {**content, "status": bare})
            addresses = tuple(parse(ip) for ip in pod_addresses(content))
            where = content["spec"]["nodeName"]
            self.compiler.announce(where, content["metadata"]["uid"], addresses)
        else:
            self.set(kind, at, content)

    def publish(self) -> None:
        self.revisions.publish(self.compiler.flush())


def _announces(pod: Json) -> bool:
    return pod["spec"]["nodeName"] in {HERE, ELSEWHERE} and bool(pod_addresses(pod))


@dataclass
class Agent:
    """The agent's state. `tables` may be watched."""

    tables: dict[str, AnyTable]
    datapath: Datapath
    path: Path

    def __post_init__(self) -> None:
        self.projection = Projection()
        self.reconciler = Reconciler(self.projection, self.tables, self.datapath)
        self.state = DesiredState(Store(self.path), self.projection, self.reconciler)
        ips, _ = NODES[HERE]
        own = tuple(map(parse, ips))
        self.projection.set_facts(RouteFacts(HERE, own, own, tunnel=False))

    async def start(self, endpoints: Iterable[LocalEndpoint]) -> None:
        await self.state.restore()
        for endpoint in endpoints:
            self.projection.set_endpoint(endpoint)
        self_of_app = SimpleNamespace(
            _datapath=self.datapath,
            projection=self.projection,
            flows=SimpleNamespace(adopt=lambda _: None),  # the oracle says nothing of sweeping
        )
        App._adopt(cast("App", self_of_app))

    async def take(self, updates: Iterable[bytes]) -> None:
        assembler = Assembler()
        for encoded in updates:
            update = pb.Update.FromString(encoded)
            if not assembler.add(update):
                continue
            resources, removed, snapshot = assembler.take()
            position = Position(update.instance, update.revision, complete=True)
            if snapshot:
                await self.state.snapshot(resources, position)
            else:
                await self.state.change(resources, removed, position)

    async def converge(self) -> None:
        await self.reconciler.round()
        for group, health in self.reconciler.health.items():
            assert not health.error, (group, health.error)
            assert not health.rejected, (group, health.rejected)
        assert not self.state.rejected


@dataclass(frozen=True)
class Flow:
    source: str
    target: str
    protocol: str
    port: int
    sport: int


@dataclass(frozen=True)
class Seen:
    """What became of a packet."""

    passed: bool
    packet: bytes
    reason: str
    event: Event | None


@dataclass
class TestedNode:
    """One node's operator, agent, maps and programs; made anew for each script."""

    __test__ = False

    datapath: Datapath
    devices: Devices
    folder: Path
    watch: Watcher | None = None
    cluster: Cluster = field(default_factory=Cluster)

    def __post_init__(self) -> None:
        self.operator = Operator("0")
        self._operators = 0
        self._revision = 0
        self._sport = 0
        self._wired: dict[str, LocalEndpoint] = {}  # by uid
        self._slots = list(range(SLOTS))
        self.tables: dict[str, AnyTable] = {}
        for name in (name for names in GROUPS.values() for name in names):
            self.tables[name] = getattr(self.datapath.tables, name)
            if self.watch is not None:
                self.tables[name] = Watched(name, self.tables[name], self.watch)
        self.agent = self._agent()
        self._events = self.datapath.events()
        self.datapath.set_event_mask(1 << EventKind.DROP)

    def close(self) -> None:
        self._events.close()

    def _agent(self) -> Agent:
        return Agent(self.tables, self.datapath, self.folder / "state")

    # ---- the control plane

    async def do(self, actions: Iterable[Action]) -> None:
        """All of them, in one revision and one round."""
        restart, anew = False, None
        for action in actions:
            match action[0]:
                case "restart":
                    restart = True
                case "new operator":
                    anew = Random(action[4]["seed"])
                case _:
                    at = change(self.cluster, action)
                    if at is not None:
                        self.operator.feed(action[1], at, self.cluster.of(action[1]).get(at))
        if anew is not None:
            self._new_operator(anew)
        self.operator.publish()
        revisions = self.operator.revisions
        if anew is not None or not self._revision:
            updates = revisions.snapshot(HERE)
        else:
            updates = revisions.delta(self._revision, HERE)
        self._revision = revisions.revision
        if restart:
            await self.agent.state.persist()
            self.agent = self._agent()
            await self.agent.start(self._wired.values())
        await self.agent.take(updates)
        self._wire()
        await self.agent.converge()

    def _new_operator(self, rng: Random) -> None:
        """Another one, which sees the same objects in another order."""
        self._operators += 1
        self.operator = Operator(str(self._operators))
        objects = [
            (k, at, o) for k, found in self.cluster.objects.items() for at, o in found.items()
        ]
        rng.shuffle(objects)
        for kind, at, content in objects:
            self.operator.feed(kind, at, content)
            if rng.random() < 0.1:
                self.operator.publish()

    def _wire(self) -> None:
        wanted = {
            pod["metadata"]["uid"]: pod
            for pod in self.cluster.of("Pod").values()
            if pod["spec"]["nodeName"] == HERE and pod_addresses(pod)
        }
        for uid in [uid for uid in self._wired if uid not in wanted]:
            gone = self._wired.pop(uid)
            self._slots.append(int(gone.ifname[1:]))
            self.agent.projection.remove_endpoint(gone.container_id)
        for uid, pod in wanted.items():
            if uid not in self._wired and self._slots:
                endpoint = self._endpoint(uid, pod, self._slots.pop(0))
                self._wired[uid] = endpoint
                self.agent.projection.set_endpoint(endpoint)

    def _endpoint(self, uid: str, pod: Json, slot: int) -> LocalEndpoint:
        name = f"d{slot}"
        meta = pod["metadata"]
        return LocalEndpoint(
            container_id=f"c-{uid}",
            netns="",
            ifname=name,
            host_ifname=name,
            ifindex=self.devices.index[name],
            mac=b"\2\0\0\0\1" + bytes([slot]),
            host_mac=b"\2\0\0\0\2" + bytes([slot]),
            addresses=tuple(parse(ip) for ip in pod_addresses(pod)),
            pod=PodRef(meta["namespace"], meta["name"], uid),
        )

    # ---- packets

    def device(self, ip: str) -> str | None:
        """Of the pod here that has the address."""
        for endpoint in self._wired.values():
            if parse(ip) in endpoint.addresses:
                return endpoint.ifname
        return None

    def local(self) -> list[str]:
        return [text(addr) for endpoint in self._wired.values() for addr in endpoint.addresses]

    def flow(self, source: str, target: str, protocol: str, port: int) -> Flow:
        """One that was never there before."""
        self._sport = self._sport % 60000 + 1
        if self._sport == 1:
            self.forget_flows()
        return Flow(source, target, protocol, port, 1024 + self._sport)

    def forget_flows(self) -> None:
        self.datapath.tables.ct.delete([key for key, _ in self.datapath.tables.ct.items()])

    def send(self, flow: Flow, *, reply: bool = False, flags: int = SYN) -> Seen:
        """A packet of the flow, from wherever it enters this node."""
        ends = (flow.target, flow.source) if reply else (flow.source, flow.target)
        device = self.device(ends[0])
        frame = packet(flow, reply=reply, flags=flags)
        if device is not None:
            return self._run("from_pod", device, frame)
        if ends[0] in NODES[HERE][0]:
            return self._run("to_pod", str(self.device(ends[1])), frame)
        return self._run("from_uplink", "ul", frame)

    def _run(self, program: str, device: str, frame: bytes) -> Seen:
        number = self.datapath.programs[program]
        result = libbpf.run_program(number, frame, ifindex=self.devices.index[device])
        event = next(iter(self._events.drain()[-1:]), None)
        reason = DropReason(event.reason).name if event is not None else ""
        return Seen(result.retval in {OK, REDIRECT}, result.packet, reason, event)


def packet(flow: Flow, *, reply: bool, flags: int) -> bytes:
    """Headers alone; the programs look at no checksum of what they let pass."""
    source, target = flow.source, flow.target
    sport, dport = flow.sport, flow.port
    family = version(source)
    if reply:
        source, target, sport, dport = target, source, dport, sport
    match flow.protocol:
        case "TCP":
            number, l4 = 6, struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 64, 0, 0)
        case "UDP":
            number, l4 = 17, struct.pack("!HHHH", sport, dport, 8, 0)
        case "SCTP":
            number, l4 = 132, struct.pack("!HHIIBBHI", sport, dport, 1, 0, 1, 0, 8, 0)
        case _:
            number = 1 if family == 4 else 58
            kind = (0 if reply else 8) if family == 4 else (129 if reply else 128)
            l4 = struct.pack("!BBHHH", kind, 0, 0, flow.sport, 1)
    if family == 4:
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(l4), 1, 0, 64, number, 0)
        ends = socket.inet_aton(source) + socket.inet_aton(target)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(l4), number, 64)
        ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    ethernet = b"\2\0\0\0\0\1\2\0\0\0\0\2" + (b"\x08\x00" if family == 4 else b"\x86\xdd")
    return ethernet + head + ends + l4


def ends(frame: bytes) -> tuple[str, str, int, int]:
    """Source, target and ports of a packet."""
    if frame[12:14] == b"\x08\x00":
        at, l4 = (26, 30, 34), 34
        source, target = (socket.inet_ntoa(frame[i : i + 4]) for i in at[:2])
    else:
        l4 = 54
        source, target = (socket.inet_ntop(socket.AF_INET6, frame[i : i + 16]) for i in (22, 38))
    sport, dport = struct.unpack_from("!HH", frame, l4)
    return source, target, sport, dport
