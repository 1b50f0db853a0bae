# SPDX-License-Identifier: Apache-2.0
"""What the programs are told at load: constants (`const volatile` globals) and map sizes.

A field is the global of the same name in datapath/bpf/lib/settings.h. The verifier prunes
what a constant rules out, so a changed setting means newly loaded programs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from weir.api.address import Addr
from weir.datapath.btf import Btf, Kind
from weir.datapath.codec import Scalar
from weir.datapath.errors import LayoutMismatch

UNSPECIFIED = bytes(16)


@dataclass(frozen=True, slots=True)
class Settings:
    """Constants of all programs.

    node_ipv4, node_ipv6: this node's addresses for masquerading, None: none of that family.
    overlay_ifindex: the VXLAN device, 0: none. overlay_mtu: bytes of an inner IP packet.
    tunnel: encapsulate to routes with ROUTE_TUNNEL. masquerade: rewrite what leaves the
    cluster. snat_port_first/last: the ports masquerading takes; outside the kernel's
    ip_local_port_range (by default 32768-60999), so that the node's own sockets keep theirs.
    overlay_port: UDP port of the VXLAN device, 0: none.
    host_netns_cookie: of the host's own network namespace, 0: that of the first one.
    maglev_table_size: slots of each service with SERVICE_MAGLEV, 0: there are none.
    xdp_services: XDP translates for NodePort and LoadBalancer what goes to other nodes.
    has_set_retval: use bpf_set_retval; Datapath.open clears it where the kernel has none.
    """

    node_ipv4: Addr | None = None
    node_ipv6: Addr | None = None
    overlay_ifindex: int = 0
    overlay_mtu: int = 0
    tunnel: bool = False
    masquerade: bool = False
    overlay_port: int = 0
    snat_port_first: int = 1024
    snat_port_last: int = 29999
    host_netns_cookie: int = 0
    maglev_table_size: int = 0
    xdp_services: bool = False
    has_set_retval: bool = True


@dataclass(frozen=True, slots=True)
class Sizes:
    """Entries of each map (events: bytes, a power of two); None: as the objects declare."""

    services: int | None = None
    backends: int | None = None
    maglev: int | None = None
    affinity: int | None = None
    netns_addresses: int | None = None
    source_ranges: int | None = None
    announced: int | None = None
    blocked: int | None = None
    endpoints: int | None = None
    addresses: int | None = None
    prefixes: int | None = None
    routes: int | None = None
    policy: int | None = None
    ct: int | None = None
    snat: int | None = None
    sock_nat: int | None = None
    events: int | None = None

    def of(self, table: str) -> int | None:
        size: int | None = getattr(self, table, None)
        return size


def constants(settings: Settings) -> dict[str, int | bytes]:
    """The values by name, as numbers or addresses."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: UNSPECIFIED if value is None else value for name, value in values.items()}


def apply(btf: Btf, rodata: bytearray, settings: Settings) -> set[str]:
    """Writes the constants that this object has into its initial data; returns their names."""
    values = constants(settings)
    known = set()
    for variable in btf.variables(".rodata"):
        if variable.name not in values:
            continue
        if btf.resolve(variable.type).kind not in {Kind.INT, Kind.STRUCT, Kind.ENUM}:
            raise LayoutMismatch("set", variable.name, 0, "neither a number nor an address")
        data = Scalar(btf, variable.type).encode(values[variable.name])
        rodata[variable.offset : variable.offset + len(data)] = data
        known.add(variable.name)
    return known
