# SPDX-License-Identifier: Apache-2.0
"""The compiler at size. What is asserted is that the cost follows the change; times are printed."""

from __future__ import annotations

import time
from dataclasses import replace

from weir.api.address import V4_PREFIX, Addr, parse_cidr
from weir.operator.compiler import Compiler
from weir.operator.objects import Key, Namespace, Node, Pod
from weir.operator.policy import Action, NetworkPolicy, Rule, Tier
from weir.operator.revisions import Revisions
from weir.operator.selectors import (
    EVERYTHING,
    InNamespace,
    InNamespaces,
    IpBlock,
    Operator,
    Pods,
    Requirement,
    label_selector,
)
from weir.operator.selectors import Nodes as NodeSelector

PODS = 100_000
NAMESPACES = 200
APPS = 50


def app(name: str) -> Requirement:
    return Requirement("app", Operator.IN, (name,))


def pod(i: int) -> Pod:
    namespace, number = f"ns{i % NAMESPACES}", i // NAMESPACES
    return Pod(
        key=Key(namespace, f"pod{i}"),
        uid=f"00000000-0000-0000-0000-{i:012d}",
        created="",
        labels=(("app", f"app{number % APPS}"), ("pod-template-hash", f"h{number % APPS}")),
        node=f"node{i % 1000}",
        live=True,
        addresses=(Addr(V4_PREFIX + (0x0A000000 + i).to_bytes(4, "big")),),
        ports=(),
    )


def policy(namespace: str, name: str, *peers: Pods | IpBlock) -> NetworkPolicy:
    subject = Pods(InNamespace(namespace), label_selector(app(name)))
    return NetworkPolicy(
        Key(namespace, name), subject, True, False, (Rule(False, 0, tuple(peers), ()),)
    )


def timed(what: str, compiler: Compiler, revisions: Revisions) -> int:
    started = time.perf_counter()
    news = revisions.publish(compiler.flush())
    print(f"{what}: {news} resources in {(time.perf_counter() - started) * 1e3:.1f} ms")
    return news


