# SPDX-License-Identifier: Apache-2.0
"""Who gets which address: tables of cases, and any sequence of events against what must hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from support.load_balancers import OUR_CLASS, pool, service

from weir.api.address import is_ipv4, parse, text
from weir.operator.allocator import Allocator, Outcome
from weir.operator.balancers import Shown, Wish, share
from weir.operator.conditions import Condition
from weir.operator.objects import Key
from weir.operator.pools import Cluster, Judged, Pool, judge, number

OURS = Condition("weir.dev/AddressesAssigned", "True", "Assigned")


@dataclass
class Desk:
    """An allocator, and what Services' status says: what it decided."""

    allocator: Allocator = field(default_factory=Allocator)
    pools: dict[str, Pool] = field(default_factory=dict)
    wishes: dict[Key, Wish] = field(default_factory=dict)
    cluster: Cluster = field(default_factory=Cluster)
    judged: dict[Key, Judged] = field(default_factory=dict)

    def set_pools(self, *pools: Pool) -> Desk:
        self.pools = {one.key.name: one for one in pools}
        self.judged = judge(pools, self.cluster)
        self.allocator.pools(self.judged.values())
        return self

    def add(self, *wishes: Wish, shows: str = "", condition: Condition | None = None) -> Desk:
        addresses = tuple(parse(part) for part in shows.split())
        for wish in wishes:
            self.wishes[wish.key] = wish
            self.allocator.service(wish.key, wish, Shown(addresses, condition=condition))
        return self

    def remove(self, wish: Wish) -> Desk:
        del self.wishes[wish.key]
        self.allocator.service(wish.key, None)
        return self

    def outcome(self, name: str, namespace: str = "shop") -> Outcome:
        self.allocator.settle()
        return self.allocator.outcomes[Key(namespace, name)]

    def given(self, name: str, namespace: str = "shop") -> str:
        addresses = self.outcome(name, namespace).addresses
        return "theirs" if addresses is None else " ".join(text(addr) for addr in addresses)

    def why(self, name: str) -> str:
        return "; ".join(problem.message for problem in self.outcome(name).problems)

    def statuses(self) -> dict[Key, tuple[bytes, ...] | None]:
        self.allocator.settle()
        return {key: outcome.addresses for key, outcome in self.allocator.outcomes.items()}

    def anew(self) -> Desk:
        """Another replica, which knows what is in the API alone."""
        other = Desk(cluster=self.cluster)
        for key, wish in self.wishes.items():
            addresses = self.allocator.outcomes[key].addresses
            condition = None if addresses is None else OURS
            other.wishes[key] = wish
            other.allocator.service(key, wish, Shown(addresses or (), condition=condition))
        return other.set_pools(*self.pools.values())


def test_lowest_free_address_in_order_of_age() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.8/30"))
    desk.add(service("c", created=3), service("a", created=1), service("b", created=2))
    assert [desk.given(name) for name in "abc"] == ["192.0.2.8", "192.0.2.9", "192.0.2.10"]
    desk.remove(service("a", created=1)).add(service("d", created=4), service("e", created=5))
    assert (desk.given("d"), desk.given("e")) == ("192.0.2.8", "192.0.2.11")


def test_exhausted_pool_is_told_and_what_is_freed_goes_to_who_waits() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.1-192.0.2.1"))
    desk.add(service("a", created=1), service("b", created=2))
    assert desk.given("a") == "192.0.2.1"
    assert desk.given("b") == ""
    assert desk.why("b") == "no IPv4 address is free in LoadBalancerPool a: add a block"
    assert desk.allocator.waiting == 1
    desk.remove(service("a", created=1))
    assert (desk.given("b"), desk.why("b"), desk.allocator.waiting) == ("192.0.2.1", "", 0)


def test_both_families_in_the_services_order() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28", "2001:db8::/64"))
    desk.add(service("a", families=["IPv6", "IPv4"]), service("b", families=["IPv6"], created=1))
    assert desk.given("a") == "2001:db8:: 192.0.2.0"
    assert desk.given("b") == "2001:db8::1"


def test_family_without_a_pool_is_told_and_the_other_is_given() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a", families=["IPv4", "IPv6"]))
    assert desk.given("a") == "192.0.2.0"
    assert desk.why("a").startswith("no LoadBalancerPool with IPv6 addresses selects this Service")
    desk.set_pools(pool("a", "192.0.2.0/28", "2001:db8::/64"))
    assert (desk.given("a"), desk.why("a")) == ("192.0.2.0 2001:db8::", "")


