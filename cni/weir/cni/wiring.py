# SPDX-License-Identifier: Apache-2.0
"""A pod's veth pair: what both ends shall be, bringing it about, and comparing it.

      pod namespace                        node
    +--------------------+         +---------------------+
    | eth0               |         | weir1a2b3c4d5e6     |
    | 10.0.1.7/32        |  veth   | route 10.0.1.7/32   |
    | fd00::7/128        |---------| route fd00::7/128   |
    | default via        |         | neighbours: the     |
    |  169.254.1.1,      |         |  pod's addresses,   |
    |  fe80::1           |         |  permanent          |
    +--------------------+         +---------------------+

The pod's gateways are permanent neighbours with the host end's MAC, so no address is needed
there and no ARP or NDP crosses the pair. The host end stays down until `bring_up`: before
that the pod can neither send nor receive, whatever its own end says.

The functions block; `Wiring` runs them in threads of its own, and lets each finish even
when its caller is cancelled, so that an undo never overtakes what it undoes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

from weir.api import address
from weir.api.address import Addr
from weir.cni import netlink
from weir.cni.endpoint import HOST_PREFIX, LocalEndpoint, PodRef, host_ifname, mac_addresses
from weir.cni.errors import WiringError
from weir.cni.netlink import Link, Neighbour, Netlink, Route
from weir.cni.netns import SYSCTLS, NetnsGone, inside, netns_cookie, open_netns, sysctl

GATEWAY_V4 = address.parse("169.254.1.1")
GATEWAY_V6 = address.parse("fe80::1")
ANY_V4 = address.parse("0.0.0.0")  # noqa: S104  the default route, not a socket
ANY_V6 = address.parse("::")
LOOPBACK = 1
WORKERS = 2
"""The kernel makes links one after the other; the second thread's Python runs meanwhile."""

P = ParamSpec("P")
R = TypeVar("R")


