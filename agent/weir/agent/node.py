# SPDX-License-Identifier: Apache-2.0
"""The node's own network: what it is, and what Weir needs of it.

Facts (uplinks, addresses, MTU) are read from the kernel, never remembered; the VXLAN device and
the host routes to other nodes' pods are compared with the kernel each time and put right. All
of it blocks; the agent runs it in a thread whenever rtnetlink says that something changed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from weir.agent import links
from weir.agent.announced import Segment
from weir.agent.config import Config
from weir.agent.errors import NodeError
from weir.agent.links import LinkAddress, NodeNetlink
from weir.agent.routes import HostRoute
from weir.api.address import Addr, is_ipv4
from weir.api.address import text as address_text
from weir.cni.endpoint import HOST_PREFIX, LocalEndpoint
from weir.cni.errors import CniError
from weir.cni.netlink import Link, Netlink, delete_link
from weir.cni.netns import inside, open_netns

logger = logging.getLogger(__name__)

MAC_BYTES = 6
VXLAN_HEADERS = {True: 50, False: 70}
"""Bytes around an inner IP packet, by "the underlay is IPv4"."""
LOCAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")
NODE_PORT_FIRST = 30000
"""Of Kubernetes' default: what people look for at a node port should not be masquerading."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """addresses: the node's own for pods and tunnels, the underlay's family first;
    local: every global address of the node. mtu: of pods, in bytes. segments: of those uplinks
    that are Ethernet. snat_ports: first and last that masquerading may take."""

    addresses: tuple[Addr, ...]
    local: tuple[Addr, ...]
    uplinks: tuple[str, ...]
    mtu: int
    overlay_ifindex: int = 0
    segments: tuple[Segment, ...] = ()
    snat_ports: tuple[int, int] = (1024, 29999)

    def first(self, ipv4: bool) -> Addr | None:
        return next((addr for addr in self.addresses if is_ipv4(addr) == ipv4), None)


def derive(
    config: Config,
    devices: Sequence[Link],
    addresses: Sequence[LinkAddress],
    default_devices: Iterable[int],
    named: Sequence[Addr],
) -> NodeFacts:
    """`named`: addresses of the Node object, as far as known. NodeError if there is none to use."""
    foreign = [link for link in devices if not link.name.startswith(HOST_PREFIX)]
    by_index = {link.index: link for link in foreign}
    here = [item for item in addresses if item.ifindex in by_index]
    wanted = [*([config.host_ip] if config.host_ip else []), *named]
    local = tuple(dict.fromkeys(item.address for item in here))
    own = [addr for addr in wanted if addr in local]
    if config.uplinks:
        uplinks = [link for link in foreign if link.name in config.uplinks]
        if not uplinks:
            raise NodeError("find the uplinks", ", ".join(config.uplinks), "no such device")
    else:
        indexes = dict.fromkeys(item.ifindex for item in here if item.address in own)
        if not indexes:
            indexes = dict.fromkeys(index for index in default_devices if index in by_index)
        uplinks = [by_index[index] for index in indexes]
    if not uplinks:
        raise NodeError(
            "find the uplink", config.node, "no device has the node's address: set uplinks"
        )
    at_uplinks = [item.address for item in here if item.ifindex in {link.index for link in uplinks}]
    chosen: dict[bool, Addr] = {}
    for addr in [*own, *at_uplinks]:
        chosen.setdefault(is_ipv4(addr), addr)
    if not chosen:
        raise NodeError("find the address of", config.node, "its uplinks have none")
    first = next(iter(chosen))
    mtu = min(link.mtu for link in uplinks)
    if config.tunnel:
        mtu -= VXLAN_HEADERS[first]
    return NodeFacts(
        addresses=tuple(chosen.values()),
        local=local,
        uplinks=tuple(sorted(link.name for link in uplinks)),
        mtu=config.mtu or mtu,
        segments=tuple(
            Segment(
                link.name,
                link.index,
                link.mac,
                tuple(dict.fromkeys(a.network for a in here if a.ifindex == link.index)),
            )
            for link in sorted(uplinks, key=lambda link: link.name)
            if len(link.mac) == MAC_BYTES
        ),
    )


def snat_ports(first: int, last: int) -> tuple[int, int]:
    """The larger range without the node's own sockets', which use `first` to `last`."""
    ranges = ((1024, min(first, NODE_PORT_FIRST) - 1), (last + 1, 65535))
    low, high = max(ranges, key=lambda ports: ports[1] - ports[0])
    if low <= high:
        return low, high
    logger.warning(
        "%s leaves no port for masquerading: taking 1024 to %d, which the node's own connections"
        " may hit; narrow it",
        LOCAL_PORTS, NODE_PORT_FIRST - 1,
    )  # fmt: skip
    return 1024, NODE_PORT_FIRST - 1


def observe(config: Config, named: Sequence[Addr]) -> NodeFacts:
    """Facts, with the VXLAN device made or put right if there is to be one."""
    with NodeNetlink() as netlink:
        routes = netlink.kernel_routes()
        facts = derive(
            config,
            netlink.links(),
            netlink.global_addresses(),
            links.default_devices(routes),
            named,
        )
        facts = replace(facts, snat_ports=snat_ports(*map(int, LOCAL_PORTS.read_text().split())))
        if not config.tunnel:
            return facts
        device = netlink.link(links.OVERLAY)
        if device is None:
            netlink.send([links.create_overlay(facts.mtu)])
            device = netlink.link(links.OVERLAY)
        elif device.mtu != facts.mtu or not device.up:
            netlink.send([links.set_mtu(device.index, facts.mtu, up=True)])
        if device is None:
            raise NodeError("create", links.OVERLAY, "it vanished at once")
        return replace(facts, overlay_ifindex=device.index)


def converge_routes(wanted: Iterable[HostRoute], facts: NodeFacts) -> int:
    """Host routes to other nodes' pods as they shall be. Returns how many were changed.

    The overlay's device goes where there is none any more: with native routing it would keep its
    port and, to programs of before, look alive."""
    with NodeNetlink() as netlink:
        indexes = {link.name: link.index for link in netlink.links()}
        device_of = _devices(netlink.global_addresses(), indexes, facts)
        present = {route for route in netlink.kernel_routes() if route.ours}
        changes = []
        keep = set()
        for route in wanted:
            ifindex = facts.overlay_ifindex if route.via is None else device_of(route.via)
            found = [
                r
                for r in present
                if (r.destination, r.via, r.source, r.ifindex)
                == (route.destination, route.via, route.source, ifindex)
            ]
            keep.update(found)
            if not found:
                changes.append(links.add_host_route(route, ifindex))
        replaced = {route.destination for route in wanted}
        stale = present - keep
        changes += [links.delete_host_route(r) for r in stale if r.destination not in replaced]
        if not facts.overlay_ifindex and links.OVERLAY in indexes:
            changes.append(delete_link(links.OVERLAY))
        if changes:
            netlink.send(changes)
        return len(changes)


def _devices(
    addresses: Sequence[LinkAddress], indexes: dict[str, int], facts: NodeFacts
) -> Callable[[Addr], int]:
    """The uplink for a gateway: there is one segment, so the first of its family."""
    uplinks = [indexes[name] for name in facts.uplinks if name in indexes]

    def device_of(via: Addr) -> int:
        for item in addresses:
            if item.ifindex in uplinks and is_ipv4(item.address) == is_ipv4(via):
                return item.ifindex
        if not uplinks:
            raise NodeError("find the device for", address_text(via), "no uplink is there")
        return uplinks[0]

    return device_of


def converge_pod_mtus(endpoints: Iterable[LocalEndpoint], mtu: int) -> int:
    """Both ends of each veth. Returns how many were changed; a pod that is gone is fine.

    Only host ends are looked at: at a pod's own end nothing changes without its host end. The
    receiving end must never have the smaller MTU, or full packets are lost meanwhile.
    """
    changed = 0
    with Netlink() as host:
        ends = {link.name: link for link in host.links()}
        for endpoint in endpoints:
            link = ends.get(endpoint.host_ifname)
            if link is None or link.mtu == mtu:
                continue
            try:
                if link.mtu < mtu:
                    host.send([links.set_mtu(link.index, mtu)])
                    _set_pod_end_mtu(endpoint, mtu)
                else:
                    _set_pod_end_mtu(endpoint, mtu)
                    host.send([links.set_mtu(link.index, mtu)])
            except CniError as error:
                logger.warning("%s: MTU %d: %s", endpoint.pod, mtu, error)
            else:
                changed += 1
    return changed


def _set_pod_end_mtu(endpoint: LocalEndpoint, mtu: int) -> None:
    netns = open_netns(endpoint.netns)
    try:
        with inside(netns), Netlink() as pod:
            link = pod.link(endpoint.ifname)
            if link is not None:
                pod.send([links.set_mtu(link.index, mtu)])
    finally:
        os.close(netns)


def remove_all() -> None:
    """Deletes our device and routes: for uninstallation."""
    with NodeNetlink() as netlink:
        ours = [route for route in netlink.kernel_routes() if route.ours]
        netlink.send([*map(links.delete_host_route, ours), delete_link(links.OVERLAY)])
