# SPDX-License-Identifier: Apache-2.0
"""Policies, labels and namespaces that change under load: never a moment that nobody asked for.

While something goes back and forth between two states, what both allow never fails, and what both
deny never gets through. Each test is for NetworkPolicies and for ClusterNetworkPolicies, which are
written here as one: who may come to which ports of some pods of namespace a, and nobody else.

    web-1, web-2 answer on TCP 8080, 8090 to 8093 and UDP 8081. client-1, client-2 (app=client) are
    with them, guest-1 (app=client) and guest-2 (app=guest) in namespace b.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from e2e.suite.api import Api, api
from e2e.suite.conftest import Objects
from e2e.suite.kubectl import Manifest, eventually, get
from e2e.suite.policies import expect, targets
from e2e.suite.policy_load import (
    CLIENT,
    CLOSED,
    FLIPS_A_MINUTE,
    KINDS,
    OPEN,
    PROMPT_S,
    Load,
    Peer,
    Refusals,
    Rules,
    back_and_forth,
    of,
    only,
    open_udp,
    promptly,
    under_load,
)
from e2e.suite.world import MORE_TCP, TCP, UDP, World, pod, when_ready

CLOSED_UDP = UDP + 100


@pytest.fixture(scope="module")
def server() -> Iterator[Api]:
    with api() as made:
        yield made


def edits(a: str, b: str) -> dict[str, tuple[Rules, Rules]]:
    """Two states of one policy: both let clients of a to TCP, UDP and OPEN, neither to CLOSED,
    and neither lets in guest-2."""
    own: list[Peer] = [of(a, **CLIENT)]
    everybody_of_a: list[Peer] = [of(a)]
    first, second, third, _ = MORE_TCP
    return {
        "ports": ([(own, [TCP, UDP, first])], [(own, [TCP, UDP, (first, third)])]),
        "peers": ([(own, [TCP, UDP, first])], [(everybody_of_a, [TCP, UDP, first])]),
        "more-peers": ([(own, [TCP, UDP, first])], [([*own, of(b, **CLIENT)], [TCP, UDP, first])]),
        "split-rules": (
            [(own, [TCP, UDP, first])],
            [([of(b, **CLIENT)], [second]), (own, [first]), (own, [UDP]), (everybody_of_a, [TCP])],
        ),
        "order": (
            [(own, [TCP, first]), (everybody_of_a, [UDP]), ([of(b, **CLIENT)], [second])],
            [([of(b, **CLIENT)], [second]), (everybody_of_a, [UDP]), (own, [TCP, first])],
        ),
    }


@pytest.mark.parametrize("change", ["ports", "peers", "more-peers", "split-rules", "order"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_edited_back_and_forth(
    cluster: World, objects: Objects, server: Api, kind: str, change: str
) -> None:
    states = [
        only(kind, cluster.a, "edited", {"app": "web"}, rules)
        for rules in edits(cluster.a, cluster.b)[change]
    ]
    objects.apply(states[0])
    load = steady_load(cluster)
    with under_load(load):
        back_and_forth(lambda turn: ignore(server.put(states[(turn + 1) % 2])), 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_replaced_by_another(
    cluster: World, objects: Objects, server: Api, kind: str
) -> None:
    """The new one is there before the old one goes, in both directions."""
    rules: Rules = [([of(cluster.a, **CLIENT)], [TCP, UDP, OPEN])]
    pair = [only(kind, cluster.a, name, {"app": "web"}, rules) for name in ("one", "two")]
    objects.apply(pair[0])
    objects.made.append(pair[1])

    def step(turn: int) -> None:
        server.put(pair[(turn + 1) % 2])
        server.delete(pair[turn % 2])

    with under_load(steady_load(cluster)):
        back_and_forth(step, 0.05)


@pytest.mark.parametrize("move", ["tier", "priority", "pass"])
def test_a_decision_that_moves_between_tiers(
    cluster: World, objects: Objects, server: Api, move: str
) -> None:
    """The same is allowed by the Admin tier and by the Baseline, before another policy and behind
    it, and by a NetworkPolicy to which a rule passes."""
    rules: Rules = [([of(cluster.a, **CLIENT)], [TCP, UDP, OPEN])]
    states = [only("ClusterNetworkPolicy", cluster.a, "moved", {"app": "web"}, rules)
              for _ in range(2)]  # fmt: skip
    moved = states[1]["spec"]
    if move == "tier":
        moved["tier"] = "Baseline"
    elif move == "priority":
        moved["priority"] = 900
        between = only("ClusterNetworkPolicy", cluster.a, "between", {"app": "web"}, rules)
        between["spec"] |= {"priority": 500}
        objects.apply(between)
    else:
        moved["ingress"][0]["action"] = "Pass"
        objects.apply(only("NetworkPolicy", cluster.a, "below", {"app": "web"}, rules))
    objects.apply(states[0])
    with under_load(steady_load(cluster)):
        back_and_forth(lambda turn: ignore(server.put(states[(turn + 1) % 2])), 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_flipped_a_thousand_times_a_minute(
    cluster: World, objects: Objects, server: Api, kind: str
) -> None:
    """client-1 is friend and stranger in turn: to OPEN both may, by a rule each; to TCP only a
    friend, to CLOSED neither. The others do not notice."""
    rules: Rules = [
        ([of(cluster.a, role="friend")], [OPEN, TCP]),
        ([of(cluster.a, role="stranger")], [OPEN]),
        ([of(cluster.a, **CLIENT)], [UDP]),
    ]
    objects.apply(only(kind, cluster.a, "labels", {"app": "web"}, rules))
    subjects = [pod_named(cluster.a, name) for name in ("client-1", "client-2")]
    server.merge(subjects[1], labels(role="friend"))
    server.merge(subjects[0], labels(role="friend"))
    load = Load(cluster)
    load.allow("client-1", ("web-1", "web-2"), OPEN, UDP)
    load.allow("client-2", ("web-1",), TCP, OPEN)
    load.deny("client-1", ("web-1", "web-2"), CLOSED)
    load.deny("guest-2", ("web-1",), TCP, OPEN)

    def flip(turn: int) -> None:
        server.merge(subjects[0], labels(role=("stranger", "friend")[turn % 2]))

    try:
        with under_load(load):
            back_and_forth(flip, 60 / FLIPS_A_MINUTE)
        for role, want in (("stranger", "timeout"), ("friend", "answer"), ("stranger", "timeout")):
            server.merge(subjects[0], labels(role=role))
            promptly(cluster["client-1"], ["tcp", cluster["web-2"].addresses[0], TCP], want)
    finally:
        for subject in subjects:
            server.merge(subject, labels(role=None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_namespace_relabelled_under_load(
    cluster: World, objects: Objects, server: Api, kind: str
) -> None:
    """As with pods: the guests' namespace is good and bad in turn."""
    good: Peer = ({"matchLabels": {"mood": "good"}}, {})
    bad: Peer = ({"matchLabels": {"mood": "bad"}}, {})
    rules: Rules = [
        ([good], [OPEN, TCP]),
        ([bad], [OPEN]),
        ([of(cluster.a, **CLIENT)], [UDP, TCP]),
    ]
    space = {"kind": "Namespace", "metadata": {"name": cluster.b}}
    objects.apply(only(kind, cluster.a, "relabelled", {"app": "web"}, rules))
    server.merge(space, labels(mood="good"))
    load = Load(cluster)
    for guest in ("guest-1", "guest-2"):
        load.allow(guest, ("web-1", "web-2"), OPEN)
        load.deny(guest, ("web-1", "web-2"), CLOSED)
    load.allow("client-2", ("web-1",), TCP, UDP)
    load.deny("client-1", ("web-2",), OPEN)
    try:
        with under_load(load):
            back_and_forth(
                lambda turn: ignore(server.merge(space, labels(mood=("bad", "good")[turn % 2]))),
                0.1,
            )
        for mood, want in (("bad", "timeout"), ("good", "answer"), ("bad", "timeout")):
            server.merge(space, labels(mood=mood))
            promptly(cluster["guest-1"], ["tcp", cluster["web-2"].addresses[0], TCP], want)
    finally:
        server.merge(space, labels(mood=None))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_policy_cuts_what_it_denies_and_nothing_else(
    cluster: World, objects: Objects, server: Api, kind: str
) -> None:
    """Living connections of the guests end within a second; those of the clients, to the same
    pods and to others, do not lose a datagram."""
    cut = Load(cluster)
    kept = Load(cluster)
    cut.allow("guest-1", ("web-1", "web-2"), TCP, UDP)
    cut.allow("guest-2", ("web-1", "web-2"), TCP, UDP)
    kept.allow("client-1", ("web-1", "web-2"), TCP, UDP)
    kept.allow("client-2", ("web-1", "web-2"), TCP, UDP)
    kept.allow("guest-1", ("client-1", "guest-2"), TCP, UDP)
    kept.start()
    cut.start()
    # What a connection flow sees, it sees after its own time limit.
    living = [flow for flow in cut.allowed if not flow.name.startswith("connect")]
    made = only(kind, cluster.a, "cut", {"app": "web"}, [([of(cluster.a, **CLIENT)], [TCP, UDP])])
    objects.made.append(made)
    server.put(made)
    time.sleep(PROMPT_S)  # the promise itself, not a wait for something
    before = [flow.read()["received"] for flow in living]
    time.sleep(0.5)
    after = [flow.read()["received"] for flow in living]
    kept.finish()
    objects.delete(made)
    cut.stop()
    assert before == after, "answers go on after the policy"


