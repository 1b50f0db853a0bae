# SPDX-License-Identifier: Apache-2.0
"""Rows of `netns_addresses`: whose sockets a pod's network namespace has.

The socket hooks see a namespace's cookie, never an address. With these rows a client's session
affinity is the same at its sockets and on the wire.
"""

from __future__ import annotations

from weir.agent.rows import Rows
from weir.api.address import Addr, is_ipv4
from weir.cni.endpoint import LocalEndpoint
from weir.datapath import records

NONE = Addr(bytes(16))


class NetnsTable:
    def __init__(self) -> None:
        self.rows: Rows[int, records.NetnsAddresses] = Rows("netns_addresses")
        self._cookies: dict[str, int] = {}

    def set_endpoint(self, endpoint: LocalEndpoint) -> None:
        self.remove_endpoint(endpoint.container_id)
        if not endpoint.netns_cookie:
            return  # the kernel cannot tell it: 5.10 to 5.13
        ipv4, ipv6 = (
            next((addr for addr in endpoint.addresses if is_ipv4(addr) == family), NONE)
            for family in (True, False)
        )
        self._cookies[endpoint.container_id] = endpoint.netns_cookie
        self.rows.put(endpoint.netns_cookie, records.NetnsAddresses(ipv4, ipv6))

    def remove_endpoint(self, container_id: str) -> None:
        cookie = self._cookies.pop(container_id, 0)
        if cookie:
            self.rows.drop(cookie)
