# SPDX-License-Identifier: Apache-2.0
"""Rows of Services of every kind: where they are reached, by whom, and their backends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from weir.agent.frontends import ALL_ADDRESSES, NodePortRule, ServiceFacts, node_port_addresses
from weir.agent.resources import (
    External,
    FrontendPort,
    HostPort,
    Pod,
    Service,
    ServicePort,
    Slice,
    WireClass,
)
from weir.agent.routes import RouteFacts
from weir.agent.rows import Change
from weir.agent.services import HOST_PORTS, ServiceTables
from weir.agent.tables import Projection, ServiceSettings
from weir.agent.topology import Place
from weir.agent.wanted import Exposed
from weir.api.address import Addr, parse, parse_cidr, text
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.datapath import records
from weir.datapath.records import RuntimeFeature, ServiceFlag, ServiceScope

HTTP, DNS = ServicePort("http", 6, 80), ServicePort("dns", 17, 53)
NODE4, NODE6, SECOND4 = parse("192.0.2.1"), parse("2001:db8::1"), parse("198.18.0.1")
FACTS = ServiceFacts(Place("node1", "zone-a"), (NODE4, NODE6), frozenset((NODE4, NODE6)))
IN, OUT = ServiceScope.INTERNAL, ServiceScope.EXTERNAL
ROW, LOCAL = ServiceFlag.EXTERNAL_ROW, ServiceFlag.LOCAL
RANGES, MAGLEV, DSR = ServiceFlag.SOURCE_RANGES, ServiceFlag.MAGLEV, ServiceFlag.DSR


def addrs(*texts: str) -> tuple[Addr, ...]:
    return tuple(map(parse, texts))


def service(*cluster_ips: str, ports: tuple[ServicePort, ...] = (HTTP,), **more: object) -> Service:
    return Service("ns", "s", addrs(*(cluster_ips or ("10.96.0.1",))), ports, **more)  # type: ignore[arg-type]


def slice_of(
    *ready: str, draining: Iterable[str] = (), here: Iterable[str] = (), name: str = "s"
) -> Slice:
    everything = [*ready, *draining]
    return Slice(
        "ns",
        name,
        (ServicePort("http", 6, 8080), ServicePort("dns", 17, 5353)),
        b"".join(map(parse, ready)),
        b"".join(map(parse, draining)),
        tuple("node1" if item in set(here) else "node2" for item in everything),
    )


def projected(item: Service, *slices: Slice, facts: ServiceFacts = FACTS) -> ServiceTables:
    tables = ServiceTables()
    tables.set_facts(facts)
    tables.set_service(item)
    for number, one in enumerate(slices):
        tables.set_slice(f"slice/ns/s-{number}", one)
    tables.project()
    return tables


def rows(tables: ServiceTables) -> dict[tuple[str, int, int], tuple[int, list[str]]]:
    """(address, port, scope) → flags and backends."""
    return {
        (text(key.address), key.port, key.scope): (
            row.flags,
            sorted(f"{text(b.address)}:{b.port}" for b in tables.backends_of(key)),
        )
        for key, row in tables.services.rows.items()
    }


ONE = slice_of("10.0.0.1", "10.0.0.2", here=["10.0.0.2"])
BOTH, HERE = ["10.0.0.1:8080", "10.0.0.2:8080"], ["10.0.0.2:8080"]


@pytest.mark.parametrize(
    ("item", "endpoints", "expected"),
    [
        pytest.param(service(), ONE, {("10.96.0.1", 80, IN): (0, BOTH)}, id="ClusterIP"),
        pytest.param(
            service(internal_local=True),
            ONE,
            {("10.96.0.1", 80, IN): (LOCAL, HERE)},
            id="internalTrafficPolicy Local",
        ),
        pytest.param(
            service(internal_local=True),
            slice_of("10.0.0.1"),
            {("10.96.0.1", 80, IN): (LOCAL, [])},
            id="internalTrafficPolicy Local, endpoints elsewhere: dropped",
        ),
        pytest.param(
            service(internal_local=True),
            slice_of(),
            {("10.96.0.1", 80, IN): (0, [])},
            id="internalTrafficPolicy Local without endpoints: refused",
        ),
        pytest.param(
            service(external=External(node_ports=(30080,))),
            ONE,
            {("10.96.0.1", 80, IN): (0, BOTH), ("192.0.2.1", 30080, IN): (0, BOTH)},
            id="NodePort, at the node's addresses of the Service's families",
        ),
        pytest.param(
            service(external=External(node_ports=(30080,), local=True)),
            ONE,
            {
                ("10.96.0.1", 80, IN): (0, BOTH),
                ("192.0.2.1", 30080, IN): (ROW, BOTH),
                ("192.0.2.1", 30080, OUT): (LOCAL, HERE),
            },
            id="externalTrafficPolicy Local: pods and nodes use all endpoints",
        ),
        pytest.param(
            service(external=External(node_ports=(30080,), local=True)),
            slice_of("10.0.0.1", draining=["10.0.0.2"], here=["10.0.0.2"]),
            {
                ("10.96.0.1", 80, IN): (0, ["10.0.0.1:8080"]),
                ("192.0.2.1", 30080, IN): (ROW, ["10.0.0.1:8080"]),
                ("192.0.2.1", 30080, OUT): (LOCAL, HERE),
            },
            id="externalTrafficPolicy Local: what terminates here still serves",
        ),
        pytest.param(
            service(internal_local=True, external=External(node_ports=(30080,))),
            ONE,
            {("10.96.0.1", 80, IN): (LOCAL, HERE), ("192.0.2.1", 30080, IN): (0, BOTH)},
            id="internalTrafficPolicy Local is no matter of node ports",
        ),
        pytest.param(
            service(
                external=External(
                    load_balancer_ips=addrs("203.0.113.1", "203.0.113.2", "2001:db8::5"),
                    external_ips=addrs("198.51.100.1"),
                    source_ranges=(parse_cidr("10.0.0.0/8"),),
                    refused=frozenset([FrontendPort(parse("203.0.113.2"), 6, 80)]),
                )
            ),
            ONE,
            {
                ("10.96.0.1", 80, IN): (0, BOTH),
                ("203.0.113.1", 80, IN): (RANGES, BOTH),
                ("198.51.100.1", 80, IN): (0, BOTH),
            },
            id="LoadBalancer: ranges for its addresses only, nothing of the other family",
        ),
        pytest.param(
            service(
                "10.96.0.1",
                "fd00::1",
                external=External(
                    load_balancer_ips=addrs("203.0.113.1", "2001:db8::5"),
                    source_ranges=(parse_cidr("2001:db8::/32"),),
                ),
            ),
            ONE,
            {
                ("10.96.0.1", 80, IN): (0, BOTH),
                ("fd00::1", 80, IN): (0, []),
                ("203.0.113.1", 80, IN): (0, BOTH),
                ("2001:db8::5", 80, IN): (RANGES, []),
            },
            id="a family without a range is open",
        ),
        pytest.param(
            service(ports=(HTTP, DNS), external=External(node_ports=(0, 30053))),
            ONE,
            {
                ("10.96.0.1", 80, IN): (0, BOTH),
                ("10.96.0.1", 53, IN): (0, ["10.0.0.1:5353", "10.0.0.2:5353"]),
                ("192.0.2.1", 30053, IN): (0, ["10.0.0.1:5353", "10.0.0.2:5353"]),
            },
            id="one of two ports has a node port",
        ),
    ],
)
def test_rows(
    item: Service, endpoints: Slice, expected: dict[tuple[str, int, int], tuple[int, list[str]]]
) -> None:
    assert rows(projected(item, endpoints)) == expected


def test_rows_of_a_port_share_ids_and_identity() -> None:
    both = External(node_ports=(30080, 30053), load_balancer_ips=addrs("203.0.113.1"), local=True)
    tables = projected(service(ports=(HTTP, DNS), external=both, affinity_seconds=60), ONE)
    found: dict[tuple[int, bool], set[tuple[int, int]]] = {}
    for key, row in tables.services.rows.items():
        assert row.affinity_seconds == 60
        found.setdefault((key.protocol, key.scope == OUT), set()).add((row.id, row.identity))
    ids = [next(iter(some)) for some in found.values() if len(some) == 1]
    assert len(ids) == 4, found
    assert len({number for number, _ in ids}) == 4
    assert {found_identity for _, found_identity in ids} == {1, 2}


def test_source_ranges_go_by_identity_and_come_and_go() -> None:
    external = External(
        load_balancer_ips=addrs("203.0.113.1"), source_ranges=(parse_cidr("10.0.0.0/8"),)
    )
    tables = projected(service(external=external), ONE)
    (key,) = tables.source_ranges.rows
    (row,) = {row.identity for row in tables.services.rows.values()}
    assert (key.bits, key.identity, text(key.address)) == (32 + 96 + 8, row, "10.0.0.0")
    tables.set_service(service(external=replace(external, source_ranges=())))
    tables.project()
    assert not tables.source_ranges.rows
    assert not any(row.flags & RANGES for row in tables.services.rows.values())


def test_what_a_service_had_goes_with_it() -> None:
    external = External(
        node_ports=(30080,),
        load_balancer_ips=addrs("203.0.113.1"),
        local=True,
        source_ranges=(parse_cidr("10.0.0.0/8"),),
        health_check_node_port=32000,
    )
    facts = replace(FACTS, maglev_table_size=251)
    tables = projected(service(external=external), ONE, facts=facts)
    assert tables.health_checks == {("ns", "s"): 32000}
    tables.remove_service(("ns", "s"))
    tables.project()
    for left in (tables.services, tables.backends, tables.maglev, tables.source_ranges):
        assert not left.rows, left.name
    assert not tables.health_checks
    assert not tables.claims.owners


def test_scope_external_goes_when_the_policy_becomes_cluster() -> None:
    external = External(node_ports=(30080,), local=True)
    tables = projected(service(external=external), ONE)
    tables.set_service(service(external=replace(external, local=False)))
    tables.project()
    assert rows(tables) == {
        ("10.96.0.1", 80, IN): (0, BOTH),
        ("192.0.2.1", 30080, IN): (0, BOTH),
    }
    assert len(tables.backends.rows) == 2


def test_node_ports_follow_the_nodes_addresses() -> None:
    tables = projected(service(external=External(node_ports=(30080,))), ONE)
    tables.set_facts(replace(FACTS, node_ports_at=(SECOND4,)))
    tables.project()
    assert set(rows(tables)) == {("10.96.0.1", 80, IN), ("198.18.0.1", 30080, IN)}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        pytest.param(ALL_ADDRESSES, (NODE4, SECOND4, NODE6), id="all"),
        pytest.param(NodePortRule(primary=True), (NODE4, NODE6), id="primary"),
        pytest.param(
            NodePortRule((parse_cidr("198.18.0.0/15"),)),
            (SECOND4, NODE6),
            id="a CIDR narrows its own family only, as with kube-proxy",
        ),
        pytest.param(
            NodePortRule((parse_cidr("203.0.113.0/24"), parse_cidr("2001:db8::/32"))),
            (NODE6,),
            id="one that the node has no address in",
        ),
    ],
)
def test_addresses_of_node_ports(rule: NodePortRule, expected: tuple[Addr, ...]) -> None:
    assert node_port_addresses(rule, (NODE4, NODE6), (NODE4, SECOND4, NODE6)) == expected


@pytest.mark.parametrize(
    ("host_ip", "expected"),
    [
        pytest.param(None, {"192.0.2.1": "10.0.0.9", "2001:db8::1": "fd00::9"}, id="anywhere"),
        pytest.param("0.0.0.0", {"192.0.2.1": "10.0.0.9"}, id="all of IPv4"),
        pytest.param("::", {"2001:db8::1": "fd00::9"}, id="all of IPv6"),
        pytest.param("127.0.0.1", {"127.0.0.1": "10.0.0.9"}, id="one"),
    ],
)
def test_host_ports(host_ip: str | None, expected: dict[str, str]) -> None:
    projection = Projection()
    projection.set_facts(RouteFacts("node1", (NODE4, NODE6), (NODE4, NODE6)))
    port = HostPort(6, 9080, 80, parse(host_ip) if host_ip else None)
    pod = Pod("ns", "web", "uid-1", WireClass(0), (port,))
    projection.apply({"pod/uid-1": pod})
    projection.set_endpoint(endpoint("10.0.0.9", "fd00::9"))
    projection.take()
    tables = projection.services
    assert {
        text(key.address): text(tables.backends_of(key)[0].address)
        for key in tables.services.rows
        if (key.port, key.protocol, key.scope) == (9080, 6, IN)
    } == expected
    assert tables.backends_of(next(iter(tables.services.rows)))[0].port == 80
    projection.remove_endpoint("c1")
    assert projection.take()
    assert not tables.services.rows
    assert not tables.backends.rows


def endpoint(*addresses: str) -> LocalEndpoint:
    return LocalEndpoint(
        container_id="c1",
        netns="/run/netns/x",
        ifname="eth0",
        host_ifname="weir1",
        ifindex=7,
        mac=bytes(6),
        host_mac=bytes(6),
        addresses=addrs(*addresses),
        pod=PodRef("ns", "web", "uid-1"),
        netns_cookie=77,
    )


def test_a_namespaces_cookie_leads_to_its_pods_addresses() -> None:
    projection = Projection()
    projection.set_endpoint(endpoint("10.0.0.9"))
    assert dict(projection.table("netns_addresses").rows) == {
        77: records.NetnsAddresses(parse("10.0.0.9"), Addr(bytes(16)))
    }
    projection.set_endpoint(replace(endpoint("10.0.0.9"), netns_cookie=0))
    assert not projection.table("netns_addresses").rows


def test_a_cluster_ip_is_nobody_elses() -> None:
    """A Service that names another's cluster IP in externalIPs does not get its traffic."""
    tables = ServiceTables()
    tables.set_facts(FACTS)
    thief = service(
        "10.96.0.9",
        external=External(external_ips=addrs("10.96.0.1"), node_ports=(30080,), local=True),
    )
    tables.set_service(replace(thief, name="thief"))
    tables.set_slice("slice/ns/thief", slice_of("10.0.0.66", name="thief"))
    tables.project()
    assert rows(tables)["10.96.0.1", 80, IN] == (ROW, ["10.0.0.66:8080"])
    tables.set_service(service())
    tables.set_slice("slice/ns/s", ONE)
    tables.project()
    found = rows(tables)
    assert found["10.96.0.1", 80, IN] == (0, BOTH)
    assert ("10.96.0.1", 80, OUT) not in found
    assert list(tables.claims.waiting()) == [
        (records.ServiceKey(parse("10.96.0.1"), 80, 6, IN), ("ns", "thief"))
    ]
    tables.remove_service(("ns", "s"))
    tables.project()
    assert rows(tables)["10.96.0.1", 80, OUT] == (LOCAL, [])