@pytest.mark.parametrize("kind", KINDS)
def test_replies_and_errors_of_allowed_flows_pass(
    cluster: World, objects: Objects, server: Api, kind: str
) -> None:
    """The client lets nothing in and the server nothing out: the answers of what the client
    begins come all the same, and so do the ICMP errors about it, while policies change."""
    a = cluster.a
    to_web: Rules = [([of(a, app="web")], [TCP, UDP])]
    from_client: Rules = [([of(a, **CLIENT)], [TCP, UDP])]
    errors = [
        open_udp(made, direction, CLOSED_UDP)
        for made, direction in (
            (only(kind, a, "client-out", CLIENT, to_web, "egress"), "egress"),
            (only(kind, a, "web-in", {"app": "web"}, from_client), "ingress"),
        )
    ]
    shut = [
        only(kind, a, "client-in", CLIENT, []),
        only(kind, a, "web-out", {"app": "web"}, [], "egress"),
    ]
    objects.apply(*errors, *shut)
    backwards = {
        target: set[str]()
        for name in ("client-1", "client-2")
        for target in targets(cluster[name], cluster, TCP, UDP)
    }
    expect([cluster["web-1"], cluster["web-2"]], backwards)
    nobody = [of(a, app=f"nobody-{number}") for number in range(10)]

    def shut_otherwise(turn: int) -> None:
        """Both are edited all the time and never let anybody in or out."""
        nothing: Rules = [([nobody[turn % 10]], [TCP])]
        server.put(only(kind, a, "client-in", CLIENT, nothing))
        server.put(only(kind, a, "web-out", {"app": "web"}, nothing, "egress"))

    load = Load(cluster)
    load.allow("client-1", ("web-1", "web-2"), TCP, UDP)
    load.deny("client-2", ("web-1", "web-2"), CLOSED)
    refusals = Refusals(cluster, ("client-1", "client-2"), CLOSED_UDP)
    with under_load(load):
        refusals.start()
        back_and_forth(shut_otherwise, 0.1)
        refusals.finish()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("node", [0, 1])
