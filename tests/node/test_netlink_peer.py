# SPDX-License-Identifier: Apache-2.0
"""What our own netlink writes, read by somebody else's: pyroute2.

host netns: weir… ── eth0 :pod netns
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from pyroute2 import IPRoute
from support.namespaces import NetNs, in_thread

from weir.api import address
from weir.cni import wiring
from weir.cni.endpoint import LocalEndpoint, PodRef

MTU = 1440
PERMANENT = 0x80  # NUD_PERMANENT, linux/neighbour.h
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
ADDRESSES = {4: "10.9.0.7", 6: "fd00:9::7"}
GATEWAYS = {4: "169.254.1.1", 6: "fe80::1"}
FULL = {4: 32, 6: 128}


@pytest.fixture
def wired(netns: Callable[[], NetNs]) -> tuple[NetNs, NetNs, LocalEndpoint]:
    host, pod = netns(), netns()
    addresses = tuple(address.parse(text) for text in ADDRESSES.values())
    planned = wiring.plan("c1", pod.path, "eth0", addresses, PodRef("ns", "pod", "uid"), "weir")

    def wire() -> LocalEndpoint:
        made = wiring.create(planned, MTU)
        wiring.bring_up(made)
        return made

    with host.entered():
        return host, pod, in_thread(wire)


def mac(octets: bytes) -> str:
    return octets.hex(":")


def routes(netlink: IPRoute, family: int) -> list[dict[str, Any]]:
    main = netlink.get_routes(family=FAMILIES[family], table=254)
    return [dict(route["attrs"], dst_len=route["dst_len"]) for route in main]


def neighbours(netlink: IPRoute, family: int) -> dict[str, str]:
    found = netlink.get_neighbours(family=FAMILIES[family])
    return {
        n.get_attr("NDA_DST"): n.get_attr("NDA_LLADDR") for n in found if n["state"] == PERMANENT
    }


def test_links(wired: tuple[NetNs, NetNs, LocalEndpoint]) -> None:
    host, pod, made = wired
    for place, name, octets in (
        (host, made.host_ifname, made.host_mac),
        (pod, "eth0", made.mac),
    ):
        with place.entered(), IPRoute() as netlink:
            (link,) = netlink.get_links(ifname=name)
            assert link.get_attr("IFLA_ADDRESS") == mac(octets)
            assert link.get_attr("IFLA_MTU") == MTU
            assert link.get_attr("IFLA_LINKINFO").get_attr("IFLA_INFO_KIND") == "veth"
            assert link["state"] == "up"


@pytest.mark.parametrize("family", [4, 6])
def test_pod_side(wired: tuple[NetNs, NetNs, LocalEndpoint], family: int) -> None:
    _, pod, made = wired
    with pod.entered(), IPRoute() as netlink:
        (index,) = netlink.link_lookup(ifname="eth0")
        held = {
            (a.get_attr("IFA_ADDRESS"), a["prefixlen"])
            for a in netlink.get_addr(family=FAMILIES[family], index=index)
        }
        assert (ADDRESSES[family], FULL[family]) in held
        (default,) = [route for route in routes(netlink, family) if route["dst_len"] == 0]
        assert default["RTA_GATEWAY"] == GATEWAYS[family]
        assert default["RTA_OIF"] == index
        assert neighbours(netlink, family) == {GATEWAYS[family]: mac(made.host_mac)}


@pytest.mark.parametrize("family", [4, 6])
def test_host_side(wired: tuple[NetNs, NetNs, LocalEndpoint], family: int) -> None:
    host, _, made = wired
    with host.entered(), IPRoute() as netlink:
        to_pod = [r for r in routes(netlink, family) if r.get("RTA_DST") == ADDRESSES[family]]
        assert [(r["dst_len"], r["RTA_OIF"]) for r in to_pod] == [(FULL[family], made.ifindex)]
        assert neighbours(netlink, family) == {ADDRESSES[family]: mac(made.mac)}
