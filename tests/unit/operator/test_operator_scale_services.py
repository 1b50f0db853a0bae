# SPDX-License-Identifier: Apache-2.0
"""Services at size: what is asserted is that the cost follows the change; CPU times are printed."""

from __future__ import annotations

import time
from dataclasses import replace

from weir.api.address import V4_PREFIX, Addr
from weir.operator.claims import Claims
from weir.operator.compiler import Compiler
from weir.operator.objects import Endpoint, EndpointSlice, HostPort, Key, Namespace, Node, Pod, Port
from weir.operator.revisions import Revisions
from weir.operator.services import Service, ServicePort

SERVICES = 30_000
ENDPOINTS = 250_000
NODES = 1000
FIRST_NODE_PORT = 20_000


def v4(number: int) -> Addr:
    return Addr(V4_PREFIX + number.to_bytes(4, "big"))


def v6(number: int) -> Addr:
    return Addr(b"\xfd" + number.to_bytes(15, "big"))


def service(i: int) -> Service:
    """Each a load balancer with a port that many have, and one more of its own."""
    return Service(
        Key(f"ns{i % 100}", f"service-{i}"),
        cluster_ips=(v4(0x0A600000 + i), v6(i)),
        ports=(
            ServicePort("http", 6, 80, FIRST_NODE_PORT + i),
            ServicePort("admin", 6, 1000 + i),
        ),
        load_balancer_ips=(v4(0xC0000000 + i),),
        created=f"2030-01-01T00:00:{i % 60:02d}Z",
        uid=f"00000000-0000-0000-0000-{i:012d}",
    )


def slice_of(i: int, endpoints: int) -> EndpointSlice:
    made = tuple(
        Endpoint(
            v4(0x0B000000 + i * endpoints + n),
            ready=True,
            serving=True,
            terminating=False,
            node=f"node{(i + n) % NODES}",
            zone=f"zone{n % 3}",
        )
        for n in range(endpoints)
    )
    of = service(i).key
    return EndpointSlice(
        Key(of.namespace, f"{of.name}-abcde"),
        of.name,
        (Port("http", 6, 8080), Port("admin", 6, 8081)),
        made,
    )


class Timed:
    """Changes through claims, compiler and revisions, with what each cost."""

    def __init__(self) -> None:
        self.compiler = Compiler()
        self.told = 0
        self.claims = Claims(self.compiler, self._tell)
        self.revisions = Revisions("test")

    def _tell(self, *_: object) -> None:
        self.told += 1

    def publish(self, what: str, started: float, times: int = 1) -> int:
        self.claims.settle()
        news = self.revisions.publish(self.compiler.flush())
        milliseconds = (time.process_time() - started) * 1e3
        print(f"{what}: {news} resources, {milliseconds / times:.3f} ms")
        return news


def test_thirty_thousand_services_and_a_quarter_million_endpoints() -> None:
    world = Timed()
    for n in range(NODES):
        key = Key("", f"node{n}")
        world.claims.node(key, Node(key, (v4(0xAC100000 + n), v6(1 << 64 | n)), ()))
    world.publish(f"{NODES} nodes", time.process_time())

    started = time.process_time()
    made = [service(i) for i in range(SERVICES)]
    print(f"made {SERVICES} Services in {time.process_time() - started:.2f} s")
    started = time.process_time()
    for one in made:
        world.claims.service(one.key, one)
    assert world.publish("all Services", started) == SERVICES
    size = sum(len(update) for update in world.revisions.snapshot("node1"))
    print(f"on the wire: {size / SERVICES:.0f} bytes a Service, {size / 1e6:.1f} MB")
    assert size < SERVICES * 300

    slices = [slice_of(i, ENDPOINTS // SERVICES + 1) for i in range(SERVICES)]
    started = time.process_time()
    for each in slices:
        world.compiler.slice(each.key, each)
    assert world.publish("all slices", started) == SERVICES
    total = sum(len(update) for update in world.revisions.snapshot("node1"))
    endpoints = sum(len(each.endpoints) for each in slices)
    print(f"on the wire: {(total - size) / endpoints:.0f} bytes an endpoint, {total / 1e6:.1f} MB")

    started = time.process_time()
    for one in made[:1000]:
        world.claims.service(one.key, replace(one, affinity_seconds=10800))
        world.claims.settle()
        assert world.revisions.publish(world.compiler.flush()) == 1
    print(f"a Service of {SERVICES}: {time.process_time() - started:.3f} ms each")
    started = time.process_time()
    for each in slices[:1000]:
        world.compiler.slice(each.key, replace(each, endpoints=each.endpoints[1:]))
        assert world.revisions.publish(world.compiler.flush()) == 1
    print(f"a slice of {SERVICES}: {time.process_time() - started:.3f} ms each")

    # An older one takes a load balancer's address from a Service: these two, and no more.
    thief = replace(
        service(SERVICES), load_balancer_ips=(v4(0xC0000007),), created="2029-01-01T00:00:00Z"
    )
    started = time.process_time()
    world.claims.service(thief.key, thief)
    assert world.publish("an address taken", started) == 2
    assert world.told == 1
    started = time.process_time()
    world.claims.service(thief.key, None)
    assert world.publish("and given back", started) == 2

    # A node gets an address that many Services have: only those with somebody's node port there.
    key = Key("", "node1")
    started = time.process_time()
    world.claims.node(key, Node(key, (v4(0xC0000009),), ()))
    assert world.publish("a node's address", started) == 1


def test_ten_thousand_that_claim_the_same() -> None:
    """Somebody may try. The cost of each is not that of all."""
    world = Timed()
    wanted = (v4(0xC0000001),)
    started = time.process_time()
    for i in range(10_000):
        one = replace(
            service(i),
            external_ips=wanted,
            load_balancer_ips=(),
            ports=(ServicePort("http", 6, 80, 30_000),),
        )
        world.claims.service(one.key, one)
    seconds = time.process_time() - started
    assert world.publish("all of one address and node port", started) == 10_000
    assert world.told == 9_999
    first = min((service(i) for i in range(10_000)), key=lambda s: (s.created, s.key))
    started = time.process_time()
    world.claims.service(first.key, None)
    assert world.publish("the first goes", started) == 2
    assert seconds < 10


def test_host_ports_of_a_daemon_set() -> None:
    world = Timed()
    namespace = Key("", "ns")
    world.compiler.namespace(namespace, Namespace(namespace, ()))
    started = time.process_time()
    for n in range(5000):
        key = Key("ns", f"pod{n}")
        port = HostPort(6, 80, 8080)
        pod = Pod(key, f"uid{n}", "", (), f"node{n}", True, (v4(0x0B000000 + n),), (), (port,))
        world.claims.pod(key, pod)
    world.publish("5,000 pods with a host port", started)
    one = replace(service(1), ports=(ServicePort("http", 6, 81, 80),))
    started = time.process_time()
    world.claims.service(one.key, one)
    assert world.publish("a node port that all of them have", started) == 5001
    assert world.told == 5000
