# SPDX-License-Identifier: Apache-2.0
"""The kinds that the operator watches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec

from weir.operator import (
    blocklists,
    cluster_policy,
    liveness,
    objects,
    policy,
    pools,
    services,
    wire,
)
from weir.operator.objects import Parsed
from weir.operator.reflector import Kind, Reader

W = TypeVar("W")
T = TypeVar("T")


def reader(struct: type[W], parse: Callable[[W], Parsed[T]]) -> Reader[T]:
    """Typed decode, then parse. msgspec.DecodeError: not even the types fit."""
    decoder = msgspec.json.Decoder(struct)
    return lambda raw: parse(decoder.decode(raw))


NAMESPACE = Kind("Namespace", "/api/v1/namespaces", reader(wire.Namespace, objects.parse_namespace))
NODE = Kind("Node", "/api/v1/nodes", reader(wire.Node, objects.parse_node))
POD = Kind("Pod", "/api/v1/pods", reader(wire.Pod, objects.parse_pod))
SERVICE = Kind("Service", "/api/v1/services", reader(wire.Service, services.parse_service))
SLICE = Kind(
    "EndpointSlice",
    "/apis/discovery.k8s.io/v1/endpointslices",
    reader(wire.EndpointSlice, objects.parse_slice),
)
POLICY = Kind(
    "NetworkPolicy",
    "/apis/networking.k8s.io/v1/networkpolicies",
    reader(wire.NetworkPolicy, policy.parse_policy),
    policy.unreadable_policy,
)
CLUSTER_POLICY = Kind(
    cluster_policy.KIND,
    cluster_policy.PATH,
    cluster_policy.read_cluster_policy,
    optional=True,
)
BLOCK_LIST = Kind(
    blocklists.KIND,
    blocklists.PATH,
    reader(blocklists.WireBlockList, blocklists.parse_blocklist),
    optional=True,
)
LOAD_BALANCER_POOL = Kind(
    pools.KIND, pools.PATH, reader(pools.WirePool, pools.parse_pool), optional=True
)
NODE_LEASE = Kind("Lease", liveness.PATH, reader(liveness.WireLease, liveness.parse_lease))
