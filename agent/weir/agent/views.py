# SPDX-License-Identifier: Apache-2.0
"""What the local API shows: the agent's state as plain records, in text form."""

from __future__ import annotations

import msgspec

from weir.agent.backends import unpack
from weir.agent.frontends import EXTERNAL, Rank, Row, ranges
from weir.agent.reconciler import Reconciler
from weir.agent.resources import Service, ServicePort, Tier
from weir.agent.rule_sets import describe_policy
from weir.agent.services import HOST_PORTS, ServiceName, describe
from weir.agent.state import DesiredState
from weir.agent.stream import StreamState
from weir.agent.tables import Projection
from weir.agent.topology import of_family, terminating
from weir.agent.verdict import PROTOCOLS
from weir.api.address import Addr, text
from weir.datapath.records import ServiceFlag

KINDS = {
    Rank.CLUSTER_IP: "ClusterIP",
    Rank.NODE_PORT: "NodePort",
    Rank.LOAD_BALANCER: "LoadBalancer",
    Rank.EXTERNAL_IP: "ExternalIP",
    Rank.HOST_PORT: "HostPort",
}


class TableView(msgspec.Struct, frozen=True):
    name: str
    rows: int
    max_entries: int
    rejected: int


class StatusView(msgspec.Struct, frozen=True):
    node: str
    version: str
    kernel: str
    ready: bool
    why_not: str
    operator: str
    operator_connected: bool
    operator_error: str
    revision: int
    complete: bool
    endpoints: int
    addresses: list[str]
    uplinks: list[str]
    pod_mtu: int
    pod_cidrs: list[str]
    routing: str
    audit: bool  # policies drop nothing on this node
    xdp: dict[str, str]  # by uplink: how it is attached, "off", or "refused": wanted but not there
    tables: list[TableView]
    rejected: dict[str, list[str]]
    bad_resources: dict[str, str]
    errors: dict[str, str]
    reconcile_seconds: float
    repaired: int
    flow_warnings: list[str]
    announced: list[str]  # load balancers' addresses that this node answers ARP and ND for


class EndpointView(msgspec.Struct, frozen=True):
    pod: str
    addresses: list[str]
    device: str
    container: str
    class_number: int
    egress: list[str]
    ingress: list[str]
    selectors: list[str]
    audit: bool  # what policies deny it is reported and let through


class ServiceView(msgspec.Struct, frozen=True):
    """A frontend. scope: whose it is (all, inside or outside the cluster). taken_by: who has it,
    if the Service itself lost it; then it has no backends. draining: backends that only serve what
    they have."""

    service: str
    type: str
    kind: str
    port_name: str
    address: str
    port: int
    protocol: str
    scope: str
    policy: str
    affinity_seconds: int
    source_ranges: list[str]
    backends: list[str]
    draining: list[str]
    maglev: bool
    taken_by: str


class PolicyView(msgspec.Struct, frozen=True):
    """tier, priority: of a ClusterNetworkPolicy; in force in the order of both."""

    policy: str
    subject: str
    ingress: bool
    egress: bool
    rules: int
    pods: list[str]
    tier: str
    priority: int


def tables(reconciler: Reconciler) -> list[TableView]:
    rejected = {
        table: len(keys)
        for health in reconciler.health.values()
        for table, keys in health.rejected.items()
    }
    return [
        TableView(
            name,
            len(reconciler.projection.table(name)),
            table.max_entries,
            rejected.get(name, 0),
        )
        for name, table in reconciler.tables.items()
    ]


def status(  # the one place where all of it comes together
    *,
    node: str,
    version: str,
    kernel: str,
    why_not: str,
    stream: StreamState,
    state: DesiredState,
    reconciler: Reconciler,
    addresses: list[str],
    uplinks: list[str],
    mtu: int,
    routing: str,
    audit: bool,
    xdp: dict[str, str],
    flow_warnings: list[str],
) -> StatusView:
    projection = reconciler.projection
    own = projection.routes.own_node
    return StatusView(
        node=node,
        version=version,
        kernel=kernel,
        ready=not why_not,
        why_not=why_not,
        operator=stream.operator,
        operator_connected=stream.connected,
        operator_error=stream.error,
        revision=state.position.revision,
        complete=state.position.complete,
        endpoints=len(projection.placement.local),
        addresses=addresses,
        uplinks=uplinks,
        pod_mtu=mtu,
        pod_cidrs=[prefix.text() for prefix in own.pod_cidrs] if own else [],
        routing=routing,
        audit=audit,
        xdp=xdp,
        tables=tables(reconciler),
        rejected=reconciler.rejected_owners(),
        bad_resources=dict(state.rejected),
        errors={group: h.error for group, h in reconciler.health.items() if h.error},
        reconcile_seconds=reconciler.statistics.last_seconds,
        repaired=reconciler.statistics.repaired,
        flow_warnings=flow_warnings,
        announced=[text(addr) for addr in sorted(projection.announced.announcing)],
    )


