# SPDX-License-Identifier: Apache-2.0
"""The table of ClusterNetworkPolicies for the matrix, alone and above and below NetworkPolicies.

Subjects never are pods of others: where a row's subject is all namespaces, its peers are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from e2e.suite.arena import HOST_PORTS, PORTS, Arena, cluster_policy
from e2e.suite.kubectl import Manifest
from e2e.suite.policy_rows import (
    DIRECTIONS,
    POD_SELECTORS,
    SPACE_SELECTORS,
    Row,
    Selector,
    everywhere,
    has,
    host,
    isolates,
    pod_ranges,
    policy,
    where,
)

FIRST, SECOND = PORTS
Make = Callable[[Arena], list[Manifest]]


def spaces(**labels: str) -> Manifest:
    return {"namespaces": has(**labels)}


def pods(space: Selector, pod: Selector) -> Manifest:
    return {"pods": {"namespaceSelector": space, "podSelector": pod}}


X, Y, Z = spaces(ns="x"), spaces(ns="y"), spaces(ns="z")
OURS = {"namespaces": where(("ns", "In", ["x", "y", "z"]))}
ANYBODY: Manifest = {"namespaces": {}}


def rule(
    direction: str, action: str, *peers: Manifest, protocols: list[Manifest] | None = None
) -> Manifest:
    found = {"action": action, DIRECTIONS[direction]: list(peers)}
    return found if protocols is None else {**found, "protocols": protocols}


def cluster(
    arena: Arena, name: str, tier: str, priority: int, subject: Manifest, **rules: Any
) -> Manifest:
    spec = {"tier": tier, "priority": priority, "subject": subject, **rules}
    return cluster_policy(f"weir-matrix-{arena.run}-{name}", spec)


def port(protocol: str, number: int, end: int | None = None) -> Manifest:
    match = {"number": number} if end is None else {"range": {"start": number, "end": end}}
    return {protocol: {"destinationPort": match}}


def one(
    ident: str,
    direction: str,
    *rules: Manifest,
    subject: Manifest = X,
    tier: str = "Admin",
    below: Manifest | None = None,
) -> Row:
    """A row of a single policy, above a NetworkPolicy of namespace x if one is given."""

    def make(arena: Arena) -> list[Manifest]:
        made = [cluster(arena, "row", tier, 10, subject, **{direction: list(rules)})]
        return made if below is None else [*made, policy(arena, "x", "below", below)]

    return Row(f"cluster-{ident}", make)


def selector_rows() -> Iterator[Row]:
    for direction in DIRECTIONS:
        closed = isolates(direction, {}, [])
        for name, selector in SPACE_SELECTORS.items():
            peer = {"namespaces": selector}
            yield one(f"{direction}-deny-namespaces-{name}", direction,
                      rule(direction, "Deny", peer))  # fmt: skip
        for name, selector in POD_SELECTORS.items():
            peer = pods(SPACE_SELECTORS["exists"], selector)
            if direction == "ingress":
                subject = pods(has(ns="x"), selector)
                yield one(f"subject-pods-{name}", direction, rule(direction, "Deny", Y),
                          subject=subject)  # fmt: skip
            yield one(f"{direction}-accept-pods-{name}", direction,
                      rule(direction, "Accept", peer), below=closed)  # fmt: skip
        for name in ("empty", "label", "not-in", "does-not-exist", "in"):
            yield one(f"{direction}-subject-namespaces-{name}", direction,
                      rule(direction, "Deny", X),
                      subject={"namespaces": SPACE_SELECTORS[name]})  # fmt: skip
        yield one(f"{direction}-two-peers", direction,
                  rule(direction, "Deny", Y, pods({}, has(pod="c"))))  # fmt: skip
        yield one(f"{direction}-everybody", direction, rule(direction, "Deny", ANYBODY))


PROTOCOLS: dict[str, list[Manifest]] = {
    "tcp": [port("tcp", FIRST)],
    "udp": [port("udp", SECOND)],
    "sctp": [port("sctp", FIRST)],
    "range": [port("tcp", 8000, 8089)],
    "range-of-both": [port("udp", FIRST, SECOND)],
    "range-of-all": [port("tcp", 1, 65535)],
    "two": [port("tcp", FIRST), port("udp", SECOND)],
    "name": [{"destinationNamedPort": "web"}],  # another number in each pod
    "name-udp": [{"destinationNamedPort": "dns"}],
    "unknown-name": [{"destinationNamedPort": "nothing"}],
    "name-and-number": [{"destinationNamedPort": "web"}, port("udp", FIRST)],
}


def protocol_rows() -> Iterator[Row]:
    for direction in DIRECTIONS:
        for name, protocols in PROTOCOLS.items():
            denied = rule(direction, "Deny", ANYBODY, protocols=protocols)
            yield one(f"{direction}-deny-protocols-{name}", direction, denied)
        for name in ("two", "name"):
            accepted = rule(direction, "Accept", Y, protocols=PROTOCOLS[name])
            yield one(f"{direction}-accept-protocols-{name}", direction, accepted,
                      rule(direction, "Deny", ANYBODY))  # fmt: skip


def order_rows() -> Iterator[Row]:
    """Rules in their order, policies by priority, tiers around the NetworkPolicies."""
    for direction in DIRECTIONS:
        accept, deny, passed = (rule(direction, a, Y) for a in ("Accept", "Deny", "Pass"))
        closed, opened = isolates(direction, {}, []), isolates(direction, {}, [{}])
        some = isolates(
            direction, {}, [{DIRECTIONS[direction]: [{"namespaceSelector": has(ns="z")}]}]
        )
        yield one(f"{direction}-accept-before-deny", direction, accept, deny)
        yield one(f"{direction}-deny-before-accept", direction, deny, accept, below=opened)
        yield one(f"{direction}-pass-before-deny", direction, passed, deny)
        yield one(f"{direction}-pass-before-accept", direction, passed, accept, below=closed)
        yield one(f"{direction}-accept-over-closed", direction, accept, below=closed)
        yield one(f"{direction}-deny-over-open", direction, deny, below=opened)
        yield one(f"{direction}-pass-to-closed", direction, passed, below=closed)
        yield one(f"{direction}-pass-to-open", direction, passed, below=opened)
        yield one(f"{direction}-no-match-to-some", direction, deny, below=some)
        for action in ("Accept", "Deny", "Pass"):
            decided = rule(direction, action, Y)
            for name, below in (("nothing", None), ("closed", closed), ("some", some)):
                yield one(f"{direction}-baseline-{action.lower()}-{name}", direction, decided,
                          tier="Baseline", below=below)  # fmt: skip
        yield one(f"{direction}-baseline-pass-before-deny", direction, passed,
                  rule(direction, "Deny", ANYBODY), tier="Baseline")  # fmt: skip
        # A NetworkPolicy of the other direction leaves this one to the baseline.
        other = isolates("egress" if direction == "ingress" else "ingress", {}, [{}])
        yield one(f"{direction}-baseline-other-direction", direction, deny,
                  tier="Baseline", below=other)  # fmt: skip
        yield from priority_rows(direction)


def priority_rows(direction: str) -> Iterator[Row]:
    def of(name: str, tier: str, priority: int, *rules: Manifest) -> Callable[[Arena], Manifest]:
        return lambda arena: cluster(arena, name, tier, priority, X, **{direction: list(rules)})

    def all_of(ident: str, *made: Callable[[Arena], Manifest]) -> Row:
        return Row(f"cluster-{direction}-{ident}", lambda arena: [m(arena) for m in made])

    accept, deny, passed = (rule(direction, a, Y) for a in ("Accept", "Deny", "Pass"))
    everybody = rule(direction, "Deny", ANYBODY)
    closed = isolates(direction, {}, [])
    yield all_of("priority-accept-first",
                 of("b", "Admin", 10, accept), of("a", "Admin", 20, everybody))  # fmt: skip
    yield all_of("priority-deny-first",
                 of("b", "Admin", 20, accept), of("a", "Admin", 10, deny))  # fmt: skip
    yield all_of("priority-by-number-not-text",
                 of("b", "Admin", 9, accept), of("a", "Admin", 10, everybody))  # fmt: skip
    yield all_of("priority-highest-and-lowest",
                 of("b", "Admin", 1, accept), of("a", "Admin", 1000, everybody))  # fmt: skip
    yield all_of("priority-equal-by-name",
                 of("a", "Admin", 5, accept), of("b", "Admin", 5, everybody))  # fmt: skip
    yield all_of("pass-skips-the-tier",
                 of("a", "Admin", 1, passed), of("b", "Admin", 2, everybody),
                 of("c", "Baseline", 1, rule(direction, "Accept", Y)))  # fmt: skip
    yield all_of("pass-to-the-baseline",
                 of("a", "Admin", 1, passed), of("b", "Baseline", 1, deny))  # fmt: skip
    yield all_of("admin-before-baseline",
                 of("a", "Admin", 1000, accept), of("b", "Baseline", 0, everybody))  # fmt: skip
    yield all_of("baseline-priorities",
                 of("b", "Baseline", 1, accept), of("a", "Baseline", 2, everybody))  # fmt: skip
    yield all_of("three-tiers",
                 of("a", "Admin", 1, passed, rule(direction, "Accept", Z)),
                 of("b", "Baseline", 1, everybody),
                 lambda arena: policy(arena, "x", "below", closed))  # fmt: skip
    yield all_of("three-tiers-by-port",
                 of("a", "Admin", 1,
                    rule(direction, "Deny", ANYBODY, protocols=PROTOCOLS["tcp"]),
                    rule(direction, "Accept", ANYBODY, protocols=PROTOCOLS["udp"])),
                 of("b", "Baseline", 1, everybody))  # fmt: skip


def address_rows() -> Iterator[Row]:
    """networks and nodes, which only egress rules have."""

    def networks(arena: Arena, *names: str) -> Manifest:
        return {"networks": [host(arena, n, f) for n in names for f in arena.families]}

    def everything(arena: Arena) -> Manifest:
        return {"networks": [everywhere(family) for family in arena.families]}

    def ranges(arena: Arena) -> Manifest:
        del arena
        return {"networks": [b["ipBlock"]["cidr"] for b in pod_ranges(1)]}

    def row(ident: str, *rules: Callable[[Arena], Manifest], below: Manifest | None = None) -> Row:
        def make(arena: Arena) -> list[Manifest]:
            made = [cluster(arena, "row", "Admin", 10, X, egress=[r(arena) for r in rules])]
            return made if below is None else [*made, policy(arena, "x", "below", below)]

        return Row(f"cluster-egress-{ident}", make)

    def deny(make: Callable[[Arena], Manifest], protocols: list[Manifest] | None = None
             ) -> Callable[[Arena], Manifest]:  # fmt: skip
        return lambda arena: rule("egress", "Deny", make(arena), protocols=protocols)

    def accept(make: Callable[[Arena], Manifest]) -> Callable[[Arena], Manifest]:
        return lambda arena: rule("egress", "Accept", make(arena))

    def nodes(selector: Selector) -> Callable[[Arena], Manifest]:
        return lambda arena: {"nodes": selector}

    def first_node(arena: Arena) -> Manifest:
        return {"nodes": has(**{"kubernetes.io/hostname": arena.probes["host-1"].node})}

    def no_node(arena: Arena) -> Manifest:
        del arena
        return {"nodes": has(**{"kubernetes.io/hostname": "nobody"})}

    closed = isolates("egress", {}, [])
    yield row("networks-everything", deny(everything))
    yield row("networks-one-pod", deny(lambda arena: networks(arena, "y/b")))
    yield row("networks-three-pods", deny(lambda arena: networks(arena, "y/b", "x/c", "z/a")))
    yield row("networks-pods-of-a-node", deny(ranges))
    yield row("networks-a-node", deny(lambda arena: networks(arena, "host-1")))
    yield row("networks-hole", accept(lambda arena: networks(arena, "y/b")), deny(everything))
    yield row(
        "networks-accept-closed", accept(lambda a: networks(a, "y/b", "host-1")), below=closed
    )
    yield row("networks-ports", deny(everything, PROTOCOLS["two"]))
    yield row("networks-pods-first", lambda a: rule("egress", "Pass", ANYBODY), deny(everything))
    yield row("nodes-all", deny(nodes({})))
    yield row("nodes-one", deny(first_node))
    yield row("nodes-none", deny(no_node))
    yield row("nodes-exists", deny(nodes(where(("kubernetes.io/hostname", "Exists", None)))))
    yield row(
        "nodes-not-exists", deny(nodes(where(("kubernetes.io/hostname", "DoesNotExist", None))))
    )
    yield row("nodes-ports", deny(nodes({}), [port("tcp", HOST_PORTS[0])]))
    yield row("nodes-accept-before-networks", accept(first_node), deny(everything))
    yield row("nodes-accept-closed", accept(nodes({})), below=closed)


def other_rows() -> Iterator[Row]:
    yield Row("cluster-no-rules", lambda arena: [cluster(arena, "row", "Admin", 10, X)])
    yield Row("cluster-both-directions", lambda arena: [
        cluster(arena, "row", "Admin", 10, X,
                ingress=[rule("ingress", "Deny", Y)], egress=[rule("egress", "Deny", Z)])
    ])  # fmt: skip
    yield Row("cluster-both-ends", lambda arena: [
        cluster(arena, "in", "Admin", 10, X, ingress=[rule("ingress", "Accept", Y)]),
        cluster(arena, "out", "Admin", 20, Y, egress=[rule("egress", "Deny", X)]),
    ])  # fmt: skip
    yield Row("cluster-accept-in-closed-out", lambda arena: [
        cluster(arena, "in", "Admin", 10, X, ingress=[rule("ingress", "Accept", ANYBODY)]),
        policy(arena, "y", "out", isolates("egress", {}, [])),
    ])  # fmt: skip
    yield Row("cluster-isolated-namespaces", lambda arena: [
        cluster(arena, space, "Admin", 10 + number, subject,
                ingress=[rule("ingress", "Accept", subject), rule("ingress", "Deny", OURS)])
        for number, (space, subject) in enumerate((("x", X), ("y", Y), ("z", Z)))
    ])  # fmt: skip
    yield Row("cluster-25-rules", lambda arena: [
        cluster(arena, "row", "Admin", 10, OURS, ingress=[
            *(rule("ingress", "Accept", Y, protocols=[port("tcp", 8067 + n)]) for n in range(24)),
            rule("ingress", "Deny", ANYBODY),
        ])
    ])  # fmt: skip


ROWS: list[Row] = [
    *selector_rows(),
    *protocol_rows(),
    *order_rows(),
    *address_rows(),
    *other_rows(),
]