def test_a_pod_that_hammers_from_its_first_instruction(
    cluster: World, objects: Objects, kind: str, node: int
) -> None:
    """It may talk to web-2 only, and it begins before anything else could know that it runs.
    Its policy is made right before it."""
    allowed, denied = cluster["web-2"], cluster["web-1"]
    made = only(kind, cluster.a, "early", {"app": "early"},
                [([of(cluster.a, number="2")], [TCP, UDP])], "egress")  # fmt: skip
    fresh = [hammering(cluster, f"early-{node}-{n}", node) for n in range(3)]
    objects.apply(made, *fresh)
    addresses: set[str] = set()
    for item in fresh:
        addresses |= set(addresses_of(item))
    eventually(
        lambda: addresses & {*allowed.call("hits")["tcp"], *allowed.call("hits")["udp"]},
        lambda seen: seen == addresses,
        20,
        "every address of the new pods at web-2",
    )
    seen = denied.call("hits")
    assert not addresses & {*seen["tcp"], *seen["udp"]}, seen


def hammering(cluster: World, name: str, node: int) -> Manifest:
    """A pod whose first and only work is to send to both servers."""
    made = pod(cluster.a, name, cluster.nodes[min(node, len(cluster.nodes) - 1)], cluster.image,
               app="early")  # fmt: skip
    container = made["spec"]["containers"][0]
    hosts = [a for server in ("web-1", "web-2") for a in cluster[server].addresses]
    container["command"] = ["python3", "-c", _HAMMER, json.dumps(hosts), str(TCP), str(UDP)]
    del container["ports"], container["readinessProbe"]
    return made


_HAMMER = """
import json, socket, sys, time
hosts, tcp, udp = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
waiting = []
while True:
    for host in hosts:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as client:
                client.sendto(b"early", (host, udp))
            client = socket.socket(family, socket.SOCK_STREAM)
            client.setblocking(False)
            client.connect_ex((host, tcp))
            waiting.append(client)
        except OSError:
            pass
    while len(waiting) > 200:
        waiting.pop(0).close()
    time.sleep(0.005)
"""


