# SPDX-License-Identifier: Apache-2.0
"""One node's answer to `weir policy why`: policies against maps, and which ends it answers for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.worlds import TCP, UDP, Pod, Policy, Rule, World, address, endpoint, questions

from weir.agent import resources
from weir.agent.denials import Denials
from weir.agent.explain import Explainer
from weir.agent.judge import Flow, judge
from weir.agent.model import DesiredMaps, Model, longest
from weir.agent.resources import (
    Action,
    Blocked,
    NamedPort,
    Node,
    PortRange,
    Prefix,
    Tier,
    WireClass,
    WireSelector,
)
from weir.agent.routes import RouteFacts
from weir.agent.tables import Projection
from weir.agent.verdict import Question
from weir.agent.walks import Walks
from weir.agent.why import BadQuestion, DirectionView, Why, WhyView
from weir.api.address import parse, parse_cidr, text
from weir.api.v1 import weir_pb2
from weir.datapath.records import (
    Denial,
    DenialFlag,
    DenialKey,
    Direction,
    DropReason,
    PolicyVerdict,
    PrefixKey,
)

HTTP = PortRange(TCP, 80, 80, "")
HERE, THERE, OTHER = 1, 2, 3
WORLD = World(
    {HERE: Pod(frozenset({"web"})), THERE: Pod(frozenset({"cart"})), OTHER: Pod(frozenset())},
    {"in": Policy("web", True, False, (Rule(False, frozenset({"cart"}), (HTTP,)),))},
)


class FakeTables:
    """Desired rows as if they were in the kernel, but for what a test changes."""

    def __init__(self, projection: Projection) -> None:
        maps = DesiredMaps(projection)
        self.endpoints = _Lookup(maps.endpoint)
        self.addresses = _Lookup(maps.address)
        self.routes = _Lookup(lambda key: maps.route(key.address))
        self.prefixes = _Lookup(lambda key: maps.prefix(key.address))
        self.policy = _Lookup(maps.policy)
        self.denials: dict[DenialKey, Denial] = {}


class _Lookup:
    def __init__(self, get: Callable[[Any], Any]) -> None:
        self.get = get


class FakeWalks:
    def __init__(self, tables: FakeTables) -> None:
        self.tables = tables

    async def read(self, work: Callable[[Any], Any]) -> Any:
        return work(self.tables)


class Agent:
    def __init__(self, world: World = WORLD, local: tuple[int, ...] = (HERE,)) -> None:
        self.projection = Projection()
        self.projection.set_facts(RouteFacts("n1", (parse("192.0.2.1"),)))
        self.projection.apply(world.resources())
        for name, pod_cidr in (("n1", "10.0.0.0/31"), ("n2", "10.0.0.2/31")):
            node = Node(name, (parse(f"192.0.2.{name[1]}"),), (parse_cidr(pod_cidr),))
            self.projection.apply({f"node/{name}": node})
        for number in local:
            self.projection.set_endpoint(endpoint(number))
        self.projection.project()
        self.tables = FakeTables(self.projection)
        encoded = {f"address/{address(n).hex()}": _address(n) for n in world.pods}
        self.walks = cast("Walks", FakeWalks(self.tables))
        self.explainer = Explainer(self.projection, encoded)
        self.why = Why(self.projection, self.explainer, self.walks)

    async def ask(self, source: str, destination: str, port: str = "80") -> WhyView:
        query = {"from": source, "to": destination, "port": port, "protocol": "tcp"}
        return await self.why.answer(query)

    async def one(self, source: str, destination: str, port: str = "80") -> DirectionView:
        [found] = (await self.ask(source, destination, port)).directions
        return found


def _address(number: int) -> bytes:
    resource = weir_pb2.Resource(name=f"address/{address(number).hex()}")
    resource.address.address = address(number)
    resource.address.namespace, resource.address.pod = "ns", f"p{number}"
    return resource.SerializeToString()


async def test_allowed_by_a_rule() -> None:
    found = await Agent().one("ns/p2", "ns/p1")
    assert (found.direction, found.source, found.destination) == ("ingress", "10.0.0.2", "10.0.0.1")
    assert found.model.because == "ingress rule 0 of ns/in accepts it"
    assert [policy.policy for policy in found.model.policies] == ["ns/in"]
    assert found.maps.rule == "ingress rule 0 of ns/in"
    assert found.agree


async def test_denied_and_what_is_missing() -> None:
    found = await Agent().one("ns/p2", "ns/p1", "81")
    assert not found.model.allowed
    [near] = found.model.near_misses
    assert (near.missed, near.wants, near.has) == ("port", "TCP port 80", "TCP port 81")
    assert (found.maps.allowed, found.maps.reason, found.agree) == (False, "policy-ingress", True)


@pytest.mark.parametrize("kernel", ["allows", "denies"])
async def test_maps_that_do_something_else(kernel: str) -> None:
    agent = Agent()
    if kernel == "allows":
        agent.tables.policy.get = lambda _key: PolicyVerdict(99, 0x8000, 1)
        found = await agent.one("ns/p3", "ns/p1")
    else:
        agent.tables.policy.get = lambda _key: None
        found = await agent.one("ns/p2", "ns/p1")
    assert found.model.allowed is (kernel == "denies")
    assert found.maps.allowed is (kernel == "allows")
    assert not found.agree


async def test_what_did_not_fit_is_told() -> None:
    query = {"from": "ns/p2", "to": "ns/p1", "port": "80", "protocol": "tcp"}
    troubles = {("ns", "in"): "no room", ("ns", "other"): "neither"}
    [found] = (await Agent().why.answer(query, troubles)).directions
    assert found.troubles == ["ns/in: no room"]


async def test_ends_name_their_pods_and_nodes() -> None:
    answer = await Agent().ask("ns/p2", "10.0.0.1")
    assert (answer.source.pod, answer.source.node, answer.source.addresses) == (
        *("ns/p2", "n2"),
        ["10.0.0.2"],
    )
    assert (answer.destination.pod, answer.destination.node) == ("ns/p1", "n1")


@pytest.mark.parametrize(
    ("source", "destination", "directions"),
    [
        pytest.param("ns/p1", "ns/p2", ["egress"], id="from here"),
        pytest.param("ns/p2", "ns/p1", ["ingress"], id="to here"),
        pytest.param("198.51.100.1", "ns/p1", ["ingress"], id="from outside"),
        pytest.param("ns/p2", "ns/p3", [], id="elsewhere"),
        pytest.param("ns/nobody", "ns/p1", [], id="nobody"),
        pytest.param("2001:db8::1", "ns/p1", [], id="another family"),
        pytest.param("ns/p1", "ns/p1", ["egress", "ingress"], id="itself"),
    ],
)
async def test_ends_it_answers_for(source: str, destination: str, directions: list[str]) -> None:
    answer = await Agent().ask(source, destination)
    assert [found.direction for found in answer.directions] == directions
    assert all(found.agree for found in answer.directions)
    if source == destination:
        assert {found.model.ground for found in answer.directions} == {"itself"}


@pytest.mark.parametrize(
    ("source", "ground", "allowed"),
    [
        ("10.0.0.3", "no-rule", False),
        ("192.0.2.1", "own-node", True),
        ("192.0.2.2", "no-rule", False),
        ("198.51.100.1", "no-rule", False),
        ("203.0.113.7", "rule", True),
    ],
    ids=["pod", "own node", "other node", "outside", "in an ipBlock"],
)
async def test_addresses(source: str, ground: str, allowed: bool) -> None:
    agent = Agent()
    [cart] = [wire for wire in (1, 2, 3) if _is_cart(agent, wire)]
    agent.projection.apply({"prefix/x": Prefix(parse_cidr("203.0.113.0/24"), WireClass(cart))})
    agent.projection.project()
    found = await agent.one(source, "ns/p1")
    assert (found.model.ground, found.model.allowed) == (ground, allowed)
    assert found.agree


def _is_cart(agent: Agent, wire: int) -> bool:
    identity = agent.projection.identity
    return "cart" in identity.content(identity.number(WireClass(wire))).selectors


async def test_a_blocked_source() -> None:
    agent = Agent()
    agent.projection.apply({"blocked/x": Blocked("x", (parse_cidr("198.51.100.0/24"),))})
    assert (await agent.ask("198.51.100.1", "ns/p1")).source.blocked == ["x"]
    assert (await agent.ask("198.51.101.1", "ns/p1")).source.blocked == []


async def test_a_pod_address_that_nobody_has() -> None:
    agent = Agent()
    agent.projection.apply({f"address/{address(THERE).hex()}": None})
    agent.projection.project()
    found = await agent.one("10.0.0.2", "ns/p1")
    assert (found.model.ground, found.maps.reason) == ("unknown-peer", "unknown-peer")
    assert found.agree


@pytest.mark.parametrize(
    "query",
    [
        {"from": "ns/p1", "to": "p2", "port": "80", "protocol": "tcp"},
        {"from": "ns/p1", "to": "ns/p2", "port": "0", "protocol": "tcp"},
        {"from": "ns/p1", "to": "ns/p2", "port": "80", "protocol": "gre"},
        {"from": "ns/p1", "to": "ns/p2", "port": "80", "protocol": "icmp"},
        {"from": "ns/p1", "to": "ns/p2"},
    ],
    ids=str,
)
async def test_bad_questions(query: dict[str, str]) -> None:
    with pytest.raises(BadQuestion):
        await Agent().why.answer(query)


async def test_audit_mode() -> None:
    agent = Agent()
    pod = next(item for item in WORLD.resources().values() if isinstance(item, resources.Pod))
    agent.projection.apply({"pod/u1": replace(pod, name="p1", uid="u1", audit=True)})
    agent.projection.project()
    found = await agent.one("ns/p3", "ns/p1")
    assert (found.model.allowed, found.model.audited) == (False, True)
    assert (found.maps.allowed, found.maps.audited, found.agree) == (False, True, True)
    found = await agent.one("ns/p2", "ns/p1")
    assert (found.model.allowed, found.model.audited, found.maps.audited) == (True, False, False)


@pytest.mark.parametrize("action", [Action.DENY, Action.PASS])
async def test_a_rule_about_peers_that_are_not_known_denies_everybody(action: Action) -> None:
    agent = Agent()
    subject = next(n for n in map(WireSelector, range(1, 9))
                   if agent.projection.identity.selector_key(n) == "web")  # fmt: skip
    rule = resources.Rule(False, 0, False, (WireSelector(99),), (), action)
    agent.projection.apply(
        {"cluster-policy/x": resources.Policy(
            "", "x", subject, True, False, (rule,), Tier.ADMIN, 1
        )}
    )  # fmt: skip
    agent.projection.project()
    found = await agent.one("ns/p2", "ns/p1")
    assert found.model.because == "ingress rule 0 of ClusterNetworkPolicy x denies it"
    assert (found.maps.rule, found.agree) == ("ingress rule 0 of ClusterNetworkPolicy x", True)


async def test_denials_newest_first() -> None:
    agent = Agent()
    isolation = agent.projection.table("endpoints").rows[address(HERE)].ingress
    rule = next(iter(agent.projection.policy.rows.rows.values())).rule
    key = DenialKey(address(OTHER), address(HERE), 80, TCP, 1)
    agent.tables.denials = {
        key: Denial(100, 2, 0, isolation.rule_set, DropReason.POLICY_INGRESS, 0),
        replace(key, protocol=1, destination_port=0): Denial(
            200, 1, rule, isolation.rule_set, DropReason.POLICY_INGRESS, DenialFlag.AUDITED
        ),
    }
    newest, older = await Denials(agent.explainer, agent.walks, clock=time.monotonic).listed()
    assert (newest.protocol, newest.audited, newest.rule) == (
        "ICMP",
        True,
        "ingress rule 0 of ns/in",
    )
    assert (older.source.pod, older.destination.pod, older.destination.port) == (
        "ns/p3",
        "ns/p1",
        80,
    )
    assert (older.policies, older.rule, older.direction) == (("ns/in",), "", "ingress")
    assert older.last_seen == pytest.approx(100, abs=1)
    assert (older.packets, older.reason) == (2, "policy-ingress")


selectors = st.frozensets(st.sampled_from(["a", "b", "c"]))
named = st.sampled_from([(), (NamedPort("web", TCP, 81),), (NamedPort("web", TCP, 5000),)])
ports = st.lists(
    st.sampled_from([
        HTTP, PortRange(TCP, 80, 443, ""), PortRange(UDP, 0, 65535, ""), PortRange(TCP, 0, 0, "web")
    ]),
    max_size=2,
).map(tuple)  # fmt: skip
rules = st.builds(Rule, st.booleans(), st.none() | selectors.filter(bool), ports)
policies = st.builds(
    Policy,
    st.sampled_from(["a", "b", "c"]),
    st.booleans(),
    st.booleans(),
    st.lists(rules, max_size=3).map(tuple),
)
worlds = st.builds(
    World,
    st.fixed_dictionaries({n: st.builds(Pod, selectors, named) for n in (1, 2, 3)}),
    st.dictionaries(st.sampled_from("pqr"), policies),
)


cluster_rules = st.builds(
    resources.Rule,
    st.booleans(),
    st.integers(0, 3),
    st.booleans(),
    st.lists(st.sampled_from([101, 102, 103]).map(WireSelector), min_size=1, max_size=2).map(tuple),
    ports,
    st.sampled_from(Action),
)
cluster_policies = st.lists(
    st.builds(
        resources.Policy,
        st.just(""),
        st.sampled_from("xyz"),
        st.sampled_from([101, 102, 103]).map(WireSelector),
        st.booleans(),
        st.booleans(),
        st.lists(cluster_rules, max_size=3).map(tuple),
        st.sampled_from([Tier.ADMIN, Tier.BASELINE]),
        st.integers(0, 2),
    ),
    max_size=3,
    unique_by=lambda item: item.name,
)
# Beside the numbers that the world's own policies give to the same selectors.
OF_CLUSTER = {101: "a", 102: "b"}


@given(worlds, cluster_policies)
@settings(max_examples=80, deadline=None)
def test_policies_by_content_and_rows_by_number_say_the_same(
    world: World, of_cluster: list[resources.Policy]
) -> None:
    """103 is a selector that nobody has told."""
    named = replace(world, policies={**world.policies, "a": Policy("a", False, False),
                                     "b": Policy("b", False, False)})  # fmt: skip
    agent = Agent(named, (1, 2))
    agent.projection.apply(
        {f"selector/{n}": resources.Selector(WireSelector(n), k) for n, k in OF_CLUSTER.items()}
        | {f"cluster-policy/{item.name}": item for item in of_cluster}
    )
    agent.projection.project()
    maps, model = DesiredMaps(agent.projection), Model(agent.projection)
    for source, destination, protocol, port in questions((1, 2, 3)):
        flow = Flow(address(source), address(destination), protocol, port)
        parties = [model.party(end, text(end)) for end in (flow.source, flow.destination)]
        for egress, here in ((True, source), (False, destination)):
            if here not in (1, 2):
                continue
            question = Question(egress, *parties[:: 1 if egress else -1], protocol, port)
            said = model.decide(question)
            done = judge(maps, flow, Direction.EGRESS if egress else Direction.INGRESS)
            assert said.allowed == (done.reason is DropReason.NONE), (flow, said, done)
            if said.rule is not None and said.by is not None and not said.by.namespace:
                by = agent.explainer.deciders(done.rule, done.rule_set, done.reason)[1]
                assert by == f"{question.direction} rule {said.rule.index} of {said.by.title}"


def test_the_longest_prefix_wins() -> None:
    rows = {
        PrefixKey(cidr.bits, cidr.address): cidr.text()
        for cidr in map(parse_cidr, ("0.0.0.0/0", "10.0.0.0/8", "10.0.0.1/32", "fd00::/8"))
    }
    for addr, found in (
        ("10.0.0.1", "10.0.0.1/32"),
        ("10.0.0.2", "10.0.0.0/8"),
        ("11.0.0.0", "0.0.0.0/0"),
        ("fd00::1", "fd00::/8"),
        ("2001:db8::1", None),
    ):
        assert longest(rows, parse(addr)) == found