def test_the_first_keeps_a_host_port() -> None:
    tables = ServiceTables()
    tables.set_facts(FACTS)
    ports = (HostPort(6, 9080, 80),)
    first = {("ns", HOST_PORTS + "a"): Exposed(ports, addrs("10.0.0.1"))}
    both = first | {("ns", HOST_PORTS + "b"): Exposed(ports, addrs("10.0.0.2"))}
    for exposed in (first, both):
        tables.set_exposed(exposed)
        tables.project()
        assert rows(tables) == {("192.0.2.1", 9080, IN): (0, ["10.0.0.1:80"])}
    tables.set_exposed({name: item for name, item in both.items() if name not in first})
    tables.project()
    assert rows(tables) == {("192.0.2.1", 9080, IN): (0, ["10.0.0.2:80"])}


def test_after_a_restart_nothing_changes() -> None:
    external = External(node_ports=(30080,), load_balancer_ips=addrs("203.0.113.1"), local=True)
    item = service(ports=(HTTP,), external=external, affinity_seconds=10)
    before = projected(item, slice_of("10.0.0.1"))
    # Slots in an order that a fresh start would not give.
    before.set_slice("slice/ns/s-0", slice_of("10.0.0.2", "10.0.0.1", here=["10.0.0.2"]))
    before.project()
    after = ServiceTables()
    after.set_facts(FACTS)
    after.adopt(before.services.rows, before.backends.rows)
    other = replace(service("10.96.0.7"), name="other")
    after.set_service(other)
    after.set_service(item)
    after.set_slice("slice/ns/s-0", slice_of("10.0.0.2", "10.0.0.1", here=["10.0.0.2"]))
    after.project()
    kept = {
        key: row for key, row in after.services.rows.items() if text(key.address) != "10.96.0.7"
    }
    assert kept == dict(before.services.rows)
    assert dict(after.backends.rows) == dict(before.backends.rows)
    (new,) = [row for key, row in after.services.rows.items() if key not in kept]
    numbers = {row.id for row in kept.values()} | {row.identity for row in kept.values()}
    assert not {new.id, new.identity} & numbers


