# SPDX-License-Identifier: Apache-2.0
"""The datapath of a node as its owner sees it: tables, attachments, events.

`Datapath.open` is level-triggered: the state is in the pins, so it serves first start,
restart, upgrade and changed settings alike. All calls block; run them in threads.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weir.api.address import Addr
from weir.datapath import features as probing
from weir.datapath import loader, records
from weir.datapath.btf import Kind
from weir.datapath.codec import Codec, codec_for
from weir.datapath.errors import DatapathError, LayoutMismatch
from weir.datapath.events import EventReader
from weir.datapath.features import Features
from weir.datapath.libbpf import MapType, XdpMode
from weir.datapath.links import Attachment, Links, detach_all
from weir.datapath.migrate import MIGRATIONS, Migration
from weir.datapath.pins import Pins, remove_tree, require_bpffs, require_cgroup2
from weir.datapath.records import RuntimeFeature
from weir.datapath.settings import Settings, Sizes
from weir.datapath.table import PerCpuTable, Table

logger = logging.getLogger(__name__)

POD = (
    Attachment("to_pod", egress=True, brief=True),
    Attachment("from_pod", egress=False, brief=True),
)
UPLINK = (Attachment("to_uplink", egress=True), Attachment("from_uplink", egress=False))
XDP = Attachment("xdp_uplink", egress=False)
OVERLAY = (Attachment("to_overlay", egress=True), Attachment("from_overlay", egress=False))
ROLES = (POD, UPLINK, OVERLAY)
ATTACHMENTS = {attachment.program: attachment for role in (*ROLES, (XDP,)) for attachment in role}

# Map → the records of its keys and values. The ring buffer has none.
RECORDS: dict[str, tuple[type[Any], type[Any]]] = {
    "services": (records.ServiceKey, records.Service),
    "backends": (records.BackendKey, records.Backend),
    "maglev": (records.MaglevKey, records.MaglevBlock),
    "affinity": (records.AffinityKey, records.Affinity),
    "netns_addresses": (int, records.NetnsAddresses),
    "source_ranges": (records.SourceRangeKey, int),
    "announced": (bytes, records.Announced),
    "blocked": (records.PrefixKey, records.Blocked),
    "endpoints": (bytes, records.Endpoint),
    "addresses": (bytes, records.Address),
    "prefixes": (records.PrefixKey, records.Prefix),
    "routes": (records.PrefixKey, records.Route),
    "policy": (records.PolicyKey, records.PolicyVerdict),
    "denials": (records.DenialKey, records.Denial),
    "ct": (records.CtKey, records.CtEntry),
    "snat": (records.SnatKey, records.SnatEntry),
    "sock_nat": (records.SockNatKey, records.SockNat),
    "runtime": (int, records.Runtime),
    "metrics": (records.MetricKey, records.Metric),
}
EVENTS = "events"
# Maps of the programs alone: kept over restarts, no tables.
PRIVATE = frozenset({"fragments", "scratch"})


@dataclass(frozen=True, slots=True)
class Tables:
    """The maps of abi.h. `metrics` is summed over CPUs and read-only."""

    services: Table[records.ServiceKey, records.Service]
    backends: Table[records.BackendKey, records.Backend]
    maglev: Table[records.MaglevKey, records.MaglevBlock]
    affinity: Table[records.AffinityKey, records.Affinity]
    netns_addresses: Table[int, records.NetnsAddresses]
    source_ranges: Table[records.SourceRangeKey, int]
    announced: Table[Addr, records.Announced]
    blocked: Table[records.PrefixKey, records.Blocked]
    endpoints: Table[Addr, records.Endpoint]
    addresses: Table[Addr, records.Address]
    prefixes: Table[records.PrefixKey, records.Prefix]
    routes: Table[records.PrefixKey, records.Route]
    policy: Table[records.PolicyKey, records.PolicyVerdict]
    denials: Table[records.DenialKey, records.Denial]
    ct: Table[records.CtKey, records.CtEntry]
    snat: Table[records.SnatKey, records.SnatEntry]
    sock_nat: Table[records.SockNatKey, records.SockNat]
    runtime: Table[int, records.Runtime]
    metrics: PerCpuTable[records.MetricKey, records.Metric]


def make_tables(loaded: loader.Loaded) -> Tables:
    """Typed tables over the loaded maps; LayoutMismatch if records and BTF differ."""
    made: dict[str, Any] = {}
    for name, (key, value) in RECORDS.items():
        if name not in loaded.maps:
            raise LayoutMismatch("open", name, 0, "no object has this map")
        btf, definition = loaded.definitions[name]
        kind = PerCpuTable if MapType(definition.shape.type).per_cpu else Table
        made[name] = kind(
            name,
            loaded.maps[name],
            codec_for(btf, definition.key_type, key),
            codec_for(btf, definition.value_type, value),
        )
    return Tables(**made)


def event_codec(loaded: loader.Loaded) -> Codec[records.Event] | None:
    """None: no object tells what an event looks like."""
    for btf in loaded.btfs:
        number = btf.named(Kind.STRUCT, "event")
        if number is not None:
            return codec_for(btf, number, records.Event)
    return None


class Datapath:
    """An opened installation. Closing it leaves everything in place and running."""

    def __init__(
        self, loaded: loader.Loaded, links: Links, tables: Tables, kernel: Features
    ) -> None:
        self._loaded = loaded
        self._event_codec = event_codec(loaded)
        self._links = links
        self.tables = tables
        self.features = kernel
        self._runtime_lock = threading.Lock()
        self._xdp: dict[str, XdpMode | None] = {}

    @staticmethod
    def open(
        pins: Path,
        cgroup: Path,
        settings: Settings,
        sizes: Sizes | None = None,
        *,
        objects: Iterable[Path] | None = None,
        features: Features | None = None,
        migrations: Iterable[Migration] = MIGRATIONS,
    ) -> Datapath:
        """Everything loaded, pinned below `pins`, and existing attachments moved to it."""
        kernel = features or probing.probe()
        tree = Pins(pins)
        tree.create()
        require_cgroup2(cgroup)
        paths = loader.OBJECTS.glob("*.bpf.o") if objects is None else objects
        possible = settings.has_set_retval and kernel.set_retval
        chosen = dataclasses.replace(settings, has_set_retval=possible)
        opened = loader.open_objects(paths, chosen)
        try:
            loaded = loader.load(tree, opened, sizes or Sizes(), migrations)
        finally:
            for entry in opened:
                entry.handle.close()
        try:
            tables = make_tables(loaded)
            links = Links(tree, loaded.programs, loaded.program_ids, kernel.tcx)
            links.refresh({n: a for n, a in ATTACHMENTS.items() if n in loaded.programs})
            sockets = {n: t for n, t in loaded.attach_types.items() if n not in ATTACHMENTS}
            links.attach_cgroup(cgroup, sockets)
            loader.finish(tree, loaded)
        except BaseException:
            loaded.close()
            raise
        datapath = Datapath(loaded, links, tables, kernel)
        loaded.forget_types()
        return datapath

    def close(self) -> None:
        self._loaded.close()

    @property
    def programs(self) -> dict[str, int]:
        """Descriptors of the loaded programs by name."""
        return dict(self._loaded.programs)

    # ---- attachments ------------------------------------------------------------

    def attach_pod(self, ifname: str) -> None:
        self._links.attach(ifname, POD)

    def settle_pod(self, ifname: str) -> bool:
        """Makes a pod's attachment cheaper for its packets; takes up to 35 ms of the kernel's
        RTNL lock, so call it when no pod is being wired. False: it was so already."""
        return self._links.settle(ifname, POD)

    def detach_pod(self, ifname: str) -> None:
        self._links.detach(ifname, POD)

    def attach_uplink(self, ifname: str, xdp: Sequence[XdpMode] = ()) -> None:
        """`xdp`: ways to attach the XDP program, the best first; empty: not at all. What the
        device does not take is logged, and tc does XDP's work."""
        self._set_xdp(ifname, None)
        self._links.attach(ifname, UPLINK)
        self._set_xdp(ifname, self._links.attach_xdp(ifname, XDP.program, xdp))

    def detach_uplink(self, ifname: str) -> None:
        self._set_xdp(ifname, None)
        self._links.detach(ifname, (*UPLINK, XDP))
        del self._xdp[ifname]

    def keep_uplinks(self, ifnames: Collection[str]) -> None:
        """Detaches from what is no uplink any more, as somebody else's setting said before."""
        noted = {name for part in (*UPLINK, XDP) for name in self._links.with_program(part.program)}
        for ifname in sorted(noted - set(ifnames)):
            try:
                self.detach_uplink(ifname)
                logger.info("%s is no uplink any more: detached", ifname)
            except DatapathError as error:
                logger.warning("%s is no uplink any more: %s", ifname, error)

    def _set_xdp(self, ifname: str, mode: XdpMode | None) -> None:
        """tc leaves to XDP what XDP does on every uplink."""
        self._xdp[ifname] = mode
        everywhere = RuntimeFeature.XDP_BLOCKS if all(self._xdp.values()) else 0
        self._set_features(everywhere, RuntimeFeature.XDP_BLOCKS)

    @property
    def xdp(self) -> dict[str, XdpMode | None]:
        """How XDP is attached to each uplink; None: it is not."""
        return dict(self._xdp)

    def attach_overlay(self, ifname: str) -> None:
        self._links.attach(ifname, OVERLAY)

    def detach_overlay(self, ifname: str) -> None:
        self._links.detach(ifname, OVERLAY)

    def attached(self) -> set[str]:
        """Names of the existing interfaces that have all programs of their role: one that a
        stopped attach left with half of them is not among them."""
        return self._links.attached(ROLES)

    # ---- runtime state and events --------------------------------------------------

    def runtime(self) -> records.Runtime:
        return self.tables.runtime.get(0) or records.Runtime(0, 0)

    def set_generation(self, generation: int) -> None:
        """Established flows of other generations are judged anew at their next packet."""
        self._change_runtime(lambda row: replace(row, policy_generation=generation & 0xFFFF_FFFF))

    def bump(self) -> int:
        """Raises the policy generation; returns the new one."""
        row = self._change_runtime(
            lambda row: replace(row, policy_generation=(row.policy_generation + 1) & 0xFFFF_FFFF)
        )
        return row.policy_generation

    def set_features(self, features: int) -> None:
        """RuntimeFeature bits: what this node's services need looked at. Not those that are
        about attachments."""
        self._set_features(features, ~int(RuntimeFeature.XDP_BLOCKS))

    def _set_features(self, features: int, mask: int) -> None:
        self._change_runtime(
            lambda row: replace(row, features=row.features & ~mask | features & mask)
        )

    def set_event_mask(self, mask: int) -> None:
        """Bits (1 << EventKind) of the events to report; 0 for none."""
        self._change_runtime(lambda row: replace(row, event_mask=mask))

    def _change_runtime(
        self, change: Callable[[records.Runtime], records.Runtime]
    ) -> records.Runtime:
        """One after the other: a generation that a new event mask took back would keep flows that
        policy no longer allows."""
        with self._runtime_lock:
            changed = change(self.runtime())
            self.tables.runtime.update({0: changed})
        return changed

    def events(self) -> EventReader:
        if self._event_codec is None:
            raise LayoutMismatch("open", EVENTS, 0, "no object has struct event in its BTF")
        return EventReader(self._loaded.maps[EVENTS], self._event_codec)

    @staticmethod
    def remove(pins: Path) -> None:
        """Detaches and unpins everything: for good, at uninstallation."""
        if not pins.is_dir():
            return
        require_bpffs(pins)
        detach_all(Pins(pins), ATTACHMENTS)
        remove_tree(pins)
