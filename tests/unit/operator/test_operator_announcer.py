# SPDX-License-Identifier: Apache-2.0
"""Which node announces an address: the same on every replica, and moved as little as can be."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from support.load_balancers import pool

from weir.api.address import Addr, parse
from weir.operator import wire
from weir.operator.announcer import Announcer, elect
from weir.operator.liveness import Liveness
from weir.operator.objects import Endpoint, EndpointSlice, Key, Node, parse_node
from weir.operator.services import Service, ServicePort

ADDRESS = parse("192.0.2.9")
NODES = [f"n{i}" for i in range(8)]


def node(name: str, **fields: Any) -> Node:
    return Node(Key("", name), fields.pop("addresses", ()), (), **fields)


def service(name: str, *addresses: Addr, local: bool = False, namespace: str = "shop") -> Service:
    return Service(
        Key(namespace, name), (parse("10.96.0.9"),), (ServicePort("", 6, 80),),
        load_balancer_ips=addresses or (ADDRESS,), external_local=local,
    )  # fmt: skip


def endpoints(of: str, *where: str) -> EndpointSlice:
    """NODE or NODE:ending or NODE:unready."""
    made = []
    for word in where:
        name, _, state = word.partition(":")
        ending = state == "ending"
        made.append(Endpoint(parse("10.0.0.1"), not state, not state or ending, ending, name, ""))
    return EndpointSlice(Key("shop", f"{of}-1"), of, (), tuple(made))


def announcer(*nodes: Node, announce: bool = True) -> Announcer:
    made = Announcer()
    made.pool(Key("", "a"), pool("a", "192.0.2.0/24", announce=announce))
    for one in nodes or [node(name) for name in NODES]:
        made.node(one.key, one)
    return made


def who(of: Announcer) -> str:
    of.settle()
    return of.announced.get(ADDRESS, "")


def put(to: Announcer, *services: Service) -> Announcer:
    for one in services:
        to.service(one.key, one)
    return to


def test_one_node_and_what_agents_are_told() -> None:
    made = put(announcer(), service("a"))
    (change,) = made.settle()
    assert change.name == f"announced/{ADDRESS.hex()}"
    assert change.resource is not None
    assert change.resource.announced.address == ADDRESS
    assert change.resource.announced.node == made.announced[ADDRESS] == elect(ADDRESS, NODES)
    assert made.settle() == []
    made.service(Key("shop", "a"), None)
    (change,) = made.settle()
    assert change.resource is None
    assert made.announced == {}


def test_every_replica_comes_to_the_same_whatever_the_order() -> None:
    services = [service(f"s{i}", parse(f"192.0.2.{i}")) for i in range(1, 100)]
    found = []
    for seed in range(4):
        order = random.Random(seed)
        events: list[Any] = [(Announcer.node, node(name)) for name in NODES]
        events += [(Announcer.service, one) for one in services]
        events += [(Announcer.pool, pool("a", "192.0.2.0/24"))]
        order.shuffle(events)
        made = Announcer()
        for event, new in events:
            event(made, new.key, new)
            if order.random() < 0.2:
                made.settle()
        made.settle()
        found.append(made.announced)
    assert all(one == found[0] for one in found)
    per_node = [list(found[0].values()).count(name) for name in NODES]
    assert min(per_node) >= 4, per_node


@pytest.mark.parametrize("how", ["gone", "not ready", "excluded"])
def test_a_lost_node_moves_its_own_addresses_alone_and_they_come_back(how: str) -> None:
    made = put(announcer(), *(service(f"s{i}", parse(f"192.0.2.{i}")) for i in range(1, 100)))
    made.settle()
    before = dict(made.announced)
    lost = NODES[3]
    if how == "gone":
        made.node(Key("", lost), None)
    else:
        made.node(Key("", lost), node(lost, ready=how != "not ready", balances=how != "excluded"))
    made.settle()
    moved = {addr for addr in before if made.announced[addr] != before[addr]}
    assert moved == {addr for addr, name in before.items() if name == lost}
    assert lost not in made.announced.values()
    made.node(Key("", lost), node(lost))
    made.settle()
    assert made.announced == before


def test_without_any_ready_node_the_others_go_on() -> None:
    made = put(announcer(), service("a"))
    before = who(made)
    for name in NODES:
        made.node(Key("", name), node(name, ready=False, balances=name != "n0"))
    assert who(made) in (before, elect(ADDRESS, NODES[1:]))
    made.node(Key("", "n5"), node("n5"))
    assert who(made) == "n5"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["n2"], ["n2"]),
        (["n2:unready", "n4"], ["n4"]),
        (["n2:ending"], ["n2"]),
        (["n2:ending", "n4", "n6"], ["n4", "n6"]),
        (["n2:unready"], []),
        (["elsewhere"], []),
        ([], []),
    ],
)
def test_local_service_only_where_it_has_endpoints(where: list[str], expected: list[str]) -> None:
    made = put(announcer(), service("a", local=True))
    slice_ = endpoints("a", *where)
    made.slice(slice_.key, slice_)
    assert who(made) == elect(ADDRESS, expected)


def test_local_service_follows_its_endpoints() -> None:
    made = put(announcer(), service("a", local=True))
    for name in ("n1", "n5", "n2"):
        slice_ = endpoints("a", name)
        made.slice(slice_.key, slice_)
        assert who(made) == name
    made.node(Key("", "n2"), node("n2", ready=False))
    assert who(made) == ""
    made.node(Key("", "n2"), node("n2"))
    assert who(made) == "n2"
    made.slice(Key("shop", "a-1"), None)
    assert who(made) == ""
    put(made, service("a"))
    assert who(made) == elect(ADDRESS, NODES)


def test_shared_address_goes_where_all_have_endpoints() -> None:
    made = put(announcer(), service("a", local=True), service("b", local=True))
    for slice_ in (endpoints("a", "n1", "n2"), endpoints("b", "n2", "n3")):
        made.slice(slice_.key, slice_)
    assert who(made) == "n2"
    slice_ = endpoints("b", "n3")
    made.slice(slice_.key, slice_)
    assert who(made) == elect(ADDRESS, ["n1", "n2", "n3"])
    made.service(Key("shop", "b"), None)
    assert who(made) == elect(ADDRESS, ["n1", "n2"])


def test_only_addresses_of_pools_that_are_announced() -> None:
    made = put(announcer(announce=False), service("a"))
    assert who(made) == ""
    made.pool(Key("", "a"), pool("a", "192.0.2.0/24"))
    assert who(made)
    made.pool(Key("", "a"), pool("a", "192.0.2.128/25"))
    assert who(made) == ""
    made.pool(Key("", "b"), pool("b", "192.0.2.9-192.0.2.9", announce=False, created=2))
    made.pool(Key("", "a"), pool("a", "192.0.2.0/24"))
    assert who(made), "the older pool decides"


def test_never_a_nodes_own_address() -> None:
    made = put(announcer(), service("a"))
    assert who(made)
    made.node(Key("", "n1"), node("n1", addresses=(ADDRESS,)))
    assert who(made) == ""
    made.node(Key("", "n1"), node("n1"))
    assert who(made)


@pytest.mark.parametrize(
    ("status", "labels", "ready", "balances"),
    [
        ("True", {}, True, True),
        ("False", {}, False, True),
        ("Unknown", {}, False, True),
        ("", {}, False, True),
        ("True", {"node.kubernetes.io/exclude-from-external-load-balancers": ""}, True, False),
        ("True", {"kubernetes.io/os": "linux"}, True, True),
        ("True", {"kubernetes.io/os": "windows"}, True, False),
    ],
)
def test_what_of_a_node_decides(
    status: str, labels: dict[str, str], ready: bool, balances: bool
) -> None:
    conditions = [{"type": "MemoryPressure", "status": "True"}]
    conditions += [{"type": "Ready", "status": status}] if status else []
    raw = {"metadata": {"name": "n1", "labels": labels}, "status": {"conditions": conditions}}
    made = parse_node(msgspec.convert(raw, wire.Node)).value
    assert made is not None
    assert (made.ready, made.balances) == (ready, balances)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_silent_kubelets() -> None:
    """A dead node's is silent after 25 s, and is back with its next renewal."""
    told: list[tuple[str, bool]] = []
    clock = Clock()
    liveness = Liveness(lambda node, silent: told.append((node, silent)), clock)

    def renew(*names: str) -> None:
        clock.now += 10
        for name in names:
            liveness.changed("Lease", Key("kube-node-lease", name), None, str(clock.now))
        liveness.look()

    for _ in range(5):
        renew(*NODES)
    assert told == []
    renew(*NODES[1:])
    renew(*NODES[1:])
    assert told == []
    renew(*NODES[1:])
    renew(*NODES[1:])
    assert told == [("n0", True)]
    renew(*NODES)
    assert told == [("n0", True), ("n0", False)]
    told.clear()
    for _ in range(5):  # most of them at once: it is not they who fail
        renew(*NODES[5:])
    assert told == []
    for _ in range(4):
        renew(*NODES[4:])
    assert told == [(name, True) for name in NODES[:4]]
    liveness.changed("Lease", Key("kube-node-lease", "n1"), "", None)
    assert told[-1] == ("n1", False)