def test_rows_of_before_there_were_identities_are_adopted() -> None:
    vip = records.ServiceKey(parse("10.96.0.1"), 80, 6, IN)
    tables = ServiceTables()
    tables.adopt(
        {vip: records.Service(5, 1, 0, 0, 0)},
        {records.BackendKey(5, 0): records.Backend(parse("10.0.0.1"), 8080)},
    )
    tables.set_service(service())
    tables.set_slice("slice/ns/s-0", slice_of("10.0.0.1"))
    tables.project()
    assert tables.services.get(vip) == records.Service(5, 1, 0, 0, 1)


def test_maglev_is_for_clients_outside_and_alike_on_all_nodes() -> None:
    external = External(node_ports=(30080,), load_balancer_ips=addrs("203.0.113.1"))
    item = service(external=external)
    facts = replace(FACTS, maglev_table_size=251)
    found = []
    for order in (["10.0.0.1", "10.0.0.2", "10.0.0.3"], ["10.0.0.3", "10.0.0.1", "10.0.0.2"]):
        tables = projected(item, slice_of(*order), facts=facts)
        flags = {text(key.address): row.flags for key, row in tables.services.rows.items()}
        assert flags == {"10.96.0.1": 0, "192.0.2.1": MAGLEV, "203.0.113.1": MAGLEV}
        (number,) = {row.id for row in tables.services.rows.values()}
        backends = tables.backends.rows
        block = tables.maglev.rows[records.MaglevKey(number, 0)]
        found.append(
            [text(backends[records.BackendKey(number, n)].address) for n in block.slots[:251]]
        )
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_one_backend_needs_no_table() -> None:
    external = External(node_ports=(30080,))
    tables = projected(
        service(external=external),
        slice_of("10.0.0.1"),
        facts=replace(FACTS, maglev_table_size=251),
    )
    assert not tables.maglev.rows
    assert not any(row.flags for row in tables.services.rows.values())


