# SPDX-License-Identifier: Apache-2.0
"""What policies cost the compiler at size: classes, resources and calls, never seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from support import policy_cluster as world
from support.effort import effort

from weir.api.address import V4_PREFIX, Addr, parse_cidr
from weir.operator import kinds
from weir.operator.compiler import Compiler
from weir.operator.objects import Key, Namespace, Pod
from weir.operator.policy import NetworkPolicy, Rule
from weir.operator.resources import Change
from weir.operator.revisions import Revisions
from weir.operator.selectors import (
    EVERYTHING,
    InNamespace,
    InNamespaces,
    IpBlock,
    Operator,
    Pods,
    Requirement,
    Selector,
    label_selector,
)

PODS = 100_000
NAMESPACES = 100
APPS = 10
EVERYBODY = Pods(InNamespaces(EVERYTHING), EVERYTHING)


def app(number: int) -> Requirement:
    return Requirement("app", Operator.IN, (f"app{number % APPS}",))


def pod(number: int, mark: str = "") -> Pod:
    """Each has a label that no other has, as a StatefulSet's pods do."""
    name = f"pod{number}"
    own = ("statefulset.kubernetes.io/pod-name", name + mark)
    return Pod(
        key=Key(f"ns{number % NAMESPACES}", name),
        uid=f"00000000-0000-0000-0000-{number:012d}",
        created="",
        labels=(("app", f"app{number // NAMESPACES % APPS}"), own),
        node=f"node{number % 1000}",
        live=True,
        addresses=(Addr(V4_PREFIX + (0x0A000000 + number).to_bytes(4, "big")),),
        ports=(),
    )


def policy(namespace: str, name: str, subject: Pods, *peers: Selector) -> NetworkPolicy:
    rule = Rule(False, 0, tuple(peers), ())
    return NetworkPolicy(Key(namespace, name), subject, True, False, (rule,))


def news(compiler: Compiler, revisions: Revisions) -> list[Change]:
    """What agents are told: changes that differ from what they know."""
    changes = compiler.flush()
    before = revisions.revision
    told = revisions.publish(changes)
    assert told <= len(changes)
    assert (revisions.revision > before) == bool(told)
    return changes if told else []


def kinds_of(changes: list[Change]) -> dict[str, int]:
    found: dict[str, int] = {}
    for change in changes:
        kind = change.name.partition("/")[0]
        found[kind] = found.get(kind, 0) + 1
    return found


def test_labels_that_no_policy_looks_at_make_no_classes() -> None:
    """100,000 pods with a label set each, 1,000 policies; and then the labels begin to change."""
    compiler, revisions = Compiler(), Revisions("test")
    for n in range(NAMESPACES):
        name = f"ns{n}"
        compiler.namespace(Key("", name), Namespace(Key("", name), (("team", f"t{n % 10}"),)))
        for a in range(APPS):
            subject = Pods(InNamespace(name), label_selector(app(a)))
            peer = Pods(InNamespace(name), label_selector(app(a + 1)))
            made = policy(name, f"app{a}", subject, peer)
            compiler.policy(made.key, made)
    for number in range(PODS):
        made_pod = pod(number)
        compiler.pod(made_pod.key, made_pod)
    news(compiler, revisions)
    # A class for each app of a namespace: of pods, and of IPv4 addresses.
    classes = NAMESPACES * APPS * 2
    assert compiler.counts()["groups"] == PODS
    assert compiler.counts()["classes"] == classes

    # A second of churn: 1,000 pods get another value of their own label. Nobody is told.
    for number in range(1000):
        changed = pod(number, "-again")
        compiler.pod(changed.key, changed)
    assert news(compiler, revisions) == []
    assert compiler.counts()["groups"] == PODS

    # Another second of it, in labels that policies look at: each pod's class and address, no more.
    for number in range(1000):
        changed = replace(pod(number), labels=(("app", f"app{number % APPS}"),))
        compiler.pod(changed.key, changed)
    told = kinds_of(news(compiler, revisions))
    assert told.keys() <= {"pod", "address"}
    assert sum(told.values()) <= 2000
    assert compiler.counts()["classes"] == classes

    # One policy that selects everything, on both sides: classes learn of a selector, and stay.
    everything = policy("ns0", "all", EVERYBODY, EVERYBODY)
    compiler.policy(everything.key, everything)
    assert kinds_of(news(compiler, revisions)) == {"selector": 1, "policy": 1, "class": classes}
    assert compiler.counts()["classes"] == classes
    compiler.policy(everything.key, None)
    assert kinds_of(news(compiler, revisions)) == {"selector": 1, "policy": 1, "class": classes}

    # A namespace's labels, of 1,000 pods: its classes, no pod.
    team = Pods(InNamespaces(label_selector(Requirement("new", Operator.EXISTS))), EVERYTHING)
    fresh = policy("ns0", "fresh", Pods(InNamespace("ns0"), EVERYTHING), team)
    compiler.policy(fresh.key, fresh)
    news(compiler, revisions)
    key = Key("", "ns1")
    compiler.namespace(key, Namespace(key, (("new", "label"), ("team", "t1"))))
    assert kinds_of(news(compiler, revisions)) == {"class": 2 * APPS}