@pytest.mark.parametrize(
    ("asked", "given", "why"),
    [
        ("192.0.2.9", "192.0.2.9", ""),
        ("192.0.2.9,192.0.2.11", "192.0.2.9 192.0.2.11", ""),
        ("203.0.113.1", "", "203.0.113.1 is in no usable block"),
        ("192.0.2.3", "", "is that of Service shop/other, not to be shared"),
        ("192.0.2.7", "", "192.0.2.7 is a node's address"),
        ("198.51.100.1", "", "of LoadBalancerPool b, whose selectors do not select this Service"),
        ("198.51.200.1", "198.51.200.1", ""),
        ("2001:db8::1", "192.0.2.0", "is of IPv6, which the Service is not"),
    ],
)
def test_requested_address(asked: str, given: str, why: str) -> None:
    desk = Desk(cluster=Cluster(hosts={parse("192.0.2.7"): "n1"})).set_pools(
        pool("a", "192.0.2.0/28"),
        pool("b", "198.51.100.0/24", serviceSelector={"matchLabels": {"app": "x"}}),
        pool("c", "198.51.200.0/24", autoAssign=False),
    )
    desk.add(service("other", ips="192.0.2.3"), service("a", ips=asked, created=1))
    assert desk.given("a") == given
    assert why in desk.why("a")
    assert bool(why) == bool(desk.why("a"))


def test_request_by_field_and_the_annotation_comes_first() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28"))
    desk.add(service("a", loadBalancerIP="192.0.2.5"))
    desk.add(service("b", loadBalancerIP="192.0.2.6", ips="192.0.2.7"))
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.5", "192.0.2.7")


def test_keeps_what_it_has_until_the_request_can_be_met() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a"), service("b", created=1))
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.0", "192.0.2.1")
    desk.add(service("a", ips="192.0.2.1"))
    assert desk.given("a") == "192.0.2.0"
    assert "is that of Service shop/b" in desk.why("a")
    assert desk.anew().given("a") == "192.0.2.0"
    desk.remove(service("b", created=1))
    assert (desk.given("a"), desk.why("a")) == ("192.0.2.1", "")


def test_pool_without_auto_assign_gives_nothing_unasked() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28", autoAssign=False)).add(service("a"))
    assert desk.given("a") == ""
    assert "autoAssign false: ask for one" in desk.why("a")


def test_autoassign_taken_away_takes_no_address_away() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a"))
    assert desk.given("a") == "192.0.2.0"
    desk.set_pools(pool("a", "192.0.2.0/28", autoAssign=False))
    assert (desk.given("a"), desk.anew().given("a")) == ("192.0.2.0", "192.0.2.0")


def test_pools_for_some_come_before_pools_for_all() -> None:
    desk = Desk().set_pools(
        pool("a", "192.0.2.0/28"),
        pool("b", "198.51.100.0/24", serviceSelector={"matchLabels": {"app": "x"}}),
    )
    desk.add(service("a"), service("b", labels={"app": "x"}))
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.0", "198.51.100.0")


def test_namespace_selector_follows_labels() -> None:
    desk = Desk().set_pools(
        pool("a", "192.0.2.0/28", namespaceSelector={"matchLabels": {"team": "x"}})
    )
    desk.add(service("a"))
    assert desk.given("a") == ""
    desk.allocator.namespace("shop", {"team": "x"})
    assert desk.given("a") == "192.0.2.0"
    desk.allocator.namespace("shop", {"team": "y"})
    assert desk.given("a") == ""


def test_pool_that_shrinks_takes_its_addresses_back() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a"), service("b", created=1))
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.0", "192.0.2.1")
    desk.set_pools(pool("a", "192.0.2.1-192.0.2.4"))
    assert (desk.given("b"), desk.given("a")) == ("192.0.2.1", "192.0.2.2")
    desk.set_pools(pool("z", "198.51.100.0/24"))
    assert desk.given("a") == "198.51.100.0"


