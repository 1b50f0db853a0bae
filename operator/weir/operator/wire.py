# SPDX-License-Identifier: Apache-2.0
"""The parts of the Kubernetes API's JSON that Weir reads, as msgspec structs.

Decoding into these checks types only; meaning is checked when `weir.operator.objects` and
`weir.operator.policy` turn them into frozen dataclasses. Fields that the API may leave out or
set to null have None, so that "missing" and "empty" stay apart where the spec tells them apart.
"""

from __future__ import annotations

import msgspec


class Struct(msgspec.Struct, rename="camel", gc=False):
    pass


class Meta(Struct):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None


class Identity(Struct):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class Identified(Struct):
    """As much of any object as tells which one it is, however odd the rest of it."""

    metadata: Identity = msgspec.field(default_factory=Identity)


class Annotated(Meta):
    """Metadata of the kinds whose annotations say something to Weir."""

    annotations: dict[str, str] | None = None


class Named(Struct):
    metadata: Meta = msgspec.field(default_factory=Meta)


class ListMeta(Struct):
    resource_version: str = ""
    continue_: str | None = msgspec.field(default=None, name="continue")


class Page(Struct):
    metadata: ListMeta
    items: list[msgspec.Raw] | None = None


class WatchEvent(Struct):
    type: str
    object: msgspec.Raw


class Status(Struct):
    """The object of a watch's ERROR event, and the body of a failed request."""

    code: int | None = None
    reason: str | None = None
    message: str | None = None


# Service, EndpointSlice, Node, Namespace


class ServicePort(Struct):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    node_port: int | None = None


class ClientIp(Struct):
    timeout_seconds: int | None = None


class SessionAffinity(Struct):
    client_ip: ClientIp | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(Struct):
    type: str | None = None
    ports: list[ServicePort] | None = None
    cluster_ip: str | None = msgspec.field(default=None, name="clusterIP")
    cluster_ips: list[str] | None = msgspec.field(default=None, name="clusterIPs")
    external_ips: list[str] | None = msgspec.field(default=None, name="externalIPs")
    session_affinity: str | None = None
    session_affinity_config: SessionAffinity | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    load_balancer_source_ranges: list[str] | None = None
    health_check_node_port: int | None = None


class Ingress(Struct):
    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancer(Struct):
    ingress: list[Ingress] | None = None


class ServiceStatus(Struct):
    load_balancer: LoadBalancer | None = None


class Service(Named):
    spec: ServiceSpec = msgspec.field(default_factory=ServiceSpec)
    status: ServiceStatus | None = None


class SlicePort(Struct):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class Conditions(Struct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(Struct):
    name: str = ""


class Hints(Struct):
    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class SliceEndpoint(Struct):
    addresses: list[str] | None = None
    conditions: Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: Hints | None = None


class EndpointSlice(Named):
    address_type: str = ""
    endpoints: list[SliceEndpoint] | None = None
    ports: list[SlicePort] | None = None


class Taint(Struct):
    key: str = ""


class NodeSpec(Struct):
    pod_cidr: str | None = msgspec.field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = msgspec.field(default=None, name="podCIDRs")
    taints: list[Taint] | None = None


class NodeAddress(Struct):
    type: str = ""
    address: str = ""


class NodeCondition(Struct):
    type: str = ""
    status: str = ""


class NodeStatus(Struct):
    addresses: list[NodeAddress] | None = None
    conditions: list[NodeCondition] | None = None


class Node(Named):
    spec: NodeSpec = msgspec.field(default_factory=NodeSpec)
    status: NodeStatus | None = None


class Namespace(Struct):
    metadata: Annotated = msgspec.field(default_factory=Annotated)


# Pod


class ContainerPort(Struct):
    name: str | None = None
    protocol: str | None = None
    container_port: int = 0
    host_port: int | None = None
    host_ip: str | None = msgspec.field(default=None, name="hostIP")


class Container(Struct):
    ports: list[ContainerPort] | None = None
    restart_policy: str | None = None


class PodSpec(Struct):
    node_name: str | None = None
    host_network: bool | None = None
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None


class PodIp(Struct):
    ip: str | None = None


class PodStatus(Struct):
    phase: str | None = None
    pod_ip: str | None = msgspec.field(default=None, name="podIP")
    pod_ips: list[PodIp] | None = msgspec.field(default=None, name="podIPs")


class Pod(Named):
    spec: PodSpec = msgspec.field(default_factory=PodSpec)
    status: PodStatus | None = None


# NetworkPolicy


class Requirement(Struct):
    key: str = ""
    operator: str = ""
    values: list[str] | None = None


class LabelSelector(Struct):
    match_labels: dict[str, str] | None = None
    match_expressions: list[Requirement] | None = None


class IpBlock(Struct):
    cidr: str = ""
    except_: list[str] | None = msgspec.field(default=None, name="except")


class Peer(Struct):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IpBlock | None = None


class PolicyPort(Struct):
    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class IngressRule(Struct):
    from_: list[Peer] | None = msgspec.field(default=None, name="from")
    ports: list[PolicyPort] | None = None


class EgressRule(Struct):
    to: list[Peer] | None = None
    ports: list[PolicyPort] | None = None


class PolicySpec(Struct):
    pod_selector: LabelSelector | None = None
    ingress: list[IngressRule] | None = None
    egress: list[EgressRule] | None = None
    policy_types: list[str] | None = None


class NetworkPolicy(Named):
    spec: PolicySpec = msgspec.field(default_factory=PolicySpec)


# ClusterNetworkPolicy, of v1alpha2


class NamespacedPod(Struct):
    namespace_selector: LabelSelector | None = None
    pod_selector: LabelSelector | None = None


class ClusterSubject(Struct):
    """Of an ingress rule's peer, too."""

    namespaces: LabelSelector | None = None
    pods: NamespacedPod | None = None


class ClusterEgressPeer(ClusterSubject):
    nodes: LabelSelector | None = None
    networks: list[str] | None = None


class DestinationRange(Struct):
    start: int | None = None
    end: int | None = None


class DestinationPort(Struct):
    number: int | None = None
    range: DestinationRange | None = None


class ProtocolMatch(Struct):
    destination_port: DestinationPort | None = None


class ClusterProtocol(Struct):
    tcp: ProtocolMatch | None = None
    udp: ProtocolMatch | None = None
    sctp: ProtocolMatch | None = None
    destination_named_port: str | None = None


class ClusterIngressRule(Struct):
    action: str = ""
    from_: list[ClusterSubject] | None = msgspec.field(default=None, name="from")
    protocols: list[ClusterProtocol] | None = None


class ClusterEgressRule(Struct):
    action: str = ""
    to: list[ClusterEgressPeer] | None = None
    protocols: list[ClusterProtocol] | None = None


class ClusterPolicySpec(Struct):
    tier: str = ""
    priority: int | None = None
    subject: ClusterSubject = msgspec.field(default_factory=ClusterSubject)
    ingress: list[ClusterIngressRule] | None = None
    egress: list[ClusterEgressRule] | None = None


class ClusterNetworkPolicy(Named):
    spec: ClusterPolicySpec = msgspec.field(default_factory=ClusterPolicySpec)
    # Read apart, so that an odd status does not make the policy unreadable.
    status: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
