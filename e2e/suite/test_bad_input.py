# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said on the object, and the rest goes on."""

from __future__ import annotations

from e2e.suite.conftest import Objects
from e2e.suite.kubectl import Manifest, eventually, get, kubectl
from e2e.suite.policies import block, expect, pods, policy, port, targets
from e2e.suite.world import TCP, World

WEB = {"app": "web"}
TAINT = "node.weir.dev/agent-not-ready"


def warnings_about(space: str, name: str) -> str:
    found = get("events", f"--namespace={space}", f"--field-selector=involvedObject.name={name}")
    return " ".join(event.get("message", "") for event in found["items"])


def test_a_rule_without_effect_is_said_on_the_policy(cluster: World, objects: Objects) -> None:
    """Egress rules, but policyTypes names Ingress only: the API server takes it."""
    odd: Manifest = policy(cluster.a, "odd", WEB, ingress=[{"from": [pods(app="client")]}])
    odd["spec"]["egress"] = [{"to": [pods(app="nobody")], "ports": [port(TCP)]}]
    objects.apply(odd)
    eventually(
        lambda: warnings_about(cluster.a, "odd"),
        lambda text: "egress" in text and "policyTypes" in text,
        20,
        "an Event on the policy that names its field",
    )
    allowed = {"client-1", "client-2"}
    expect(cluster.clients, dict.fromkeys(targets(cluster["web-1"], cluster, TCP), allowed))


def test_overlapping_blocks_add_up(cluster: World, objects: Objects) -> None:
    """What one block excepts another may allow, whatever their order and size."""
    peers = []
    for family in cluster.families:
        whole, bits = ("::/0", 128) if family == 6 else ("0.0.0.0/0", 32)
        own = {name: f"{cluster[name].address(family)}/{bits}" for name in ("client-1", "guest-1")}
        peers += [block(whole, *own.values()), block(own["client-1"])]
    objects.apply(policy(cluster.a, "overlap", WEB, ingress=[{"from": peers}]))
    allowed = {"client-1", "client-2", "guest-2"}
    expect(cluster.clients, dict.fromkeys(targets(cluster["web-2"], cluster, TCP), allowed))


def test_the_not_ready_taint_is_taken_off_a_ready_node(cluster: World) -> None:
    node = cluster["web-2"].node
    kubectl("taint", "node", node, f"{TAINT}=:NoSchedule", "--overwrite")
    eventually(
        lambda: [taint["key"] for taint in get("node", node)["spec"].get("taints", [])],
        lambda keys: TAINT not in keys,
        20,
        f"the taint gone from {node}",
    )