async def test_a_hundred_thousand_pods() -> None:
    compiler, revisions = Compiler(), Revisions("test")
    started = time.perf_counter()
    for n in range(NAMESPACES):
        labels = (("team", f"t{n % 10}"),)
        compiler.namespace(Key("", f"ns{n}"), Namespace(Key("", f"ns{n}"), labels))
        for a in range(APPS):
            made = policy(f"ns{n}", f"app{a}", Pods(InNamespace(f"ns{n}"), EVERYTHING))
            compiler.policy(made.key, made)
    for i in range(PODS):
        compiler.pod(pod(i).key, pod(i))
        if i == PODS // 2:
            print(f"50,000 pods placed after {time.perf_counter() - started:.2f} s")
    print(
        f"placed {PODS} pods, {NAMESPACES * APPS} policies: {time.perf_counter() - started:.2f} s"
    )
    timed("first compilation", compiler, revisions)
    counts = compiler.counts()
    # Each app of each namespace has its policy, and classes are of pods or of IPv4 addresses.
    assert counts["classes"] == NAMESPACES * APPS * 2

    one = pod(7)
    compiler.pod(one.key, replace(one, labels=(("app", "app1"), ("x", "y"))))
    assert timed("one pod's labels", compiler, revisions) <= 4

    wide = policy("ns0", "wide", Pods(InNamespaces(EVERYTHING), label_selector(app("app3"))))
    compiler.policy(wide.key, wide)
    # The members stay in their classes, which only learn of one more selector.
    assert timed("policy with a peer in every namespace", compiler, revisions) <= 2 * NAMESPACES + 3

    block = policy("ns0", "block", IpBlock(parse_cidr("10.0.0.0/24")))
    compiler.policy(block.key, block)
    news = timed("ipBlock over 256 pods", compiler, revisions)
    assert news <= 256 * 2 + 5
    compiler.policy(block.key, None)
    assert timed("and gone again", compiler, revisions) <= 256 * 2 + 5

    everywhere = policy("ns0", "any", IpBlock(parse_cidr("0.0.0.0/0")))
    compiler.policy(everywhere.key, everywhere)
    # Classes learn of one more selector; no address moves to another.
    assert timed("ipBlock over everything", compiler, revisions) <= NAMESPACES * APPS + 5
    compiler.policy(everywhere.key, None)
    assert timed("and gone again", compiler, revisions) <= NAMESPACES * APPS + 5

    relabelled = Namespace(Key("", "ns1"), (("team", "t9"), ("new", "label")))
    whose = Pods(InNamespaces(label_selector(Requirement("new", Operator.EXISTS))), EVERYTHING)
    fresh = policy("ns0", "fresh", whose)
    compiler.policy(fresh.key, fresh)
    timed("policy with a peer in no namespace", compiler, revisions)
    compiler.namespace(relabelled.key, relabelled)
    assert timed("a namespace's labels", compiler, revisions) <= 2 * APPS

    every_pod = Pods(InNamespaces(EVERYTHING), EVERYTHING)
    deny = Rule(False, 0, (every_pod,), (), Action.DENY)
    for i in range(2):
        cluster = NetworkPolicy(Key("", f"c{i}"), every_pod, True, False, (deny,), Tier.ADMIN, i)
        compiler.policy(cluster.key, cluster)
        # Classes learn of one more selector, once.
        most = NAMESPACES * APPS * 2 + 5 if i == 0 else 1
        assert timed("policy of the cluster for every pod", compiler, revisions) <= most

    for audit in (True, False):
        whole = Namespace(Key("", "ns2"), (("team", "t2"),), audit)
        compiler.namespace(whole.key, whole)
        assert timed("a namespace's audit mode", compiler, revisions) == PODS // NAMESPACES

    started = time.perf_counter()
    for i in range(1000):
        compiler.pod(pod(PODS + i).key, pod(PODS + i))
        revisions.publish(compiler.flush())
    print(f"a new pod each revision: {(time.perf_counter() - started):.3f} ms each")
    assert sum(len(update) for update in revisions.snapshot("node1")) > PODS * 40


def test_five_thousand_nodes() -> None:
    compiler, revisions = Compiler(), Revisions("test")

    def node(i: int, zone: str) -> Node:
        labels = (("kubernetes.io/hostname", f"node{i}"), ("zone", zone))
        return Node(
            Key("", f"node{i}"), (Addr(V4_PREFIX + i.to_bytes(4, "big")),), (), labels=labels
        )

    for i in range(5000):
        compiler.node(Key("", f"node{i}"), node(i, f"z{i % 3}"))
    assert timed("5,000 nodes", compiler, revisions) == 5000
    assert compiler.counts()["classes"] == 0
    compiler.node(Key("", "node7"), node(7, "z2"))
    assert timed("a node's labels that no policy looks at", compiler, revisions) == 0

    subject = Pods(InNamespaces(EVERYTHING), EVERYTHING)
    for name, wanted, most in (
        ("a", label_selector(Requirement("zone", Operator.IN, ("z0",))), 1667 + 5),
        ("b", label_selector(Requirement("zone", Operator.EXISTS)), 3333 + 5),
        ("c", EVERYTHING, 5),
    ):
        rule = Rule(True, 0, (NodeSelector(wanted),), (), Action.DENY)
        made = NetworkPolicy(Key("", name), subject, False, True, (rule,), Tier.ADMIN, 1)
        compiler.policy(made.key, made)
        # The nodes that no policy selected get a class; the others' learns of one more selector.
        assert timed(f"policy {name} for nodes", compiler, revisions) <= most
    compiler.node(Key("", "node0"), node(0, "z1"))
    assert timed("a node's labels", compiler, revisions) == 1
    compiler.policy(Key("", "c"), None)
    assert timed("policy c is gone", compiler, revisions) <= 5
