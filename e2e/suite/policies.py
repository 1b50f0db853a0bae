# SPDX-License-Identifier: Apache-2.0
"""NetworkPolicies as short expressions, and who reaches whom under them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from e2e.suite.kubectl import Manifest, eventually
from e2e.suite.probes import Probe
from e2e.suite.world import UDP, World

PROPAGATION_S = 5.0  # generous: on a busy test machine; the promise of a second is tested by itself


def policy(space: str, name: str, subject: dict[str, str], **rules: list[Any]) -> Manifest:
    """`ingress=[…]` and `egress=[…]` are the rules; a direction not given is not isolated."""
    spec: Manifest = {
        "podSelector": {"matchLabels": subject},
        "policyTypes": [direction.capitalize() for direction in rules],
        **rules,
    }
    meta = {"name": name, "namespace": space}
    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return {**kind, "metadata": meta, "spec": spec}


def pods(**labels: str) -> Manifest:
    return {"podSelector": {"matchLabels": labels}}


def spaces(**labels: str) -> Manifest:
    return {"namespaceSelector": {"matchLabels": labels}}


def block(cidr: str, *excepted: str) -> Manifest:
    return {"ipBlock": {"cidr": cidr, "except": list(excepted)}}


def port(number: int | str, protocol: str = "TCP", end: int | None = None) -> Manifest:
    return {"port": number, "protocol": protocol, **({"endPort": end} if end else {})}


Target = tuple[str, str, int]  # protocol, address, port
Matrix = dict[tuple[str, Target], str]


def targets(server: Probe, world: World, *ports: int) -> list[Target]:
    """A server's ports at its addresses of all families."""
    return [
        ("udp" if number == UDP else "tcp", server.address(family), number)
        for family in world.families
        for number in ports
    ]


def matrix(clients: list[Probe], wanted: list[Target]) -> Matrix:
    """What every client gets from every target: "answer" or the error."""

    def row(client: Probe) -> Matrix:
        answers = client.call("reach", targets=wanted, timeout_s=0.4)
        pairs = zip(wanted, answers, strict=True)
        return {(client.name, target): a.get("error", "answer") for target, a in pairs}

    with ThreadPoolExecutor(len(clients)) as pool:
        rows = list(pool.map(row, clients))
    return {key: value for found in rows for key, value in found.items()}


def expect(clients: list[Probe], allowed: dict[Target, set[str]]) -> None:
    """Each target answers exactly the clients named with it, the others time out. First within
    the propagation time, and then once more: it must stay so."""
    wanted = list(allowed)
    expected = {
        (client.name, target): "answer" if client.name in allowed[target] else "timeout"
        for client in clients
        for target in wanted
    }

    def differences(found: Matrix) -> dict[tuple[str, Target], str]:
        return {key: value for key, value in found.items() if value != expected[key]}

    eventually(
        lambda: differences(matrix(clients, wanted)),
        lambda wrong: not wrong,
        PROPAGATION_S,
        "clients that get something else than the policy says",
    )
    assert not differences(matrix(clients, wanted))