def test_api_server_that_is_away_makes_nobody_silent() -> None:
    """Kubelets renew one after the other: they neither become late nor come back at once."""
    told: list[tuple[str, bool]] = []
    clock = Clock()
    liveness = Liveness(lambda node, silent: told.append((node, silent)), clock)

    def pass_by(seconds: int, *, away: bool = False, but: str = "") -> None:
        for _ in range(seconds):
            clock.now += 1
            for i, name in enumerate(NODES):
                if not away and name != but and int(clock.now) % 10 == i:
                    liveness.changed("Lease", Key("kube-node-lease", name), None, str(clock.now))
            liveness.look()

    pass_by(60)
    pass_by(60, away=True)
    pass_by(60)
    assert told == []
    pass_by(40, but="n3")
    assert told == [("n3", True)]


def test_silent_node_does_not_announce() -> None:
    made = put(announcer(), service("a"))
    before = who(made)
    made.silent(before, True)
    after = who(made)
    assert after == elect(ADDRESS, [name for name in NODES if name != before])
    made.node(Key("", before), node(before, zone="other"))
    assert who(made) == after, "the API still says that it is Ready"
    made.silent(before, False)
    assert who(made) == before
    made.silent("unknown", True)
    made.node(Key("", "unknown"), node("unknown"))
    assert who(made) == before