SHARING: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("same key, other port", {}, {"ports": ["443/TCP"]}, ""),
    ("same key, other protocol", {}, {"ports": ["80/UDP"]}, ""),
    ("same port", {}, {}, "both have port 80/TCP"),
    ("other key", {}, {"sharing_key": "z", "ports": ["443/TCP"]}, "without the same annotation"),
    ("no key", {"sharing_key": ""}, {"sharing_key": "", "ports": ["443/TCP"]}, "without the same"),
    ("Local and Cluster", {"policy": "Local"}, {"ports": ["443/TCP"]}, "the other has not"),
    (
        "Local, other selectors",
        {"policy": "Local", "selector": {"app": "x"}},
        {"policy": "Local", "selector": {"app": "y"}, "ports": ["443/TCP"]},
        "selectors differ",
    ),
    (
        "Local, same selector",
        {"policy": "Local", "selector": {"app": "x"}},
        {"policy": "Local", "selector": {"app": "x"}, "ports": ["443/TCP"]},
        "",
    ),
    ("other namespace", {}, {"namespace": "bank", "ports": ["443/TCP"]}, "other's namespace"),
    (
        "other namespace, one lets in",
        {"sharing_namespaces": "bank"},
        {"namespace": "bank", "ports": ["443/TCP"]},
        "other's namespace",
    ),
    (
        "other namespace, both let in",
        {"sharing_namespaces": "bank, club"},
        {"namespace": "bank", "ports": ["443/TCP"], "sharing_namespaces": "*"},
        "",
    ),
]


@pytest.mark.parametrize(
    ("one", "other", "why"), [r[1:] for r in SHARING], ids=[r[0] for r in SHARING]
)
@pytest.mark.parametrize("asked", [False, True])
def test_sharing(one: dict[str, Any], other: dict[str, Any], why: str, asked: bool) -> None:
    request = {"ips": "192.0.2.0"} if asked else {}
    a = service("a", **({"sharing_key": "k"} | one))
    b = service("b", created=1, **({"sharing_key": "k"} | other | request))
    desk = Desk().set_pools(pool("p", "192.0.2.0/28")).add(a, b)
    assert why in share(a, b)
    assert why in share(b, a)
    assert bool(share(a, b)) == bool(why)
    alone = "" if asked else "192.0.2.1"
    assert desk.given("b", b.key.namespace) == (alone if why else "192.0.2.0")
    assert desk.given("a") == "192.0.2.0"


def test_who_is_no_longer_to_share_moves() -> None:
    desk = Desk().set_pools(pool("p", "192.0.2.0/28"))
    desk.add(service("a", sharing_key="k"))
    desk.add(service("b", sharing_key="k", ports=["443/TCP"], created=1))
    assert desk.given("b") == "192.0.2.0"
    desk.add(service("b", sharing_key="k", ports=["443/TCP", "80/TCP"], created=1))
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.0", "192.0.2.1")


# What is there before us


def test_status_is_kept_and_never_given_to_another() -> None:
    desk = Desk().add(service("young", created=9), shows="192.0.2.0").add(service("old"))
    desk.set_pools(pool("a", "192.0.2.0/28"))
    assert (desk.given("young"), desk.given("old")) == ("192.0.2.0", "192.0.2.1")


def test_of_two_with_one_address_the_older_keeps_it() -> None:
    desk = Desk().add(service("young", created=9), shows="192.0.2.5")
    desk.add(service("old"), shows="192.0.2.5").set_pools(pool("a", "192.0.2.0/28"))
    assert (desk.given("young"), desk.given("old")) == ("192.0.2.0", "192.0.2.5")


def test_what_another_replica_wrote_is_taken_over() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a"), service("b"))
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.0", "192.0.2.1")
    desk.add(service("b"), shows="192.0.2.5")
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.0", "192.0.2.5")
    desk.add(service("a"), shows="192.0.2.5")  # the older one, though it comes later
    assert (desk.given("a"), desk.given("b")) == ("192.0.2.5", "192.0.2.0")


def test_nothing_written_or_nothing_usable_takes_nothing_away() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a"))
    for shows in ("192.0.2.0", "", "198.51.100.1", "192.0.2.0", ""):
        assert desk.given("a") == "192.0.2.0"
        desk.add(service("a"), shows=shows)


def test_what_another_replica_wrote_comes_instead_of_what_was_given() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(service("a"))
    assert desk.given("a") == "192.0.2.0"
    desk.add(service("a", ips="198.51.100.1"), shows="192.0.2.5")
    assert desk.given("a") == "192.0.2.5"
    assert "is in no usable block" in desk.why("a")


def test_status_that_is_not_written_yet_claims_nothing_back() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/30")).add(service("first"), service("moves"))
    assert (desk.given("first"), desk.given("moves")) == ("192.0.2.0", "192.0.2.1")
    desk.add(service("moves"), shows="192.0.2.1")
    asks = service("moves", ips="192.0.2.3")
    desk.add(asks, shows="192.0.2.1")
    assert desk.given("moves") == "192.0.2.3"
    desk.add(service("young", created=9))
    assert desk.given("young") == "192.0.2.1"
    desk.remove(service("first"))
    for labels in ({"app": "x"}, {"app": "y"}):
        desk.add(service("moves", ips="192.0.2.3", labels=labels), shows="192.0.2.1")
        desk.add(service("young", created=9, labels=labels))
        assert (desk.given("moves"), desk.given("young")) == ("192.0.2.3", "192.0.2.1")


