# SPDX-License-Identifier: Apache-2.0
"""What a Service becomes on the wire: tables from the Kubernetes documentation and kube-proxy."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.operator_state import State, key

from weir.api.address import Addr, Cidr, cidr, parse, parse_cidr, text
from weir.api.v1 import weir_pb2 as pb
from weir.operator import kinds
from weir.operator.services import NOBODY

Json = dict[str, Any]
V4, V6 = "10.96.0.1", "fd00:96::1"
DUAL = {"clusterIP": V4, "clusterIPs": [V4, V6]}
PORT = {"port": 80, "targetPort": "web"}
PROXY_NAME = "service.kubernetes.io/service-proxy-name"


def service(spec: Json, status: Json | None = None, labels: Json | None = None) -> Json:
    given = {"type": "ClusterIP", "clusterIP": V4, "clusterIPs": [V4], "ports": [PORT], **spec}
    meta = {"namespace": "ns", "name": "s", "uid": "u", "labels": labels or {}}
    return {"metadata": meta, "spec": given, "status": {"loadBalancer": status or {}}}


def compiled(body: Json) -> tuple[pb.Service | None, list[str]]:
    """The message, None if there is none, and what is said of it."""
    parsed = kinds.SERVICE.read(msgspec.Raw(msgspec.json.encode(body)))
    state = State()
    state.set("Service", key("ns", "s"), body)
    state.flush()
    resource = state.view.resources.get("service/ns/s")
    said = [f"{p.field}: {p.message}" for p in parsed.problems]
    return resource.service if resource is not None else None, said


def good(spec: Json, status: Json | None = None) -> pb.Service:
    made, said = compiled(service(spec, status))
    assert made is not None
    assert not said
    return made


def texts(addresses: Any) -> list[str]:
    return [text(Addr(addr)) for addr in addresses]


def cidrs(made: pb.Service) -> list[str]:
    return [Cidr(Addr(c.address), c.bits).text() for c in made.source_ranges]


@pytest.mark.parametrize(
    ("labels", "spec", "served"),
    [
        pytest.param({}, {}, True, id="plain"),
        pytest.param({"app": "headless"}, {}, True, id="other label"),
        pytest.param({PROXY_NAME: "mesh"}, {}, False, id="another proxy's"),
        # kube-proxy takes the Service and leaves out its slices.
        pytest.param({"service.kubernetes.io/headless": ""}, {}, True, id="headless label"),
        pytest.param({}, {"clusterIP": "None", "clusterIPs": ["None"]}, False, id="headless"),
        pytest.param({}, {"type": "ExternalName"}, False, id="ExternalName"),
        pytest.param({}, {"clusterIP": "", "clusterIPs": []}, False, id="not allocated yet"),
        pytest.param({}, {"selector": None}, True, id="without a selector"),
        pytest.param({}, {"publishNotReadyAddresses": True}, True, id="publishNotReadyAddresses"),
    ],
)
def test_served(labels: Json, spec: Json, served: bool) -> None:
    made, said = compiled(service(spec, labels=labels))
    assert (made is not None) is served
    assert not said


def test_families() -> None:
    assert texts(good({}).cluster_ips) == [V4]
    assert texts(good({"clusterIPs": None}).cluster_ips) == [V4]
    assert texts(good(DUAL).cluster_ips) == [V4, V6]
    assert texts(good({"clusterIP": V6, "clusterIPs": [V6, V4]}).cluster_ips) == [V6, V4]


def test_ports() -> None:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP", "nodePort": 30053},
        {"name": "web", "port": 80, "targetPort": "http"},
        {"name": "sctp", "port": 80, "protocol": "SCTP", "targetPort": 9},
    ]
    made = good({"type": "NodePort", "ports": ports})
    assert [(p.name, p.protocol, p.port, p.node_port) for p in made.ports] == [
        ("dns", 17, 53, 30053),
        ("dns-tcp", 6, 53, 30053),
        ("web", 6, 80, 0),
        ("sctp", 132, 80, 0),
    ]


VIPS = [
    pytest.param([{"ip": "192.0.2.1"}], ["192.0.2.1"], id="no ipMode is VIP"),
    pytest.param([{"ip": "192.0.2.1", "ipMode": "VIP"}], ["192.0.2.1"], id="VIP"),
    pytest.param([{"ip": "192.0.2.1", "ipMode": "Proxy"}], [], id="Proxy"),
    pytest.param([{"hostname": "lb.example"}], [], id="hostname"),
    pytest.param(
        [{"hostname": "lb.example", "ip": "192.0.2.1"}], ["192.0.2.1"], id="hostname and address"
    ),
    pytest.param(
        [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}, {"ip": "192.0.2.2", "ipMode": "Proxy"}],
        ["192.0.2.1"],
        id="a family that the Service is not",
    ),
    pytest.param([{"ip": V4}], [], id="the cluster IP itself"),
]


@pytest.mark.parametrize(("ingress", "wanted"), VIPS)
def test_load_balancer_addresses(ingress: list[Json], wanted: list[str]) -> None:
    made = good({"type": "LoadBalancer"}, {"ingress": ingress})
    assert texts(made.load_balancer_ips) == wanted


def test_both_families_of_a_load_balancer() -> None:
    ingress = [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}]
    made = good({"type": "LoadBalancer", **DUAL}, {"ingress": ingress})
    assert texts(made.load_balancer_ips) == ["192.0.2.1", "2001:db8::1"]


def test_an_external_address_is_in_one_list() -> None:
    spec = {"type": "LoadBalancer", "externalIPs": ["192.0.2.1", "192.0.2.2", "192.0.2.2", V4]}
    made = good(spec, {"ingress": [{"ip": "192.0.2.1"}]})
    assert texts(made.load_balancer_ips) == ["192.0.2.1"]
    assert texts(made.external_ips) == ["192.0.2.2"]


LOCAL = {"externalTrafficPolicy": "Local"}
POLICIES = [
    pytest.param({}, (False, False), id="missing is Cluster"),
    pytest.param({"internalTrafficPolicy": "Cluster"}, (False, False), id="Cluster"),
    pytest.param({"internalTrafficPolicy": "Local"}, (True, False), id="internal Local"),
    pytest.param({"type": "NodePort", **LOCAL}, (False, True), id="NodePort Local"),
    pytest.param({"type": "LoadBalancer", **LOCAL}, (False, True), id="LoadBalancer Local"),
    pytest.param(LOCAL, (False, False), id="not reachable from outside"),
    pytest.param({"externalIPs": ["192.0.2.1"], **LOCAL}, (False, True), id="by externalIPs"),
]


@pytest.mark.parametrize(("spec", "wanted"), POLICIES)
def test_traffic_policies(spec: Json, wanted: tuple[bool, bool]) -> None:
    made = good(spec)
    assert (made.internal_local, made.external_local) == wanted


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        pytest.param({"type": "LoadBalancer", **LOCAL}, 32000, id="LoadBalancer Local"),
        pytest.param({"type": "LoadBalancer"}, 0, id="LoadBalancer Cluster"),
        pytest.param({"type": "NodePort", **LOCAL}, 0, id="NodePort Local"),
    ],
)
def test_health_check_node_port(spec: Json, wanted: int) -> None:
    assert good({"healthCheckNodePort": 32000, **spec}).health_check_node_port == wanted


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        pytest.param({}, 0, id="missing"),
        pytest.param({"sessionAffinity": "None"}, 0, id="None"),
        pytest.param({"sessionAffinity": "ClientIP"}, 10800, id="default timeout"),
        pytest.param(
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 1}},
            },
            1,
            id="shortest timeout",
        ),
        pytest.param(
            {
                "sessionAffinity": "None",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}},
            },
            0,
            id="a timeout without affinity",
        ),
    ],
)
def test_affinity(spec: Json, wanted: int) -> None:
    assert good(spec).affinity_seconds == wanted


RANGES = [
    pytest.param([], [], id="everybody"),
    pytest.param(["10.0.0.0/8", " 192.0.2.0/24 "], ["10.0.0.0/8", "192.0.2.0/24"], id="padded"),
    pytest.param(["10.1.2.3/8"], ["10.0.0.0/8"], id="host bits"),
    pytest.param(["10.0.0.0/8", "0.0.0.0/0"], [], id="all of IPv4 is as none"),
    pytest.param(["10.0.0.0/8", "::/0"], ["10.0.0.0/8"], id="all of IPv6 only opens IPv6"),
    pytest.param(["0.0.0.0/0", "2001:db8::/32"], ["2001:db8::/32"], id="and all of IPv4, IPv4"),
]


@pytest.mark.parametrize(("ranges", "wanted"), RANGES)
def test_source_ranges(ranges: list[str], wanted: list[str]) -> None:
    made = good({"type": "LoadBalancer", "loadBalancerSourceRanges": ranges, **DUAL})
    assert cidrs(made) == wanted


def test_an_ipv6_range_does_not_let_ipv4_in() -> None:
    ranges = {"loadBalancerSourceRanges": ["::/1", "10.0.0.0/8"]}
    made = good({"type": "LoadBalancer", **DUAL, **ranges})
    parts = [Cidr(Addr(c.address), c.bits) for c in made.source_ranges]

    def inside(address: str) -> bool:
        return any(part.contains(parse(address)) for part in parts)

    assert len(parts) == 1 + 95
    assert all(map(inside, ("10.0.0.1", "::1", "2001:db8::1", "7fff::1", "::fffe:c000:201", "::")))
    assert not any(map(inside, ("192.0.2.1", "0.0.0.0", "255.255.255.255", "8000::1", "fd00::1")))


V4_NOBODY, V6_NOBODY = (nobody.text() for nobody in NOBODY)


@pytest.mark.parametrize(
    ("ranges", "wanted"),
    [
        pytest.param(["10.0.0.0"], ["10.0.0.0/32"], id="a bare address"),
        pytest.param(["10.0.0.0/33"], [V6_NOBODY, V4_NOBODY], id="none is left: nobody"),
        pytest.param(["10.0.0.0/8", "x"], [V6_NOBODY, "10.0.0.0/8"], id="one is left"),
        pytest.param(["0.0.0.0/0", "x"], [V6_NOBODY], id="one family open"),
    ],
)
def test_source_ranges_that_do_not_parse_let_nobody_in(
    ranges: list[str], wanted: list[str]
) -> None:
    spec = {"type": "LoadBalancer", "loadBalancerSourceRanges": ranges, **DUAL}
    made, said = compiled(service(spec))
    assert made is not None
    assert cidrs(made) == wanted
    bad = [text for text in ranges if "x" in text or "/33" in text]
    assert len(said) == len(bad)
    assert all("write it like 192.0.2.0/24" in line for line in said)


BAD = [
    pytest.param(
        {"ports": None}, "spec.ports: a Service with a cluster IP needs a port", id="none"
    ),
    pytest.param({"ports": [PORT, {"port": 0}]}, "spec.ports[1].port: 0 is not a port", id="port"),
    pytest.param(
        {"ports": [{"port": 80, "nodePort": 70000}]},
        "spec.ports[0].nodePort: 70000 is not a port: must be between 1 and 65535",
        id="node port",
    ),
    pytest.param(
        {"ports": [PORT, {"port": 53, "protocol": "ICMP", "name": "x"}]},
        "spec.ports[1].protocol: unknown protocol 'ICMP'",
        id="protocol",
    ),
    pytest.param(
        {"ports": [PORT, {"port": 80, "name": "x"}]},
        "spec.ports[1]: port 80/TCP is there twice: choose another",
        id="a port twice",
    ),
    pytest.param(
        {"ports": [{"port": 1, "nodePort": 30000}, {"port": 2, "nodePort": 30000, "name": "x"}]},
        "spec.ports[1].nodePort: 30000 is there twice: choose another",
        id="a node port twice",
    ),
    pytest.param(
        {"ports": [PORT, {"port": 81}]}, "spec.ports[1].name: needs a name", id="a port unnamed"
    ),
    pytest.param(
        {"externalIPs": ["x"]}, "spec.externalIPs[0]: 'x' is not an IP address", id="external IP"
    ),
    pytest.param(
        {"externalIPs": ["127.0.0.2"]},
        "spec.externalIPs[0]: 127.0.0.2 is a loopback address, which a Service cannot have",
        id="loopback",
    ),
    pytest.param({"externalIPs": ["0.0.0.0"]}, "0.0.0.0 is the unspecified", id="unspecified"),
    pytest.param({"externalIPs": ["224.0.0.9"]}, "224.0.0.9 is a multicast", id="multicast"),
    pytest.param({"externalIPs": ["169.254.0.1"]}, "169.254.0.1 is a link-local", id="link-local"),
    pytest.param({"externalIPs": ["255.255.255.255"]}, "is the broadcast", id="broadcast"),
    pytest.param({"externalIPs": ["ff02::1"]}, "ff02::1 is a multicast", id="IPv6 multicast"),
    pytest.param({"externalIPs": ["::1"]}, "::1 is a loopback", id="IPv6 loopback"),
    pytest.param(
        {"externalIPs": ["2001:db8::1"]},
        "2001:db8::1 is of IPv6, which the Service is not: add it to spec.ipFamilies",
        id="of no family of the Service",
    ),
    pytest.param(
        {"internalTrafficPolicy": "Near"},
        "spec.internalTrafficPolicy: 'Near' is neither Cluster nor Local",
        id="traffic policy",
    ),
    pytest.param(
        {"sessionAffinity": "Cookie"}, "spec.sessionAffinity: 'Cookie' is neither", id="affinity"
    ),
    pytest.param(
        {
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}},
        },
        "clientIP.timeoutSeconds: 86401 is not between 1 and 86400: taken as 10800",
        id="affinity timeout",
    ),
    pytest.param(
        {
            "type": "LoadBalancer",
            "healthCheckNodePort": 30000,
            "ports": [{"port": 80, "nodePort": 30000}],
            **LOCAL,
        },
        "spec.healthCheckNodePort: 30000 is a nodePort of this Service: choose another",
        id="health check port is a node port",
    ),
]


@pytest.mark.parametrize(("spec", "words"), BAD)
def test_bad_input_is_said_and_the_rest_works(
    spec: Json, words: str, request: pytest.FixtureRequest
) -> None:
    case = request.node.callspec.id
    made, said = compiled(service(spec))
    assert len(said) == 1
    assert words in said[0]
    kept = {"none": 0, "a node port twice": 2}.get(case, 1)
    assert (made is None) is (kept == 0)
    if made is not None:
        assert texts(made.cluster_ips) == [V4]
        assert not made.external_ips
        assert len(made.ports) == kept


def test_a_bad_load_balancer_address_is_said() -> None:
    body = service(
        {"type": "LoadBalancer"}, {"ingress": [{"ip": "127.0.0.1"}, {"ip": "192.0.2.1"}]}
    )
    made, said = compiled(body)
    assert made is not None
    assert texts(made.load_balancer_ips) == ["192.0.2.1"]
    assert said == [
        "status.loadBalancer.ingress[0].ip: 127.0.0.1 is a loopback address, which a Service "
        "cannot have"
    ]


def a_slice(endpoint: Json, labels: Json | None = None, **more: Any) -> pb.Slice | None:
    body = {
        "metadata": {
            "namespace": "ns",
            "name": "s-1",
            "labels": {"kubernetes.io/service-name": "s", **(labels or {})},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.0.0.1", "10.0.0.2"], **endpoint}],
        "ports": [{"name": "web", "port": 8080, "protocol": "TCP"}],
        **more,
    }
    state = State()
    state.set("EndpointSlice", key("ns", "s-1"), body)
    state.flush()
    resource = state.view.resources.get("slice/ns/s-1")
    return resource.slice if resource is not None else None


def test_topology_hints() -> None:
    hints = {"forZones": [{"name": "b"}, {"name": "a"}], "forNodes": [{"name": "n1"}]}
    made = a_slice({"hints": hints, "zone": "a", "nodeName": "n1"})
    assert made is not None
    (endpoint,) = made.endpoints
    assert text(Addr(endpoint.address)) == "10.0.0.1"
    assert (endpoint.zone, endpoint.node) == ("a", "n1")
    assert (list(endpoint.for_zones), list(endpoint.for_nodes)) == (["a", "b"], ["n1"])


@pytest.mark.parametrize(
    ("conditions", "wanted"),
    [
        pytest.param({}, (True, True, False), id="unknown"),
        pytest.param({"ready": True, "serving": True}, (True, True, False), id="ready"),
        pytest.param({"ready": False, "serving": False}, (False, False, False), id="not ready"),
        # What the slice controller writes for publishNotReadyAddresses: nothing of ours overrides.
        pytest.param(
            {"ready": True, "serving": True, "terminating": True},
            (True, True, True),
            id="published though terminating",
        ),
        pytest.param(
            {"ready": False, "serving": True, "terminating": True},
            (False, True, True),
            id="serving, terminating",
        ),
        pytest.param({"ready": False, "terminating": True}, (False, True, True), id="nil serves"),
    ],
)
def test_conditions(conditions: Json, wanted: tuple[bool, bool, bool]) -> None:
    made = a_slice({"conditions": conditions})
    assert made is not None
    (e,) = made.endpoints
    assert (e.ready, e.serving, e.terminating) == wanted


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param({"service.kubernetes.io/headless": ""}, False, id="headless"),
        pytest.param({PROXY_NAME: "mesh"}, False, id="another proxy's"),
        pytest.param({"kubernetes.io/service-name": ""}, False, id="of no Service"),
    ],
)
def test_slices_told(labels: Json, told: bool) -> None:
    assert (a_slice({}, labels) is not None) is told


def test_a_port_for_all_ports_is_none() -> None:
    made = a_slice({}, ports=[{"name": "web", "protocol": "TCP"}, {"name": "x", "port": 1}])
    assert made is not None
    assert [(p.name, p.port) for p in made.ports] == [("x", 1)]


def test_nobody_is_nobody() -> None:
    assert [parse_cidr(n.text()) for n in NOBODY] == list(NOBODY)
    assert [cidr(n.address, 128) for n in NOBODY] == list(NOBODY)
