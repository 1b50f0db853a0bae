# SPDX-License-Identifier: Apache-2.0
"""Remembers the API servers that the cluster names, so that losing the configured one is no loss.

The EndpointSlices of Service default/kubernetes name every API server. They come with all the
other slices; this sits between that reflector and the model. Addresses are kept when they vanish
from a slice: one that is gone costs a failed connect, and one that is forgotten may be the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weir.api.address import is_ipv4, text
from weir.operator.objects import EndpointSlice, Key, Problem
from weir.operator.reflector import Consumer

NAMESPACE = "default"
SERVICE = "kubernetes"
PORT_NAME = "https"


@dataclass(slots=True)
class ServerWatch:
    """A consumer that passes everything on."""

    consumer: Consumer
    learn: Callable[[str], None]  # takes "https://host:port"

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        if isinstance(new, EndpointSlice) and key.namespace == NAMESPACE:
            for server in servers(new):
                self.learn(server)
        self.consumer.changed(kind, key, old, new)

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        self.consumer.problems(kind, key, problems)

    def synced(self, kind: str) -> None:
        self.consumer.synced(kind)


def servers(slice_: EndpointSlice) -> list[str]:
    """Those that a slice names; none if it is not that of the API servers."""
    if slice_.service != SERVICE:
        return []
    ports = [port.port for port in slice_.ports if port.name == PORT_NAME]
    hosts = [
        text(e.address) if is_ipv4(e.address) else f"[{text(e.address)}]" for e in slice_.endpoints
    ]
    return [f"https://{host}:{port}" for host in hosts for port in ports]
