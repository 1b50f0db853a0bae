# SPDX-License-Identifier: Apache-2.0
"""The table of NetworkPolicies that the text of the specification implies, for the matrix.

A row says what varies; what follows from it, the oracle says. Each form of a selector stands in
each place that has one, each form of ports and of blocks in each direction, and then come what is
empty or absent, the defaults of policyTypes, and several policies at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from e2e.suite.arena import PORTS, SPACES, Arena
from e2e.suite.kubectl import Manifest, get

Selector = dict[str, Any]
FIRST, SECOND = PORTS


@dataclass(frozen=True, slots=True)
class Row:
    """`make` gives the policies; it is called when the addresses are known."""

    id: str
    make: Callable[[Arena], list[Manifest]]


def has(**labels: str) -> Selector:
    return {"matchLabels": labels}


def where(*expressions: tuple[str, str, list[str] | None], **labels: str) -> Selector:
    found = [
        {"key": key, "operator": operator, **({} if values is None else {"values": values})}
        for key, operator, values in expressions
    ]
    return {"matchExpressions": found, **({"matchLabels": labels} if labels else {})}


POD_SELECTORS: dict[str, Selector] = {
    "empty": {},
    "empty-fields": {"matchLabels": {}, "matchExpressions": []},
    "label": has(pod="a"),
    "two-labels": has(pod="b", tier="back"),
    "two-labels-of-different-pods": has(pod="a", tier="back"),
    "no-such-value": has(pod="nobody"),
    "no-such-key": has(nothing="a"),
    "empty-value": has(extra=""),
    "in-one": where(("pod", "In", ["b"])),
    "in-two": where(("pod", "In", ["a", "c"])),
    "in-nobody": where(("pod", "In", ["nobody"])),
    "in-empty-value": where(("extra", "In", [""])),
    "not-in": where(("tier", "NotIn", ["front"])),  # and those without the key
    "not-in-two": where(("tier", "NotIn", ["front", "back"])),
    "not-in-nobody": where(("pod", "NotIn", ["nobody"])),
    "exists": where(("tier", "Exists", None)),
    "exists-with-empty-value": where(("extra", "Exists", None)),
    "does-not-exist": where(("tier", "DoesNotExist", None)),
    "label-and-expression": where(("tier", "Exists", None), pod="a"),
    "two-expressions": where(("tier", "Exists", None), ("pod", "NotIn", ["a"])),
    "contradiction": where(("tier", "Exists", None), ("tier", "DoesNotExist", None)),
    "one-key-twice": where(("pod", "In", ["a", "b"]), ("pod", "NotIn", ["b"])),
}
SPACE_SELECTORS: dict[str, Selector] = {
    "empty": {},
    "label": has(team="red"),
    "two-labels": has(team="red", ns="y"),
    "no-such-value": has(team="nobody"),
    "empty-value": has(extra=""),
    "in": where(("ns", "In", ["y", "z"])),
    "not-in": where(("team", "NotIn", ["red"]), ("ns", "Exists", None)),
    "exists": where(("team", "Exists", None)),
    "does-not-exist": where(("team", "DoesNotExist", None)),
    "label-and-expression": where(("ns", "NotIn", ["x"]), team="red"),
}
DIRECTIONS = {"ingress": "from", "egress": "to"}


def rule(direction: str, peers: list[Manifest] | None, ports: list[Manifest] | None = None) -> Any:
    """A rule; None leaves the field out."""
    found: Manifest = {} if peers is None else {DIRECTIONS[direction]: peers}
    return found if ports is None else {**found, "ports": ports}


def policy(arena: Arena, space: str, name: str, spec: Manifest) -> Manifest:
    meta = {"name": name, "namespace": arena.spaces[space]}
    api = "networking.k8s.io/v1"
    return {"apiVersion": api, "kind": "NetworkPolicy", "metadata": meta, "spec": spec}


def one(ident: str, spec: Manifest | Callable[[Arena], Manifest], space: str = "x") -> Row:
    """A row of a single policy."""

    def make(arena: Arena) -> list[Manifest]:
        return [policy(arena, space, "row", spec(arena) if callable(spec) else spec)]

    return Row(ident, make)


def isolates(direction: str, subject: Selector, rules: list[Manifest]) -> Manifest:
    return {
        "podSelector": subject, "policyTypes": [direction.capitalize()], direction: rules
    }  # fmt: skip


def selector_rows() -> Iterator[Row]:
    """Each selector as subject, as pods and namespaces of a peer, and both in one peer."""
    for direction in DIRECTIONS:
        for name, selector in POD_SELECTORS.items():
            yield one(f"{direction}-subject-{name}", isolates(direction, selector, []))
            rules = [rule(direction, [{"podSelector": selector}])]
            yield one(f"{direction}-pods-{name}", isolates(direction, {}, rules))
        for name, selector in SPACE_SELECTORS.items():
            rules = [rule(direction, [{"namespaceSelector": selector}])]
            yield one(f"{direction}-namespaces-{name}", isolates(direction, {}, rules))
        for spaces, pods in [
            ("empty", "empty"), ("empty", "label"), ("label", "empty"), ("label", "not-in"),
            ("does-not-exist", "label"), ("not-in", "exists"), ("no-such-value", "empty"),
            ("in", "in-two"),
        ]:  # fmt: skip
            peer = {
                "namespaceSelector": SPACE_SELECTORS[spaces], "podSelector": POD_SELECTORS[pods]
            }  # fmt: skip
            rules = [rule(direction, [peer])]
            yield one(
                f"{direction}-namespaces-{spaces}-pods-{pods}", isolates(direction, {}, rules)
            )
        own_name = isolates_by_name(direction)
        yield one(f"{direction}-namespaces-by-name", own_name)


def isolates_by_name(direction: str) -> Callable[[Arena], Manifest]:
    def make(arena: Arena) -> Manifest:
        selector = has(**{"kubernetes.io/metadata.name": arena.spaces["y"]})
        return isolates(direction, {}, [rule(direction, [{"namespaceSelector": selector}])])

    return make


PORT_FORMS: dict[str, list[Manifest]] = {
    "empty-list": [],
    "number": [{"port": FIRST}],  # TCP is the default
    "number-tcp": [{"port": SECOND, "protocol": "TCP"}],
    "number-udp": [{"port": FIRST, "protocol": "UDP"}],
    "protocol-alone-tcp": [{"protocol": "TCP"}],
    "protocol-alone-udp": [{"protocol": "UDP"}],
    "sctp-alone": [{"protocol": "SCTP"}],
    "nothing-in-it": [{}],
    "name": [{"port": "web"}],  # another number in each pod
    "name-udp": [{"port": "dns", "protocol": "UDP"}],
    "name-of-the-other-protocol": [{"port": "web", "protocol": "UDP"}],
    "unknown-name": [{"port": "nothing"}],
    "range": [{"port": 8000, "endPort": 8089}],
    "range-of-one": [{"port": SECOND, "endPort": SECOND}],
    "range-of-both": [{"port": FIRST, "endPort": SECOND, "protocol": "UDP"}],
    "range-of-all": [{"port": 1, "endPort": 65535}],
    "range-of-neither": [{"port": FIRST + 1, "endPort": SECOND - 1}],
    "number-and-name": [{"port": FIRST, "protocol": "UDP"}, {"port": "web"}],
    "two-protocols": [{"port": FIRST}, {"port": SECOND, "protocol": "UDP"}],
    "protocol-beside-number": [{"port": FIRST}, {"protocol": "TCP"}],
}


def port_rows() -> Iterator[Row]:
    """Each form of ports, from everybody and from some."""
    for direction in DIRECTIONS:
        for name, ports in PORT_FORMS.items():
            rules = [rule(direction, None, ports)]
            yield one(f"{direction}-ports-{name}", isolates(direction, {}, rules))
        some = [{"namespaceSelector": has(ns="y")}]
        for name in ("number", "name", "range", "protocol-alone-udp"):
            rules = [rule(direction, some, PORT_FORMS[name])]
            yield one(f"{direction}-ports-{name}-of-some", isolates(direction, {}, rules))
        rules = [
            rule(direction, [{"podSelector": has(pod="a")}], PORT_FORMS["number"]),
            rule(direction, some, PORT_FORMS["number-udp"]),
            rule(direction, [{"namespaceSelector": has(ns="z")}], PORT_FORMS["name"]),
        ]
        yield one(f"{direction}-ports-by-rule", isolates(direction, {}, rules))


def host(arena: Arena, name: str, family: int) -> str:
    return f"{arena.address(name, family)}/{128 if family == 6 else 32}"


def everywhere(family: int) -> str:
    return "::/0" if family == 6 else "0.0.0.0/0"


def block(cidr: str, *holes: str) -> Manifest:
    return {"ipBlock": {"cidr": cidr, **({"except": list(holes)} if holes else {})}}


def hosts(arena: Arena, *names: str) -> list[Manifest]:
    return [block(host(arena, name, family)) for name in names for family in arena.families]


def around(arena: Arena, *holes: str) -> list[Manifest]:
    """All addresses but those of some."""
    return [
        block(everywhere(family), *(host(arena, name, family) for name in holes))
        for family in arena.families
    ]


def pod_ranges(node: int) -> list[Manifest]:
    items = get("nodes")["items"]
    spec = items[min(node, len(items) - 1)]["spec"]
    return [block(cidr) for cidr in spec.get("podCIDRs", [])]


def first_family(arena: Arena) -> list[Manifest]:
    return [block(everywhere(arena.families[0]))]


BLOCK_FORMS: dict[str, Callable[[Arena], list[Manifest]]] = {
    "everything": around,
    "one-family": first_family,
    "one-pod": lambda arena: hosts(arena, "y/b"),
    "three-pods": lambda arena: hosts(arena, "y/b", "x/c", "z/a"),
    "a-node": lambda arena: hosts(arena, "host-1"),
    "pods-of-a-node": lambda arena: pod_ranges(0),
    "pods-of-both-nodes": lambda arena: pod_ranges(0) + pod_ranges(1),
    "nobody": lambda arena: [block("192.0.2.0/24"), block("2001:db8::/64")],
    "except-one": lambda arena: around(arena, "y/a"),
    "except-several": lambda arena: around(arena, "y/a", "y/b", "z/c", "host-1"),
    "except-all-of-it": lambda arena: [
        block("0.0.0.0/0", "0.0.0.0/1", "128.0.0.0/1"), block("::/0", "::/1", "8000::/1")
    ],
    # What one block leaves out another may name, and a hole in a hole does not exist.
    "except-and-again": lambda arena: around(arena, "y/a", "y/b") + hosts(arena, "y/a"),
    "two-with-holes": lambda arena: around(arena, "y/a") + around(arena, "y/b"),
    "same-hole-twice": lambda arena: around(arena, "y/a", "z/b") + around(arena, "y/a"),
    "except-pods-of-a-node": lambda arena: [
        block(everywhere(6 if ":" in b["ipBlock"]["cidr"] else 4), b["ipBlock"]["cidr"])
        for b in pod_ranges(1)
    ],
    "beside-pods": lambda arena: [*hosts(arena, "y/b"), {"podSelector": has(pod="a")}],
    "except-beside-its-pods": lambda arena: [
        *around(arena, "y/a", "y/b"), {"namespaceSelector": has(ns="y"), "podSelector": {}}
    ],
}  # fmt: skip


def block_rows() -> Iterator[Row]:
    """Each form of blocks; pods are within them as everything else is."""
    for direction in DIRECTIONS:
        for name, form in BLOCK_FORMS.items():
            yield one(f"{direction}-block-{name}", with_blocks(direction, form, None))
        for name in ("everything", "except-one", "three-pods"):
            yield one(
                f"{direction}-block-{name}-ports",
                with_blocks(direction, BLOCK_FORMS[name], PORT_FORMS["two-protocols"]),
            )


def with_blocks(
    direction: str, form: Callable[[Arena], list[Manifest]], ports: list[Manifest] | None
) -> Callable[[Arena], Manifest]:
    return lambda arena: isolates(direction, {}, [rule(direction, form(arena), ports)])


def absent_rows() -> Iterator[Row]:
    """Empty is not absent: policyTypes, rules, peers and ports."""
    a = [{"podSelector": has(pod="a")}]
    subject: Manifest = {"podSelector": has(pod="b")}
    forms: dict[str, Manifest] = {
        "types-absent-no-rules": {},
        "types-absent-ingress": {"ingress": [{"from": a}]},
        "types-absent-empty-ingress": {"ingress": []},
        "types-absent-egress": {"egress": [{"to": a}]},  # and, without rules, ingress too
        "types-absent-empty-egress": {"egress": []},
        "types-absent-both": {"ingress": [{"from": a}], "egress": [{"to": a}]},
        "types-empty": {"policyTypes": [], "egress": [{"to": a}]},
        "types-ingress-no-rules": {"policyTypes": ["Ingress"]},
        "types-egress-no-rules": {"policyTypes": ["Egress"]},
        "types-both-no-rules": {"policyTypes": ["Ingress", "Egress"]},
        "types-ingress-with-egress-rules": {
            "policyTypes": ["Ingress"], "ingress": [{"from": a}], "egress": [{"to": a}]
        },
        "types-egress-with-ingress-rules": {
            "policyTypes": ["Egress"], "ingress": [{"from": a}], "egress": [{"to": a}]
        },
        "types-both-ingress-rule": {"policyTypes": ["Egress", "Ingress"], "ingress": [{}]},
        "types-both-egress-rule": {"policyTypes": ["Egress", "Ingress"], "egress": [{}]},
        "empty-rule-in": {"policyTypes": ["Ingress"], "ingress": [{}]},
        "empty-rule-out": {"policyTypes": ["Egress"], "egress": [{}]},
        "empty-from": {"policyTypes": ["Ingress"], "ingress": [{"from": []}]},
        "empty-to": {"policyTypes": ["Egress"], "egress": [{"to": []}]},
        "empty-from-and-ports": {"ingress": [{"from": [], "ports": []}]},
        "empty-from-with-port": {"ingress": [{"from": [], "ports": [{"port": FIRST}]}]},
        "empty-rule-beside-another": {"ingress": [{"from": a}, {}]},
        "empty-selector-of-the-peer": {"ingress": [{"from": [{"podSelector": {}}]}]},
        "empty-namespaces-of-the-peer": {"ingress": [{"from": [{"namespaceSelector": {}}]}]},
    }  # fmt: skip
    for name, fields in forms.items():
        yield one(f"absent-{name}", {**subject, **fields})
    yield Row("absent-no-policy", lambda arena: [])


def many(*parts: tuple[str, str, Manifest]) -> Callable[[Arena], list[Manifest]]:
    """Policies as (namespace, name, spec)."""
    return lambda arena: [policy(arena, *part) for part in parts]


def several_rows() -> Iterator[Row]:
    """Policies add up, and both ends must allow."""
    deny_in, deny_out = isolates("ingress", {}, []), isolates("egress", {}, [])
    open_in, open_out = isolates("ingress", {}, [{}]), isolates("egress", {}, [{}])
    from_a = isolates("ingress", has(pod="b"), [{"from": [{"podSelector": has(pod="a")}]}])
    from_y = isolates("ingress", where(("pod", "In", ["b", "c"])),
                      [{"from": [{"namespaceSelector": has(ns="y")}]}])  # fmt: skip
    to_z = isolates("egress", {}, [{"to": [{"namespaceSelector": has(ns="z")}]}])
    tcp = isolates("ingress", {}, [{"ports": PORT_FORMS["number"]}])
    udp = isolates("ingress", {}, [{"ports": PORT_FORMS["number-udp"]}])
    yield Row("several-deny-and-allow", many(("x", "one", deny_in), ("x", "two", open_in)))
    yield Row("several-deny-and-some", many(("x", "one", deny_in), ("x", "two", from_a)))
    yield Row("several-overlapping", many(("x", "one", from_a), ("x", "two", from_y)))
    yield Row("several-ports-add-up", many(("x", "one", tcp), ("x", "two", udp)))
    yield Row("several-same-name", many(("x", "row", deny_in), ("y", "row", deny_out)))
    yield Row("several-both-directions", many(("x", "one", deny_in), ("x", "two", deny_out)))
    yield Row("several-both-ends", many(("x", "in", from_y), ("y", "out", to_z)))
    yield Row("several-open-both-ends", many(("x", "in", open_in), ("y", "out", open_out)))
    yield Row("several-egress-into-ingress", many(("x", "out", to_z), ("z", "in", tcp)))
    yield Row(
        "several-everybody-denied",
        many(*((space, direction, isolates(direction, {}, []))
               for space in SPACES for direction in DIRECTIONS)),
    )  # fmt: skip
    yield Row("several-everybody-only-their-own", many(*(
        (space, direction, isolates(direction, {}, [rule(direction, [{"podSelector": {}}])]))
        for space in SPACES for direction in DIRECTIONS
    )))  # fmt: skip
    yield Row("several-ten-of-one-pod", many(*(
        ("x", f"row-{number}", isolates("ingress", has(pod="a"), [
            {"from": [{"namespaceSelector": has(ns="z")}], "ports": [{"port": 8083 + number}]}
        ]))
        for number in range(10)
    )))  # fmt: skip
    yield Row("several-blocks-and-pods", lambda arena: [
        policy(arena, "x", "blocks", isolates("ingress", {}, [{"from": around(arena, "y/b")}])),
        policy(arena, "x", "pods", isolates("ingress", has(pod="a"), [
            {"from": [{"namespaceSelector": has(ns="y")}], "ports": PORT_FORMS["name"]}
        ])),
        policy(arena, "y", "out", isolates("egress", {}, [
            {"to": hosts(arena, "x/a", "x/c"), "ports": PORT_FORMS["range"]}
        ])),
    ])  # fmt: skip


ROWS: list[Row] = [
    *absent_rows(), *selector_rows(), *port_rows(), *block_rows(), *several_rows()
]  # fmt: skip