def test_what_was_asked_for_stays_though_somebody_strikes_it() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.1-192.0.2.3"))
    asks = service("asks", created=5, ips="192.0.2.1,192.0.2.2")
    assert desk.add(asks).given("asks") == "192.0.2.1 192.0.2.2"
    desk.add(asks, shows="192.0.2.1").add(service("old"))
    assert (desk.given("asks"), desk.given("old")) == ("192.0.2.1 192.0.2.2", "192.0.2.3")


def test_who_has_an_address_is_told_as_it_is() -> None:
    """Whoever shares it comes and goes: the oldest is named, the same by every replica."""
    shared = {"sharing_key": "k", "ips": "192.0.2.1"}
    one = service("one", created=2, ports=["80/TCP"], **shared)
    other = service("other", created=1, ports=["443/TCP"], **shared)
    desk = Desk().set_pools(pool("a", "192.0.2.0/28")).add(one)
    desk.add(service("waits", created=3, ips="192.0.2.1"))
    assert "is that of Service shop/one," in desk.why("waits")
    desk.add(other)
    assert "is that of Service shop/other," in desk.why("waits")
    desk.remove(other)
    assert "is that of Service shop/one," in desk.why("waits")


def test_without_pools_services_are_left_alone() -> None:
    desk = Desk().add(service("a"), shows="203.0.113.7").add(service("b")).set_pools()
    assert (desk.given("a"), desk.given("b"), desk.why("b")) == ("theirs", "theirs", "")
    desk.add(service("c", loadBalancerClass=OUR_CLASS))
    assert desk.given("c") == ""
    assert "no LoadBalancerPool" in desk.why("c")
    desk.add(service("d"), shows="203.0.113.7", condition=OURS)
    assert desk.given("d") == ""


def test_what_another_load_balancer_gave_is_its_own() -> None:
    desk = Desk().set_pools(pool("a", "192.0.2.0/28"))
    desk.add(service("theirs"), shows="203.0.113.7").add(service("ours"), shows="192.0.2.9")
    desk.add(service("marked"), shows="203.0.113.7", condition=OURS)
    desk.add(service("classed", loadBalancerClass=OUR_CLASS), shows="203.0.113.7")
    assert desk.given("theirs") == "theirs"
    assert desk.given("ours") == "192.0.2.9"
    assert {desk.given("classed"), desk.given("marked")} == {"192.0.2.0", "192.0.2.1"}
    wish = service("named")
    desk.allocator.service(wish.key, wish, Shown((), odd=True))
    assert desk.given("named") == "theirs"


def test_counts_by_pool_and_family() -> None:
    desk = Desk(cluster=Cluster(hosts={parse("192.0.2.7"): "n1"}))
    desk.set_pools(pool("a", "192.0.2.0/28", "2001:db8::/64"), pool("b", "198.51.100.0/31"))
    desk.add(service("a", families=["IPv4", "IPv6"]), service("b", created=1))
    desk.allocator.settle()
    counts = {k.name: [(c.used, c.free) for c in v] for k, v in desk.allocator.counts().items()}
    assert counts == {"a": [(2, 13), (1, (1 << 53) - 1)], "b": [(0, 2), (0, 0)]}
    desk.set_pools(pool("a", "192.0.2.0/28", "2001:db8::/64"))
    assert desk.allocator.counts()[Key("", "a")][0].used == 2


def test_thousands_of_services_are_quick() -> None:
    """Linear: the cursor does not begin again for each."""
    desk = Desk().set_pools(pool("a", "10.0.0.0/16"))
    wishes = [service(f"s{i}") for i in range(300)]
    copies = [replace(w, key=Key(f"n{j}", w.key.name)) for j in range(20) for w in wishes]
    desk.add(*copies)
    desk.allocator.settle()
    addresses = {outcome.addresses for outcome in desk.allocator.outcomes.values()}
    assert len(addresses) == 6000


# Any sequence of events

NAMES = st.sampled_from([(f"s{i}", ns) for i in range(6) for ns in ("shop", "bank")])
ADDRESSES = [f"192.0.2.{i}" for i in range(8)] + ["2001:db8::1", "2001:db8::2"]
BLOCKS = [["192.0.2.0/30"], ["192.0.2.0-192.0.2.5"], ["192.0.2.2/31", "2001:db8::/126"], []]


