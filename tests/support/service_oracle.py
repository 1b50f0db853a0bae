# SPDX-License-Identifier: Apache-2.0
"""What a client of a Service gets, from kube-proxy's documented rules and not from our code.

Sources: "Virtual IPs and Service Proxies" and "Using Source IP" of the Kubernetes documentation;
the specs of upstream's suite on traffic policies say what a node does with other nodes' clients:
they are external to it, as only what starts on the node itself, or in its pods, is not.

Two things kube-proxy leaves open and this does not: with policy Cluster it masquerades what comes
to external addresses always, here only where the answer could not come back otherwise; and with
direct server return it could: a pod elsewhere sees the client outside, whom its node answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    CLUSTER_IP = "cluster-ip"
    NODE_PORT = "node-port"
    LOOPBACK = "loopback-node-port"
    LOAD_BALANCER = "load-balancer"
    EXTERNAL_IP = "external-ip"
    HOST_PORT = "host-port"


class Client(StrEnum):
    """`..._PACKETS`: no socket program sees it, as with a VM in the pod."""

    POD = "pod"
    POD_PACKETS = "pod-packets"
    HOST = "host"
    OTHER_POD = "other-pod"
    OTHER_NODE = "other-node"
    BACKEND_NODE = "backend-node"
    OUTSIDE = "outside"


class Backend(StrEnum):
    """SELF is the pod that is also a client."""

    SELF = "self"
    NEAR = "near"
    FAR = "far"
    NEAR_HOST = "near-host"
    FAR_HOST = "far-host"
    NONE = "none"


FRONT = 1
"""The node whose addresses NodePorts are asked at, and through which the outside gets at VIPs."""

EXTERNAL = frozenset({Kind.NODE_PORT, Kind.LOAD_BALANCER, Kind.EXTERNAL_IP})
HOSTS = frozenset({Client.HOST, Client.OTHER_NODE, Client.BACKEND_NODE})
NODE_OF_CLIENT = {
    Client.POD: FRONT,
    Client.POD_PACKETS: FRONT,
    Client.HOST: FRONT,
    Client.BACKEND_NODE: 2,
    Client.OTHER_POD: 3,
    Client.OTHER_NODE: 3,
    Client.OUTSIDE: 0,
}
NODE_OF_BACKEND = {
    Backend.SELF: FRONT,
    Backend.NEAR: FRONT,
    Backend.NEAR_HOST: FRONT,
    Backend.FAR: 2,
    Backend.FAR_HOST: 2,
}

REACHED, REFUSED, DROPPED = "reached", "refused", "dropped"
ANY = "*"


@dataclass(frozen=True, slots=True)
class Case:
    kind: Kind
    local: bool  # both traffic policies
    family: int
    protocol: str
    client: Client
    backend: Backend

    def __str__(self) -> str:
        policy = "Local" if self.local else "Cluster"
        return f"{self.kind}, {policy}, from {self.client} to {self.backend}"


@dataclass(frozen=True, slots=True)
class Expected:
    """source: "client" (its own address), "front" (that of the node that load-balanced), ANY."""

    answer: str
    source: str = ""


def serving_node(case: Case) -> int:
    """The node that chooses the backend: where the client is, if it serves the address at all."""
    home = NODE_OF_CLIENT[case.client]
    if case.kind is Kind.HOST_PORT:
        return NODE_OF_BACKEND[case.backend]
    return FRONT if case.kind is Kind.NODE_PORT or home == 0 else home


def expect(case: Case, dsr: bool) -> Expected:
    """dsr: backends on other nodes answer clients outside themselves."""
    if case.kind is Kind.LOOPBACK and case.client not in HOSTS:
        return Expected(REFUSED)  # its own loopback, where nobody listens
    if case.backend is Backend.NONE:
        return Expected(REFUSED)
    at = serving_node(case)
    inside = NODE_OF_CLIENT[case.client] == at
    # An external address used from within its node is as good as the cluster IP.
    bound = case.local and (case.kind is Kind.CLUSTER_IP or not inside)
    here = NODE_OF_BACKEND[case.backend] == at
    if bound and not here and case.kind is not Kind.HOST_PORT:
        return Expected(DROPPED)
    return Expected(REACHED, source(case, inside, here or (dsr and answers_itself(case))))


def answers_itself(case: Case) -> bool:
    """A node's own sockets cannot: they know nothing of what the client asked for."""
    return case.kind in EXTERNAL and case.client is Client.OUTSIDE and case.backend is Backend.FAR


def source(case: Case, inside: bool, kept: bool) -> str:
    """kept: nothing between client and backend must be on the way back."""
    if case.kind is Kind.LOOPBACK:
        return ANY  # the host's choice
    if case.client is Client.POD_PACKETS and case.backend is Backend.SELF:
        return ANY  # not its own: its stack would take that for a forgery
    return "client" if inside or kept else "front"