class Wiring:
    """Runs the work. `mtu` is that of pods wired from now on."""

    def __init__(self, mtu: int, *, sysctls: Path = SYSCTLS) -> None:
        self.mtu = mtu
        self._sysctls = sysctls
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="wiring")
        # deleting a link waits 20 ms in the kernel: a node's teardown must not hold up its ADDs
        self._removal = ThreadPoolExecutor(1, thread_name_prefix="unwiring")

    async def prepare_host(self) -> None:
        await self._run(prepare_host, self._sysctls)

    async def create(
        self,
        container_id: str,
        netns: str,
        ifname: str,
        addresses: tuple[Addr, ...],
        pod: PodRef,
        network: str,
    ) -> LocalEndpoint:
        """The pair with its pod end complete and its host end down."""
        planned = plan(container_id, netns, ifname, addresses, pod, network)
        return await self._run(create, planned, self.mtu, self._sysctls)

    async def bring_up(self, endpoint: LocalEndpoint) -> None:
        """The last step: from here on packets flow."""
        await self._run(bring_up, endpoint)

    async def remove(self, ifname: str) -> None:
        """Deletes the pair by its host end, and with it all addresses and routes. Idempotent."""
        await self._finish(self._removal.submit(remove, ifname))

    async def netns_cookie(self, netns: str) -> int:
        """0 if the kernel does not tell, or the namespace is gone."""
        return await self._run(cookie_of, netns)

    async def host_links(self) -> dict[str, Link]:
        """The host ends that exist, by name."""
        return await self._run(host_links)

    async def describe(self, endpoint: LocalEndpoint) -> list[str]:
        """What differs in the kernel from what was wired, one sentence each."""
        return await self._run(describe, endpoint)

    def close(self) -> None:
        self._threads.shutdown()
        self._removal.shutdown()

    async def _run(self, job: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await self._finish(self._threads.submit(job, *args, **kwargs))

    @staticmethod
    async def _finish(job: Future[R]) -> R:
        future = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


def plan(
    container_id: str,
    netns: str,
    ifname: str,
    addresses: tuple[Addr, ...],
    pod: PodRef,
    network: str,
) -> LocalEndpoint:
    """The endpoint before its link exists: ifindex 0."""
    mac, host_mac = mac_addresses(container_id, ifname)
    return LocalEndpoint(
        container_id=container_id,
        netns=netns,
        ifname=ifname,
        host_ifname=host_ifname(container_id, ifname),
        ifindex=0,
        mac=mac,
        host_mac=host_mac,
        addresses=addresses,
        pod=pod,
        network=network,
    )


def gateways(addresses: Iterable[Addr]) -> list[Addr]:
    """One for each family among the addresses."""
    families = {address.is_ipv4(addr) for addr in addresses}
    return [g for g in (GATEWAY_V4, GATEWAY_V6) if address.is_ipv4(g) in families]


def default_route(gateway: Addr, ifindex: int) -> Route:
    if address.is_ipv4(gateway):
        return Route(ANY_V4, address.V4_BITS, gateway, ifindex)
    return Route(ANY_V6, 0, gateway, ifindex)


def prepare_host(sysctls: Path = SYSCTLS) -> None:
    """Lets the node forward. Uplinks that take router advertisements go on taking them: the
    kernel would stop at forwarding=1 and the node lose its default route."""
    sysctl("net/ipv4/ip_forward", 1, root=sysctls)
    conf = sysctls / "net/ipv6/conf"
    if not conf.is_dir():
        return
    if (conf / "all/forwarding").read_text().strip() != "1":
        for accept in conf.glob("*/accept_ra"):
            taken = accept.parent.name not in {"all", "default", "lo"}
            if taken and accept.read_text().strip() == "1":
                sysctl(f"net/ipv6/conf/{accept.parent.name}/accept_ra", 2, root=sysctls)
    sysctl("net/ipv6/conf/all/forwarding", 1, root=sysctls)


def create(planned: LocalEndpoint, mtu: int, sysctls: Path = SYSCTLS) -> LocalEndpoint:
    """Replaces what an earlier try of the same container left."""
    name = planned.host_ifname
    has_v6 = GATEWAY_V6 in gateways(planned.addresses)
    netns_fd = open_netns(planned.netns)
    try:
        with Netlink() as host:
            host.send(
                [
                    netlink.delete_link(name),
                    netlink.create_veth(
                        name, planned.host_mac, mtu, planned.ifname, planned.mac, netns_fd
                    ),
                    netlink.quiet_host_end(name),
                    netlink.no_generated_address(name),
                ]
            )
            link = host.link(name)
        if link is None:
            raise WiringError(f"the link {name} vanished while it was wired")
        # a pod must not be able to give the node a default route
        sysctl(f"net/ipv6/conf/{name}/accept_ra", 0, root=sysctls, optional=not has_v6)
        if has_v6:
            sysctl(f"net/ipv6/conf/{name}/disable_ipv6", 0, root=sysctls)
        with inside(netns_fd):
            _configure_pod_end(planned, link.peer, has_v6=has_v6, sysctls=sysctls)
            cookie = netns_cookie()
    finally:
        os.close(netns_fd)
    return dataclasses.replace(planned, ifindex=link.index, netns_cookie=cookie)


def _configure_pod_end(
    planned: LocalEndpoint, ifindex: int, *, has_v6: bool, sysctls: Path
) -> None:
    conf = f"net/ipv6/conf/{planned.ifname}"
    sysctl(f"{conf}/accept_ra", 0, root=sysctls, optional=not has_v6)
    sysctl(f"{conf}/accept_dad", 0, root=sysctls, optional=not has_v6)
    if has_v6:
        sysctl(f"{conf}/disable_ipv6", 0, root=sysctls)
    routers = gateways(planned.addresses)
    with Netlink() as pod:
        pod.send(
            [
                netlink.set_up(LOOPBACK),
                netlink.set_up(ifindex),
                *(netlink.add_address(ifindex, addr) for addr in planned.addresses),
                *(netlink.add_neighbour(ifindex, g, planned.host_mac) for g in routers),
                *(netlink.add_route(ifindex, default_route(g, ifindex)) for g in routers),
            ]
        )


def bring_up(endpoint: LocalEndpoint) -> None:
    index = endpoint.ifindex
    with Netlink() as host:
        host.send(
            [
                netlink.set_up(index),
                *(netlink.add_neighbour(index, a, endpoint.mac) for a in endpoint.addresses),
                *(netlink.add_route(index, Route(a, 128, None, index)) for a in endpoint.addresses),
            ]
        )


def cookie_of(netns: str) -> int:
    try:
        fd = open_netns(netns)
    except NetnsGone:
        return 0
    try:
        with inside(fd):
            return netns_cookie()
    finally:
        os.close(fd)


def remove(ifname: str) -> None:
    with Netlink() as host:
        host.send([netlink.delete_link(ifname)])


def host_links() -> dict[str, Link]:
    with Netlink() as host:
        return {link.name: link for link in host.links() if is_host_end(link.name)}


def is_host_end(name: str) -> bool:
    digits = name.removeprefix(HOST_PREFIX)
    return name != digits and len(digits) == 11 and set(digits) <= set("0123456789abcdef")


def describe(endpoint: LocalEndpoint) -> list[str]:
    """Compares links, addresses, routes and neighbours of both ends with the endpoint."""
    found = []
    with Netlink() as host:
        link = host.link(endpoint.host_ifname)
        if link is None:
            return [f"the host end {endpoint.host_ifname} does not exist"]
        found += _link_differs(link, endpoint.host_ifname, endpoint.host_mac)
        wanted = {Route(a, 128, None, link.index) for a in endpoint.addresses}
        neighbours = {Neighbour(a, endpoint.mac, True, link.index) for a in endpoint.addresses}
        found += _missing(
            endpoint.host_ifname, wanted - host.routes(), neighbours - host.neighbours()
        )
    try:
        netns_fd = open_netns(endpoint.netns)
    except NetnsGone as error:
        return [*found, str(error)]
    try:
        with inside(netns_fd), Netlink() as pod:
            found += _pod_end_differs(endpoint, pod)
    finally:
        os.close(netns_fd)
    return found


def _pod_end_differs(endpoint: LocalEndpoint, pod: Netlink) -> list[str]:
    name = endpoint.ifname
    link = pod.link(name)
    if link is None:
        return [f"{name} does not exist in {endpoint.netns}"]
    found = _link_differs(link, name, endpoint.mac)
    missing = set(endpoint.addresses) - pod.addresses(link.index)
    found += [f"{name} lacks the address {address.text(addr)}" for addr in sorted(missing)]
    routers = gateways(endpoint.addresses)
    wanted = {default_route(g, link.index) for g in routers}
    neighbours = {Neighbour(g, endpoint.host_mac, True, link.index) for g in routers}
    return found + _missing(name, wanted - pod.routes(), neighbours - pod.neighbours())


def _link_differs(link: Link, name: str, mac: bytes) -> list[str]:
    found = [] if link.up else [f"{name} is down"]
    if link.mac != mac:
        found.append(f"{name} has the MAC address {link.mac.hex(':')}, not {mac.hex(':')}")
    return found


def _missing(name: str, routes: set[Route], neighbours: set[Neighbour]) -> list[str]:
    found = [f"{name} lacks the route to {address.text(r.destination)}" for r in routes]
    found += [f"{name} lacks the neighbour {address.text(n.address)}" for n in neighbours]
    return sorted(found)