class Events(RuleBasedStateMachine):
    """Statuses are written as decided, between any two events or not."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk(cluster=Cluster(hosts={parse("192.0.2.3"): "n1"}))
        self.clock = 0

    @rule(
        which=NAMES,
        families=st.sampled_from([["IPv4"], ["IPv6"], ["IPv4", "IPv6"]]),
        ips=st.lists(st.sampled_from(ADDRESSES), max_size=2).map(",".join),
        sharing_key=st.sampled_from(["", "", "k", "m"]),
        sharing_namespaces=st.sampled_from(["", "*"]),
        port=st.sampled_from(["80/TCP", "443/TCP", "80/UDP"]),
        policy=st.sampled_from(["Cluster", "Cluster", "Local"]),
        app=st.sampled_from(["x", "y"]),
        our_class=st.booleans(),
    )
    def put(self, which: tuple[str, str], port: str, app: str, our_class: bool, **f: Any) -> None:
        name, namespace = which
        known = self.desk.wishes.get(Key(namespace, name))
        self.clock += 1
        created = int(known.created[17:19]) if known else self.clock % 60
        extra = {"loadBalancerClass": OUR_CLASS} if our_class else {}
        wish = service(
            name, namespace, created, ports=[port], labels={"app": app}, **f, **extra
        )  # fmt: skip
        self.desk.add(wish)

    @rule(which=NAMES)
    def remove(self, which: tuple[str, str]) -> None:
        name, namespace = which
        wish = self.desk.wishes.get(Key(namespace, name))
        if wish is not None:
            self.desk.remove(wish)

    @rule(first=st.sampled_from(BLOCKS), second=st.sampled_from(BLOCKS), auto=st.booleans())
    def pools(self, first: list[str], second: list[str], auto: bool) -> None:
        selected = {"matchLabels": {"app": "x"}}
        self.desk.set_pools(
            pool("a", *first), pool("b", *second, created=2, autoAssign=auto),
            pool("c", "192.0.2.6/31", created=3, serviceSelector=selected),
        )  # fmt: skip

    @rule()
    def replica(self) -> None:
        """Another one leads now: nothing changes."""
        before = self.desk.statuses()
        self.desk = self.desk.anew()
        assert self.desk.statuses() == before

    @invariant()
    def settles(self) -> None:
        desk = self.desk
        before = desk.statuses()
        assert desk.allocator.settle() == set()
        assert desk.statuses() == before

    @invariant()
    def no_address_is_given_twice(self) -> None:
        holders: dict[bytes, list[Wish]] = {}
        for key, addresses in self.desk.statuses().items():
            for addr in addresses or ():
                holders.setdefault(addr, []).append(self.desk.wishes[key])
        for wishes in holders.values():
            for i, one in enumerate(wishes):
                assert not any(share(one, other) for other in wishes[i + 1 :])

    @invariant()
    def only_what_a_pool_for_it_has(self) -> None:
        for key, addresses in self.desk.statuses().items():
            for addr in addresses or ():
                assert self._usable(self.desk.wishes[key], addr)

    @invariant()
    def who_lacks_one_could_not_have_one(self) -> None:
        taken = {addr for addresses in self.desk.statuses().values() for addr in addresses or ()}
        for key, addresses in self.desk.statuses().items():
            wish = self.desk.wishes[key]
            if addresses is None:
                continue
            for ipv4 in wish.families:
                if any(is_ipv4(addr) == ipv4 for addr in addresses):
                    continue
                assert self.desk.outcome(key.name, key.namespace).problems
                asked = [addr for addr in wish.requested if is_ipv4(addr) == ipv4]
                for word in ADDRESSES:
                    addr = parse(word)
                    if is_ipv4(addr) != ipv4 or addr in taken:
                        continue
                    if not asked or addr in asked:
                        assert not self._usable(wish, addr, auto=not asked)

    @invariant()
    def counts_agree(self) -> None:
        taken = {addr for addresses in self.desk.statuses().values() for addr in addresses or ()}
        counted = sum(c.used for pair in self.desk.allocator.counts().values() for c in pair)
        assert counted == len(taken)

    def _usable(self, wish: Wish, addr: Any, auto: bool = False) -> bool:
        return any(
            one.pool.has(number(addr)) and addr not in one.excluded
            and one.pool.selects(dict(wish.labels), None) and (one.pool.auto_assign or not auto)
            for one in self.desk.judged.values()
        )  # fmt: skip


Events.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestEvents = Events.TestCase