def test_a_namespace_of_ten_thousand_pods_that_changes_its_labels() -> None:
    compiler, revisions = Compiler(), Revisions("test")
    key, other = Key("", "big"), Key("", "other")
    compiler.namespace(key, Namespace(key, (("team", "a"),)))
    compiler.namespace(other, Namespace(other, ()))
    team = Pods(InNamespaces(label_selector(Requirement("team", Operator.IN, ("b",)))), EVERYTHING)
    for a in range(APPS):
        subject = Pods(InNamespace("big"), label_selector(app(a)))
        made = policy("big", f"app{a}", subject, team)
        compiler.policy(made.key, made)
    for number in range(10_000):
        made_pod = replace(pod(number), key=Key("big", f"pod{number}"))
        compiler.pod(made_pod.key, made_pod)
    news(compiler, revisions)
    for label in ("b", "a", "b"):
        compiler.namespace(key, Namespace(key, (("team", label),)))
        assert kinds_of(news(compiler, revisions)) == {"class": 2 * APPS}


def blocks(count: int, first: int = 0) -> tuple[IpBlock, ...]:
    return tuple(
        IpBlock(parse_cidr(f"172.{16 + (n >> 16)}.{n >> 8 & 255}.{n & 255}/32"))
        for n in range(first, first + count)
    )


def test_a_rule_with_a_thousand_blocks() -> None:
    def filled(count: int) -> tuple[Compiler, Revisions, NetworkPolicy]:
        compiler, revisions = Compiler(), Revisions("test")
        key = Key("", "ns0")
        compiler.namespace(key, Namespace(key, ()))
        for number in range(0, PODS, NAMESPACES):
            made_pod = pod(number)
            compiler.pod(made_pod.key, made_pod)
        made = policy("ns0", "blocks", Pods(InNamespace("ns0"), EVERYTHING), *blocks(count))
        compiler.policy(made.key, made)
        news(compiler, revisions)
        return compiler, revisions, made

    compiler, revisions, made = filled(1000)
    # A class and a prefix for each block, and the pods' own.
    assert compiler.counts()["prefixes"] == 1000
    assert compiler.counts()["classes"] == 1000 + 2
    # One block less, and one more.
    compiler.policy(made.key, policy("ns0", "blocks", made.subject, *blocks(1000, 1)))
    told = kinds_of(news(compiler, revisions))
    assert told == {"policy": 1, "selector": 2, "class": 2, "prefix": 2}
    # Ten times the blocks are ten times the work, and little more.
    work = {}
    for count in (100, 1000):
        compiler, revisions, made = filled(count)
        compiler.policy(made.key, None)
        news(compiler, revisions)

        def again(compiler: Compiler = compiler, made: NetworkPolicy = made) -> list[Change]:
            compiler.policy(made.key, made)
            return compiler.flush()

        work[count], _ = effort(again)
    assert work[1000] <= 12 * work[100], work


def changes(shape: world.Shape) -> dict[str, Callable[[Compiler], None]]:
    """Each changes one object of a cluster."""

    def policy_rule(compiler: Compiler) -> None:
        made = world.parsed(kinds.POLICY, world.policy(0, 1, 0, first_port=9000))
        compiler.policy(made.key, made)

    def policy_selector(compiler: Compiler) -> None:
        made = world.parsed(kinds.POLICY, world.policy(0, 1, 0))
        labels = label_selector(app(1), Requirement("pod-template-hash", Operator.EXISTS))
        made = replace(made, subject=Pods(InNamespace(world.HOME), labels))
        compiler.policy(made.key, made)

    def pod_labels(compiler: Compiler) -> None:
        made = world.parsed(kinds.POD, world.pod(shape, 0, 50, app="app3"))
        compiler.pod(made.key, made)

    def namespace_labels(compiler: Compiler) -> None:
        made = world.parsed(kinds.NAMESPACE, world.namespace(2, team="team99"))
        compiler.namespace(made.key, made)

    found = (policy_rule, policy_selector, pod_labels, namespace_labels)
    return {change.__name__: change for change in found}


def test_one_change_costs_the_same_in_a_cluster_ten_times_the_size() -> None:
    """3,000 policies and pods, and 30,000."""
    work: dict[str, list[int]] = {}
    told: dict[str, list[dict[str, int]]] = {}
    for namespaces in (30, 300):
        shape = world.Shape(namespaces)
        compiler, revisions = Compiler(), Revisions("test")
        world.objects(shape).fill(compiler)
        news(compiler, revisions)
        assert compiler.counts()["policies"] == compiler.counts()["pods"] == namespaces * 100
        for name, change in changes(shape).items():

            def one(
                change: Callable[[Compiler], None] = change, compiler: Compiler = compiler
            ) -> list[Change]:
                change(compiler)
                return compiler.flush()

            calls, changed = effort(one)
            work.setdefault(name, []).append(calls)
            told.setdefault(name, []).append(kinds_of(changed))
            revisions.publish(changed)
    for name, (small, large) in work.items():
        assert large <= 1.5 * small + 1000, (name, work)
    for name, (before, after) in told.items():
        assert before == after, (name, told)
        assert sum(after.values()) <= 30, (name, told)
