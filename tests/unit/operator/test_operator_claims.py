# SPDX-License-Identifier: Apache-2.0
"""What several claim: who gets it, what is said, and that the order of events does not matter."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from random import Random
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support.operator_state import READERS, View

from weir.api.address import Addr, text
from weir.operator.claims import Claims
from weir.operator.compiler import Compiler
from weir.operator.hostports import overlap
from weir.operator.objects import Key, Problem
from weir.operator.writes import Reference

Json = dict[str, Any]
NUMBERS = {6: "TCP", 17: "UDP", 132: "SCTP"}


@dataclass
class World:
    """Claims over a compiler, what agents then hold, and what is said of each object."""

    compiler: Compiler = field(default_factory=Compiler)
    view: View = field(default_factory=View)
    said: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.claims = Claims(self.compiler, self._tell)
        self.apply({"Namespace/ns": {"metadata": {"name": "ns"}}})

    def _tell(self, about: Reference, problems: tuple[Problem, ...]) -> None:
        lines = [f"{p.field}: {p.message}" for p in problems]
        self.said.pop(about.name, None)
        if lines:
            self.said[about.name] = lines

    def apply(self, objects: dict[str, Json | None]) -> None:
        """By "Kind/name"; None: it goes. Then a flush."""
        for path, body in objects.items():
            kind, name = path.split("/")
            value = READERS[kind](msgspec.Raw(msgspec.json.encode(body))).value if body else None
            at = Key("" if kind in ("Node", "Namespace") else "ns", name)
            match kind:
                case "Namespace":
                    self.compiler.namespace(at, value)
                case "Node":
                    self.claims.node(at, value)
                case "Service":
                    if value is None:
                        self.said.pop(name, None)
                    self.claims.service(at, value)
                case "Pod":
                    if value is None:
                        self.said.pop(name, None)
                    self.claims.pod(at, value)
        self.claims.settle()
        self.view.take(self.compiler.flush())

    def frontends(self, name: str) -> list[str]:
        """Of a Service, as an agent makes rows of them."""
        resource = self.view.resources.get(f"service/ns/{name}")
        if resource is None:
            return []
        s = resource.service
        refused = {(f.address, f.protocol, f.port) for f in s.refused}
        found = []
        for port in s.ports:
            ending = f"{port.port}/{NUMBERS[port.protocol]}"
            found += [f"{text(Addr(ip))} {ending}" for ip in s.cluster_ips]
            found += [
                f"{text(Addr(ip))} {ending}"
                for ip in (*s.external_ips, *s.load_balancer_ips)
                if (ip, port.protocol, port.port) not in refused
            ]
            if port.node_port:
                found.append(f"node {port.node_port}/{NUMBERS[port.protocol]}")
        if s.health_check_node_port:
            found.append(f"health {s.health_check_node_port}")
        return found

    def host_ports(self, name: str) -> list[str]:
        pod = self.view.resources[f"pod/uid-{name}"].pod
        return [
            f"{text(Addr(p.host_ip)) if p.host_ip else '*'} {p.host_port}/{NUMBERS[p.protocol]}"
            for p in pod.host_ports
        ]


def service(age: int, name: str, cluster_ip: str, *ports: str, **spec: Any) -> Json:
    """Ports as "80", "80/UDP" or "80:30080". The smaller the age, the older."""
    lb = spec.pop("lb", ())
    made = []
    for port in ports or ("80",):
        number, _, protocol = port.partition("/")
        number, _, node_port = number.partition(":")
        made.append({"name": f"p{len(made)}", "port": int(number), "protocol": protocol or "TCP"})
        if node_port:
            made[-1]["nodePort"] = int(node_port)
    given = {"type": "LoadBalancer", "clusterIP": cluster_ip, "ports": made, **spec}
    created = f"2030-01-01T00:00:{age:02d}Z"
    meta = {"namespace": "ns", "name": name, "uid": name, "creationTimestamp": created}
    ingress = [{"ip": ip} for ip in lb]
    return {"metadata": meta, "spec": given, "status": {"loadBalancer": {"ingress": ingress}}}


def node(name: str, *addresses: str) -> Json:
    listed = [{"type": "InternalIP", "address": address} for address in addresses]
    return {"metadata": {"name": name}, "spec": {}, "status": {"addresses": listed}}


def pod(age: int, name: str, *ports: str, where: str = "n1", phase: str = "Running") -> Json:
    """Ports as "80", "80/UDP" or "80@192.0.2.1"."""
    made = []
    for port in ports:
        rest, _, host_ip = port.partition("@")
        number, _, protocol = rest.partition("/")
        made.append({"hostPort": int(number), "containerPort": 8080})
        made[-1] |= {"protocol": protocol or "TCP", **({"hostIP": host_ip} if host_ip else {})}
    created = f"2030-01-01T00:00:{age:02d}Z"
    meta = {"namespace": "ns", "name": name, "uid": f"uid-{name}", "creationTimestamp": created}
    spec = {"nodeName": where, "containers": [{"ports": made}]}
    return {"metadata": meta, "spec": spec, "status": {"phase": phase}}


EXTERNAL = {"externalIPs": ["192.0.2.1"]}


@dataclass(frozen=True)
class Case:
    """Objects by path; frontends of each Service; words said of each object."""

    objects: dict[str, Json]
    frontends: dict[str, list[str]]
    said: dict[str, str] = field(default_factory=dict)


CASES = {
    "one external address, two ports": Case(
        {
            "Service/a": service(1, "a", "10.0.0.1", "80", **EXTERNAL),
            "Service/b": service(2, "b", "10.0.0.2", "81", **EXTERNAL),
        },
        {
            "a": ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP"],
            "b": ["10.0.0.2 81/TCP", "192.0.2.1 81/TCP"],
        },
    ),
    "one external address and port number, two protocols": Case(
        {
            "Service/a": service(1, "a", "10.0.0.1", "53", **EXTERNAL),
            "Service/b": service(2, "b", "10.0.0.2", "53/UDP", **EXTERNAL),
        },
        {
            "a": ["10.0.0.1 53/TCP", "192.0.2.1 53/TCP"],
            "b": ["10.0.0.2 53/UDP", "192.0.2.1 53/UDP"],
        },
    ),
    "one external address and port: the older has it, the younger keeps its other port": Case(
        {
            "Service/b": service(1, "b", "10.0.0.1", "80", **EXTERNAL),
            "Service/a": service(2, "a", "10.0.0.2", "80", "443", **EXTERNAL),
        },
        {
            "b": ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP"],
            "a": ["10.0.0.2 80/TCP", "10.0.0.2 443/TCP", "192.0.2.1 443/TCP"],
        },
        {
            "a": "spec.externalIPs: 80/TCP of 192.0.2.1 is Service ns/b's, which was created first "
            "and keeps it: use another port or address"
        },
    ),
    "of one age: the first by name": Case(
        {
            "Service/b": service(1, "b", "10.0.0.1", **EXTERNAL),
            "Service/a": service(1, "a", "10.0.0.2", **EXTERNAL),
        },
        {"b": ["10.0.0.1 80/TCP"], "a": ["10.0.0.2 80/TCP", "192.0.2.1 80/TCP"]},
        {"b": "80/TCP of 192.0.2.1 is Service ns/a's"},
    ),
    "a load balancer's address is another's external one": Case(
        {
            "Service/a": service(1, "a", "10.0.0.1", **EXTERNAL),
            "Service/b": service(2, "b", "10.0.0.2", lb=["192.0.2.1"]),
        },
        {"a": ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP"], "b": ["10.0.0.2 80/TCP"]},
        {"b": "status.loadBalancer.ingress: 80/TCP of 192.0.2.1 is Service ns/a's"},
    ),
    "three": Case(
        {
            "Service/a": service(1, "a", "10.0.0.1", **EXTERNAL),
            "Service/b": service(2, "b", "10.0.0.2", **EXTERNAL),
            "Service/c": service(3, "c", "10.0.0.3", **EXTERNAL),
        },
        {
            "a": ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP"],
            "b": ["10.0.0.2 80/TCP"],
            "c": ["10.0.0.3 80/TCP"],
        },
        {
            "b": "80/TCP of 192.0.2.1 is Service ns/a's",
            "c": "80/TCP of 192.0.2.1 is Service ns/a's",
        },
    ),
    "another's cluster IP, however old": Case(
        {
            "Service/a": service(1, "a", "10.0.0.1", externalIPs=["10.0.0.2", "192.0.2.1"]),
            "Service/b": service(2, "b", "10.0.0.2", "81"),
        },
        {"a": ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP"], "b": ["10.0.0.2 81/TCP"]},
        {
            "a": "spec.externalIPs: 10.0.0.2 is the cluster IP of Service ns/b: use another "
            "address",
        },
    ),
    "one cluster IP": Case(
        {
            "Service/a": service(2, "a", "10.0.0.1"),
            "Service/b": service(1, "b", "10.0.0.1"),
        },
        {"a": [], "b": ["10.0.0.1 80/TCP"]},
        {
            "a": "spec.clusterIPs: 10.0.0.1 is the cluster IP of Service ns/b, which was created "
            "first",
        },
    ),
    "one node port": Case(
        {
            "Service/a": service(2, "a", "10.0.0.1", "80:30080"),
            "Service/b": service(1, "b", "10.0.0.2", "80:30080"),
            "Service/c": service(3, "c", "10.0.0.3", "80:30080/UDP"),
        },
        {
            "a": ["10.0.0.1 80/TCP"],
            "b": ["10.0.0.2 80/TCP", "node 30080/TCP"],
            "c": ["10.0.0.3 80/UDP", "node 30080/UDP"],
        },
        {"a": "spec.ports.nodePort: 30080/TCP is the node port of Service ns/b, which was created"},
    ),
    "a node port and a health check": Case(
        {
            "Service/a": service(1, "a", "10.0.0.1", "80:30080"),
            "Service/b": service(
                2, "b", "10.0.0.2", healthCheckNodePort=30080, externalTrafficPolicy="Local"
            ),
        },
        {"a": ["10.0.0.1 80/TCP", "node 30080/TCP"], "b": ["10.0.0.2 80/TCP"]},
        {"b": "spec.healthCheckNodePort: 30080/TCP is the node port of Service ns/a"},
    ),
    "two health checks": Case(
        {
            f"Service/{name}": service(
                age,
                name,
                f"10.0.0.{age}",
                healthCheckNodePort=30080,
                externalTrafficPolicy="Local",
            )
            for age, name in ((1, "b"), (2, "a"))
        },
        {"a": ["10.0.0.2 80/TCP"], "b": ["10.0.0.1 80/TCP", "health 30080"]},
        {"a": "spec.healthCheckNodePort: 30080/TCP is the node port of Service ns/b"},
    ),
    "an external address that is a node's, and a node port": Case(
        {
            "Node/n1": node("n1", "192.0.2.1"),
            "Service/a": service(1, "a", "10.0.0.1", "30080", "80", **EXTERNAL),
            "Service/b": service(2, "b", "10.0.0.2", "80:30080"),
        },
        {
            "a": ["10.0.0.1 30080/TCP", "10.0.0.1 80/TCP", "192.0.2.1 80/TCP"],
            "b": ["10.0.0.2 80/TCP", "node 30080/TCP"],
        },
        {
            "a": "spec.externalIPs: 30080/TCP of 192.0.2.1, which is a node's address, is the node "
            "port of Service ns/b: use another port or address"
        },
    ),
    "the same, and no node has the address": Case(
        {
            "Node/n1": node("n1", "192.0.2.9"),
            "Service/a": service(1, "a", "10.0.0.1", "30080", **EXTERNAL),
            "Service/b": service(2, "b", "10.0.0.2", "80:30080"),
        },
        {
            "a": ["10.0.0.1 30080/TCP", "192.0.2.1 30080/TCP"],
            "b": ["10.0.0.2 80/TCP", "node 30080/TCP"],
        },
    ),
    "the same, and the node port is its own": Case(
        {
            "Node/n1": node("n1", "192.0.2.1"),
            "Service/a": service(1, "a", "10.0.0.1", "30080:30080", **EXTERNAL),
        },
        {"a": ["10.0.0.1 30080/TCP", "node 30080/TCP"]},
    ),
}


def check(world: World, case: Case) -> None:
    assert {name: world.frontends(name) for name in case.frontends} == {
        name: sorted(lines, key=lines.index) for name, lines in case.frontends.items()
    }
    assert {name: len(lines) for name, lines in world.said.items()} == dict.fromkeys(case.said, 1)
    for name, words in case.said.items():
        assert words in world.said[name][0]


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_who_has_it_in_whatever_order_they_come(case: Case) -> None:
    for order in itertools.permutations(case.objects):
        at_once, one_by_one = World(), World()
        at_once.apply({path: case.objects[path] for path in order})
        for path in order:
            one_by_one.apply({path: case.objects[path]})
        check(at_once, case)
        check(one_by_one, case)


def test_who_comes_next_has_it_when_the_first_goes() -> None:
    world = World()
    world.apply(CASES["three"].objects)
    world.apply({"Service/a": None})
    assert world.frontends("b") == ["10.0.0.2 80/TCP", "192.0.2.1 80/TCP"]
    assert world.frontends("c") == ["10.0.0.3 80/TCP"]
    assert world.said.keys() == {"c"}
    assert "80/TCP of 192.0.2.1 is Service ns/b's" in world.said["c"][0]
    world.apply({"Service/b": service(2, "b", "10.0.0.2")})
    assert world.frontends("c") == ["10.0.0.3 80/TCP", "192.0.2.1 80/TCP"]
    assert not world.said
    world.apply({"Service/c": service(3, "c", "10.0.0.3", "81", **EXTERNAL)})
    world.apply({"Service/b": service(2, "b", "10.0.0.2", **EXTERNAL)})
    assert world.frontends("b") == ["10.0.0.2 80/TCP", "192.0.2.1 80/TCP"]
    assert not world.said


def test_a_node_that_comes_and_goes() -> None:
    case = CASES["an external address that is a node's, and a node port"]
    world = World()
    world.apply({path: body for path, body in case.objects.items() if "Node" not in path})
    assert "192.0.2.1 30080/TCP" in world.frontends("a")
    world.apply({"Node/n1": node("n1", "192.0.2.1"), "Node/n2": node("n2", "192.0.2.1")})
    check(world, case)
    world.apply({"Node/n1": None})
    check(world, case)
    world.apply({"Node/n2": node("n2", "192.0.2.2")})
    assert "192.0.2.1 30080/TCP" in world.frontends("a")
    assert not world.said


def test_a_service_made_anew_with_the_same_address_is_no_conflict() -> None:
    """A relist may tell of the new one first."""
    world = World()
    world.apply({"Service/a": service(1, "a", "10.0.0.1", "80:30080", **EXTERNAL)})
    new = {"Service/b": service(2, "b", "10.0.0.1", "80:30080", **EXTERNAL)}
    world.apply({**new, "Service/a": None})
    assert world.frontends("a") == []
    assert world.frontends("b") == ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP", "node 30080/TCP"]
    world.apply({"Service/b": service(3, "b", "10.0.0.1", "80:30080", **EXTERNAL)})
    assert len(world.frontends("b")) == 3
    assert not world.said


def test_families_added_to_a_live_service() -> None:
    world = World()
    one = service(1, "a", "10.0.0.1", externalIPs=["192.0.2.1", "2001:db8::1"])
    world.apply({"Service/a": one})
    assert world.frontends("a") == ["10.0.0.1 80/TCP", "192.0.2.1 80/TCP"]
    one["spec"]["clusterIPs"] = ["10.0.0.1", "fd00::1"]
    world.apply({"Service/a": one})
    assert world.frontends("a") == [
        f"{ip} 80/TCP" for ip in ("10.0.0.1", "fd00::1", "192.0.2.1", "2001:db8::1")
    ]


# Host ports

PODS = {
    "different ports": ({"a": "80", "b": "81"}, {"a": ["* 80/TCP"], "b": ["* 81/TCP"]}),
    "different protocols": ({"a": "80", "b": "80/UDP"}, {"a": ["* 80/TCP"], "b": ["* 80/UDP"]}),
    # The table of Kubernetes' own conformance test of host ports.
    "different addresses and protocols": (
        {"a": "54323@127.0.0.1", "b": "54323@192.0.2.1", "c": "54323/UDP@192.0.2.1"},
        {"a": ["127.0.0.1 54323/TCP"], "b": ["192.0.2.1 54323/TCP"], "c": ["192.0.2.1 54323/UDP"]},
    ),
    "the older has it": ({"b": "80", "a": "80"}, {"b": ["* 80/TCP"], "a": []}),
    "all addresses and one": ({"a": "80", "b": "80@192.0.2.1"}, {"a": ["* 80/TCP"], "b": []}),
    "one and all addresses": (
        {"a": "80@192.0.2.1", "b": "80"},
        {"a": ["192.0.2.1 80/TCP"], "b": []},
    ),
    "who lost takes nothing from others": (
        {"a": "80@192.0.2.1", "b": "80", "c": "80@192.0.2.2"},
        {"a": ["192.0.2.1 80/TCP"], "b": [], "c": ["192.0.2.2 80/TCP"]},
    ),
    "all of IPv4, all of IPv6": (
        {"a": "80@0.0.0.0", "b": "80@::", "c": "80@192.0.2.1", "d": "80@2001:db8::1"},
        {"a": ["0.0.0.0 80/TCP"], "b": [":: 80/TCP"], "c": [], "d": []},
    ),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in PODS.items()])
def test_host_ports(case: tuple[dict[str, str], dict[str, list[str]]]) -> None:
    ports, wanted = case
    objects = {
        f"Pod/{name}": pod(age, name, port) for age, (name, port) in enumerate(ports.items())
    }
    elsewhere = pod(0, "z", *dict.fromkeys(ports.values()), where="n2")
    for order in itertools.permutations(objects):
        world = World()
        for path in order:
            world.apply({path: objects[path]})
        world.apply({"Pod/z": elsewhere})
        assert {name: world.host_ports(name) for name in ports} == wanted
        assert world.said.keys() == {name for name, kept in wanted.items() if not kept}


def test_a_pod_that_is_finished_or_gone_has_no_port() -> None:
    world = World()
    world.apply(
        {"Pod/a": pod(1, "a", "80"), "Pod/b": pod(2, "b", "80"), "Pod/c": pod(3, "c", "80")}
    )
    assert world.said["b"] == [
        "spec.containers.ports.hostPort: 80/TCP on node n1 is pod ns/a's, which was created first: "
        "use another hostPort, or put this pod on another node"
    ]
    world.apply({"Pod/a": pod(1, "a", "80", phase="Succeeded")})
    assert world.host_ports("b") == ["* 80/TCP"]
    assert world.said.keys() == {"c"}
    world.apply({"Pod/b": None})
    assert world.host_ports("c") == ["* 80/TCP"]
    assert not world.said


def test_a_node_port_comes_before_a_host_port() -> None:
    world = World()
    world.apply({"Pod/p": pod(1, "p", "30080", "80")})
    world.apply({"Service/a": service(2, "a", "10.0.0.1", "80:30080")})
    assert world.host_ports("p") == ["* 80/TCP"]
    assert world.said["p"] == [
        "spec.containers.ports.hostPort: 30080/TCP is the node port of Service ns/a: "
        "use another hostPort"
    ]
    world.apply({"Service/a": service(2, "a", "10.0.0.1", "80:30081")})
    assert world.host_ports("p") == ["* 30080/TCP", "* 80/TCP"]
    assert not world.said


def test_containers_and_sidecars_have_host_ports_and_the_hosts_network_has_none() -> None:
    world = World()
    body = pod(1, "p", "80")
    sidecar = {"restartPolicy": "Always", "ports": [{"hostPort": 81, "containerPort": 1}]}
    init = {"ports": [{"hostPort": 82, "containerPort": 1}]}
    body["spec"]["initContainers"] = [sidecar, init]
    body["spec"]["containers"].append({"ports": [{"containerPort": 83}]})
    world.apply({"Pod/p": body})
    assert world.host_ports("p") == ["* 80/TCP", "* 81/TCP"]
    assert world.view.nodes["pod/uid-p"] == "n1"
    body["spec"]["hostNetwork"] = True
    world.apply({"Pod/p": body})
    assert "pod/uid-p" not in world.view.resources


def test_overlap_is_symmetric() -> None:
    some = [Addr(b""), *(Addr(bytes(a)) for a in ((0,) * 16, (1,) * 16))]
    some += [Addr(b"\0" * 10 + b"\xff\xff" + bytes(4)), Addr(b"\0" * 10 + b"\xff\xff" + b"\1" * 4)]
    for one, other in itertools.product(some, some):
        assert overlap(one, other) == overlap(other, one)


# Random changes: what is there after them is what a fresh start makes of it.

IPS = ["192.0.2.1", "192.0.2.2", "10.0.0.1", "10.0.0.2"]


def some_objects(rng: Random) -> dict[str, Json | None]:
    name = rng.choice("abcde")
    kind = rng.choice(["Service", "Service", "Pod", "Node"])
    path = f"{kind}/{name}"
    if rng.random() < 0.2:
        return {path: None}
    age = rng.randint(1, 3)
    if kind == "Node":
        return {path: node(name, *rng.sample(IPS, rng.randint(0, 2)))}
    if kind == "Pod":
        ports = rng.sample(["80", "81", "80/UDP", "80@192.0.2.1", "81@0.0.0.0"], rng.randint(0, 3))
        return {path: pod(age, name, *ports, where=rng.choice(["a", "b"]))}
    ports = [rng.choice(["80", "80:81", "80/UDP", "80:80/UDP"])]
    ports += rng.sample(["81", "81:80"], rng.randint(0, 1))
    spec: Json = {"externalIPs": rng.sample(IPS, rng.randint(0, 2))}
    if rng.random() < 0.3:
        spec |= {"healthCheckNodePort": rng.choice([80, 81]), "externalTrafficPolicy": "Local"}
    spec["lb"] = rng.sample(IPS, rng.randint(0, 1))
    return {path: service(age, name, rng.choice(IPS[2:]), *ports, **spec)}


@settings(
    max_examples=100,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(st.integers(0, 2**32))
def test_any_history_ends_where_a_fresh_start_does(seed: int) -> None:
    rng = Random(seed)
    world = World()
    held: dict[str, Json] = {}
    for _ in range(40):
        for path, body in some_objects(rng).items():
            world.apply({path: body})
            held.pop(path, None)
            if body is not None:
                held[path] = body
    fresh = World()
    fresh.apply(dict(rng.sample(list(held.items()), len(held))))
    assert world.view.meaning() == fresh.view.meaning()
    for path in held:
        kind, name = path.split("/")
        if kind == "Service":
            assert world.frontends(name) == fresh.frontends(name)
            assert len(set(world.frontends(name))) == len(world.frontends(name))
    services = [world.frontends(p.split("/")[1]) for p in held if p.startswith("Service")]
    everything = [line for lines in services for line in lines]
    assert len(everything) == len(set(everything))  # nothing is two Services'
    assert world.claims.told == fresh.claims.told