def addresses_of(item: Manifest) -> tuple[str, ...]:
    name, space = item["metadata"]["name"], item["metadata"]["namespace"]
    found = eventually(
        lambda: get("pod", name, f"--namespace={space}")["status"].get("podIPs") or [],
        bool,
        60,
        f"addresses of pod {name}",
    )
    return tuple(entry["ip"] for entry in found)


@pytest.mark.parametrize("node", [0, 1])
def test_a_server_and_its_cluster_policy_made_under_hammering(
    cluster: World, objects: Objects, node: int
) -> None:
    """As test_policy_live has it for a NetworkPolicy that is there before; here both are new."""
    target_node = cluster[f"web-{node + 1}"].node
    hammers = [
        cluster[name].flow("hammer", first_addresses(cidr), TCP, 0.05)
        for name in ("guest-1", "guest-2")
        for cidr in get("node", target_node)["spec"]["podCIDRs"]
    ]
    try:
        made = only("ClusterNetworkPolicy", cluster.a, "late", {"app": "late"},
                    [([of(cluster.a)], [TCP, UDP])])  # fmt: skip
        fresh = pod(cluster.a, f"late-{node}", target_node, cluster.image, app="late")
        objects.apply(made, fresh)
        late = when_ready(fresh)
        try:
            friend = cluster["client-1"].ask("tcp", late.address(cluster.families[0]), TCP, 2)
            assert "name" in friend, f"its policy allows client-1: {friend}"
            seen = late.call("hits")
        finally:
            late.close()
        intruders = {a for name in ("guest-1", "guest-2") for a in cluster[name].addresses}
        assert not intruders & {*seen["tcp"], *seen["udp"]}, seen
    finally:
        sent = [flow.stop()["sent"] for flow in hammers]
    assert min(sent) > 100, sent


def first_addresses(cidr: str) -> str:
    """All of an IPv4 pod range, the part of an IPv6 one that is given out first."""
    return cidr.partition("/")[0] + "/120" if ":" in cidr else cidr


def test_a_completed_pod_has_no_say_about_the_address_it_had(
    cluster: World, objects: Objects, server: Api
) -> None:
    """A pod that has finished keeps its address in its status. Whoever has the address now is
    judged by its own labels: when the old one is there, and when it goes."""
    objects.apply(only("NetworkPolicy", cluster.a, "reused", {"app": "web"},
                       [([of(cluster.a, role="friend")], [TCP])]))  # fmt: skip
    client = cluster["client-1"]
    load = Load(cluster)
    load.deny("client-1", ("web-1", "web-2"), TCP)
    load.start()
    ghost = pod(cluster.a, "finished", "nowhere", cluster.image, app="client", role="friend")
    objects.apply(ghost)
    server.request("PATCH", f"/api/v1/namespaces/{cluster.a}/pods/finished/status", {
        "status": {
            "phase": "Succeeded",
            "podIP": client.addresses[0],
            "podIPs": [{"ip": address} for address in client.addresses],
        }
    }, "application/merge-patch+json")  # fmt: skip
    time.sleep(2)  # nothing may happen
    load.finish()
    own = pod_named(cluster.a, "client-1")
    try:
        server.merge(own, labels(role="friend"))
        kept = Load(cluster)
        kept.allow("client-1", ("web-1", "web-2"), TCP)
        with under_load(kept):
            server.delete(ghost)
            time.sleep(2)
    finally:
        server.merge(own, labels(role=None))


def steady_load(cluster: World) -> Load:
    """What both states of `edits` allow, and what neither does."""
    load = Load(cluster)
    load.allow("client-1", ("web-1", "web-2"), TCP, UDP, OPEN)
    load.allow("client-2", ("web-1",), TCP, UDP)
    load.deny("client-1", ("web-1", "web-2"), CLOSED)
    load.deny("client-2", ("web-2",), CLOSED)
    load.deny("guest-2", ("web-1", "web-2"), TCP, OPEN)
    return load


def labels(**changes: str | None) -> Manifest:
    """A patch; None takes the label away."""
    return {"metadata": {"labels": changes}}


def pod_named(space: str, name: str) -> Manifest:
    return {"kind": "Pod", "metadata": {"name": name, "namespace": space}}


def ignore(_: object) -> None:
    """For a step whose answer says nothing."""