def endpoints(projection: Projection) -> list[EndpointView]:
    subjects = projection.policy.subjects()
    views = []
    for endpoint in projection.placement.local.values():
        located = [projection.placement.located(addr) for addr in endpoint.addresses]
        number = next((item.number for item in located if item is not None), 0)
        egress, ingress = subjects.get(number, ((), ()))
        views.append(
            EndpointView(
                pod=str(endpoint.pod),
                addresses=[text(addr) for addr in endpoint.addresses],
                device=endpoint.host_ifname,
                container=endpoint.container_id,
                class_number=number,
                egress=list(map(describe_policy, egress)),
                ingress=list(map(describe_policy, ingress)),
                selectors=sorted(projection.identity.content(number).selectors),
                audit=any(item is not None and item.audit for item in located),
            )
        )
    return sorted(views, key=lambda view: view.pod)


def services(projection: Projection) -> list[ServiceView]:
    tables = projection.services
    views = [
        _frontend(projection, name, row)
        for name in (*tables.all_services, *tables.exposed)
        for row in tables.rows_of(name)
    ]
    return sorted(views, key=lambda view: (view.service, view.address, view.port, view.scope))


def _frontend(projection: Projection, name: ServiceName, row: Row) -> ServiceView:
    tables, key = projection.services, row.key
    service = tables.all_services.get(name)
    owner = tables.owner(key)
    published = tables.services.get(key) if owner == name else None
    used = tables.backends_of(key) if published is not None else ()
    used_texts = [_endpoint(backend.address, backend.port) for backend in used]
    draining: list[str] = []
    if service is not None:
        port = ServicePort(row.backends.port, row.backends.protocol, 0)
        slices = list(of_family(tables.slices_of(name), ipv4=row.backends.ipv4))
        draining = [
            _endpoint(backend.address, backend.port)
            for backend in unpack(b"".join(sorted(terminating(slices, port))))
        ]
    ranged = service is not None and row.flags & ServiceFlag.SOURCE_RANGES
    if key.scope == EXTERNAL:
        scope = "outside"
    else:
        scope = "inside" if row.flags & ServiceFlag.EXTERNAL_ROW else "all"
    return ServiceView(
        service="/".join(name).replace(HOST_PORTS, ""),
        type=_type(service),
        kind=KINDS[row.rank],
        port_name=row.backends.port,
        address=text(key.address),
        port=key.port,
        protocol=PROTOCOLS.get(key.protocol, str(key.protocol)),
        scope=scope,
        policy="Local" if row.backends.local else "Cluster",
        affinity_seconds=service.affinity_seconds if service else 0,
        source_ranges=[
            cidr.text()
            for cidr in (ranges(service, row.backends.ipv4) if ranged and service else ())
        ],
        backends=used_texts,
        draining=draining,
        maglev=published is not None and bool(published.flags & ServiceFlag.MAGLEV),
        taken_by=describe(owner) if owner is not None and owner != name else "",
    )


def _type(service: Service | None) -> str:
    """As far as the operator tells it."""
    if service is None:
        return "HostPort"
    if service.external.load_balancer_ips or service.external.health_check_node_port:
        return "LoadBalancer"
    return "NodePort" if service.external.node_ports else "ClusterIP"


def policies(projection: Projection) -> list[PolicyView]:
    pods: dict[str, set[str]] = {}
    for view in endpoints(projection):
        for name in (*view.egress, *view.ingress):
            pods.setdefault(name, set()).add(view.pod)
    return [
        PolicyView(
            policy=describe_policy(name),
            subject=projection.identity.selector_key(item.subject),
            ingress=item.ingress,
            egress=item.egress,
            rules=len(item.rules),
            pods=sorted(pods.get(describe_policy(name), ())),
            tier=item.tier.name.lower() if item.tier != Tier.NETWORK_POLICY else "",
            priority=item.priority,
        )
        for name, item in sorted(projection.policies().items())
    ]


def _endpoint(address: Addr, port: int) -> str:
    host = text(address)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