def test_backends_that_are_the_nodes_own_are_told_the_programs() -> None:
    tables = projected(service(), slice_of("10.0.0.1", "192.0.2.1", here=["192.0.2.1"]))
    assert tables.features == RuntimeFeature.HOST_BACKENDS
    tables.set_slice("slice/ns/s-0", slice_of("10.0.0.1"))
    tables.project()
    assert tables.features == 0


def test_a_zone_that_changes_moves_the_hinted() -> None:
    """From the own node's resource, as it may be labelled any time."""
    projection = Projection(ServiceSettings())
    projection.set_facts(RouteFacts("node1", (NODE4,), (NODE4,)))
    assert projection.services.facts.place == Place()
    projection.take()
    assert projection.services.facts.place == Place("node1", "")
    assert projection.services.facts.node_ports_at == (NODE4,)


def test_changes_are_of_rows_not_of_ids() -> None:
    tables = projected(service(), ONE)
    tables.services.take()
    tables.set_slice("slice/ns/s-0", slice_of("10.0.0.1", "10.0.0.2", here=["10.0.0.1"]))
    tables.project()
    assert tables.services.take() == {}
    tables.set_slice("slice/ns/s-0", slice_of("10.0.0.1"))
    tables.project()
    ((key, change),) = tables.services.take().items()
    assert isinstance(change, Change)
    assert change.old is not None
    assert change.new is not None
    assert (text(key.address), change.old.count, change.new.count) == ("10.96.0.1", 2, 1)
    assert change.old.identity == change.new.identity
