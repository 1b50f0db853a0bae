# SPDX-License-Identifier: Apache-2.0
"""What policies cost an agent at size: rows and calls for a change, never seconds.

A cluster is compiled as the operator does it, and its resources projected for a node of 30 pods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from support import policy_cluster as world
from support.effort import effort

from weir.agent import resources
from weir.agent.resources import Resource
from weir.agent.tables import Delta, Projection
from weir.api.address import parse
from weir.api.v1 import weir_pb2 as pb
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.operator import kinds
from weir.operator.compiler import Compiler
from weir.operator.revisions import Revisions

SMALL, LARGE = world.Shape(10), world.Shape(100)


def endpoint(number: int) -> LocalEndpoint:
    mac = b"\2\0\0\0\0" + bytes([number])
    name = f"p{number}"
    return LocalEndpoint(
        f"c{number}", f"/run/netns/{number}", "eth0", f"weir{number}", 10 + number, mac, mac,
        (parse(f"10.244.1.{number + 2}"),), PodRef(world.HOME, name, f"u-{name}"),
    )  # fmt: skip


class Cluster:
    """The operator's compiler, and one agent's projection that follows it."""

    def __init__(self, shape: world.Shape) -> None:
        self.shape = shape
        self.compiler = Compiler()
        self.revisions = Revisions("test")
        self.projection = Projection()
        world.objects(shape).fill(self.compiler)
        for number in range(world.PER_NODE):
            made = endpoint(number)
            self.compiler.announce(world.HOME_NODE, made.pod.uid, made.addresses)
            self.projection.set_endpoint(made)
        self.revisions.publish(self.compiler.flush())
        updates = map(pb.Update.FromString, self.revisions.snapshot(world.HOME_NODE))
        self.projection.apply(dict(resources.parse(item) for u in updates for item in u.resources))
        self.first = self.projection.take()

    def follow(self) -> tuple[int, Delta]:
        """What came since, as one change: calls that it cost the agent, and rows."""
        before = self.revisions.revision
        self.revisions.publish(self.compiler.flush())
        changes: dict[str, Resource | None] = {}
        for update in map(
            pb.Update.FromString, self.revisions.delta(before, world.HOME_NODE)
        ):  # parsing counts for itself
            changes |= dict(resources.parse(item) for item in update.resources)
            changes |= dict.fromkeys(update.removed)

        def take() -> Delta:
            self.projection.apply(changes)
            return self.projection.take()

        return effort(take)


def rule(cluster: Cluster) -> None:
    """Of a policy for pods here: another port."""
    made = world.parsed(kinds.POLICY, world.policy(0, 1, 0, first_port=9000))
    cluster.compiler.policy(made.key, made)


def selector(cluster: Cluster) -> None:
    """A policy for pods elsewhere, with a selector that nobody has named before."""
    item = world.policy(5, 1, 0)
    item["metadata"]["name"] = "fresh"
    item["spec"]["podSelector"]["matchLabels"]["pod-template-hash"] = "6d4cf56db1"
    made = world.parsed(kinds.POLICY, item)
    cluster.compiler.policy(made.key, made)


def labels(cluster: Cluster) -> None:
    """Of a pod elsewhere, which rules of pods here select."""
    made = world.parsed(kinds.POD, world.pod(cluster.shape, 0, 50, app="app3"))
    cluster.compiler.pod(made.key, made)


def own_labels(cluster: Cluster) -> None:
    """Of a pod here."""
    made = world.parsed(kinds.POD, world.pod(cluster.shape, 0, 3, app="app7"))
    cluster.compiler.pod(made.key, made)


def team(cluster: Cluster) -> None:
    """A namespace of a hundred pods leaves the team that pods here let in."""
    made = world.parsed(kinds.NAMESPACE, world.namespace(2, team="team99"))
    cluster.compiler.namespace(made.key, made)


CHANGES: dict[Callable[[Cluster], None], int] = {
    # With the rows of `policy`, `addresses` and `endpoints` that may change.
    rule: 2,
    selector: 12,
    labels: 2,
    own_labels: 4,
    team: 110,
}


def test_one_change_costs_the_same_in_a_cluster_ten_times_the_size() -> None:
    """1,000 policies and pods, and 10,000."""
    work: dict[str, list[int]] = {}
    rows: dict[str, list[int]] = {}
    for cluster in (Cluster(SMALL), Cluster(LARGE)):
        for change, most in CHANGES.items():
            change(cluster)
            calls, delta = cluster.follow()
            written = len(delta.policy) + len(delta.addresses) + len(delta.endpoints)
            assert 0 < written <= most, (change.__name__, delta)
            work.setdefault(change.__name__, []).append(calls)
            rows.setdefault(change.__name__, []).append(written)
    for name, (small, large) in work.items():
        assert large <= 1.5 * small + 200, (name, work)
    for name, (small, large) in rows.items():
        assert small == large, (name, rows)


def test_rows_and_numbers_follow_the_node_not_the_cluster() -> None:
    small, large = Cluster(SMALL), Cluster(LARGE)
    assert len(small.first.policy) == len(large.first.policy)
    numbers = large.projection.number_spaces()
    # The hundred policies of the one namespace that has pods here, with a rule each.
    assert len(numbers["rule"].items()) == 100
    assert len(large.projection.policies()) == LARGE.policies
    # A pod of another namespace comes, and goes again.
    home, name = world.namespace_name(7), "p1"
    made = replace(endpoint(99), pod=PodRef(home, name, f"u-{home}-{name}"))
    pod = world.parsed(kinds.POD, world.pod(LARGE, 7, 1))
    large.compiler.pod(pod.key, replace(pod, node=world.HOME_NODE))
    large.compiler.announce(world.HOME_NODE, pod.uid, made.addresses)
    before = len(large.projection.table("policy"))
    large.projection.set_endpoint(made)
    large.follow()
    assert len(numbers["rule"].items()) == 110
    assert len(large.projection.table("policy")) > before
    large.projection.remove_endpoint(made.container_id)
    large.projection.take()
    assert len(large.projection.table("policy")) == before
    assert len(numbers["rule"].retired()) == 10


def test_a_second_of_churn_costs_its_pods() -> None:
    """1,000 pods elsewhere get another app each, which policies look at: their addresses move."""
    cluster = Cluster(LARGE)
    for home in range(1, 11):
        for number in range(world.PODS):
            app = f"app{(number + 1) % world.APPS}"
            made = world.parsed(kinds.POD, world.pod(LARGE, home, number, app=app))
            cluster.compiler.pod(made.key, made)
    calls, delta = cluster.follow()
    assert len(delta.addresses) == 1000
    assert not delta.policy
    assert not delta.endpoints
    assert calls <= 50 * 1000, calls
