# SPDX-License-Identifier: Apache-2.0
"""Two pods on a node under Weir with policies on both, against two rivals.

    weir     client -- veth -- from_pod: policy, conntrack, redirect_peer -- veth -- server
    veth     client ---------------------------- veth ----------------------------- server
    bridge   client -- veth -- bridge of the CNI plugin, no policy -- veth -- server

One client process gives the three turns, so no two figures of a pair are further apart than
two turns. The direct veth is what no network plugin can beat.
"""

from __future__ import annotations

from contextlib import ExitStack

from bench import load, result
from bench.namespaces import Namespace
from bench.plugins import bridge_plugin
from bench.weir_node import CLIENT_CLASS, SERVER_CLASS, weir_node

PORT = 7000
SECONDS = 12.0
MODES = {
    "stream": ("TCP stream", "Gbit/s", 8e-9),
    "crr": ("TCP connect/request/response", "1/s", 1),
    "rr": ("TCP request/response", "1/s", 1),
    "urr": ("UDP request/response", "1/s", 1),
}


def direct_veth(client: Namespace, server: Namespace) -> str:
    client.ip(f"link add eth0 type veth peer name eth0 netns {server.path}")
    for number, namespace in enumerate((client, server), 1):
        namespace.ip(f"addr add 10.97.0.{number}/24 dev eth0")
        namespace.ip("link set eth0 up")
    return "10.97.0.2"


def run() -> list[result.Result]:
    rivals = ("weir", "veth", "bridge")
    with ExitStack() as stack:
        clients = {name: Namespace() for name in rivals}
        servers = {name: Namespace() for name in rivals}
        addresses = {"veth": direct_veth(clients["veth"], servers["veth"])}
        bridge = stack.enter_context(bridge_plugin(Namespace()))
        bridge.add("client", clients["bridge"])
        addresses["bridge"] = bridge.add("server", servers["bridge"])
        node = stack.enter_context(weir_node())
        node.allow(CLIENT_CLASS, SERVER_CLASS, PORT)
        node.add_pod(clients["weir"], "10.99.0.2", CLIENT_CLASS)
        node.add_pod(servers["weir"], "10.99.0.3", SERVER_CLASS)
        addresses["weir"] = "10.99.0.3"

        stack.enter_context(load.server([PORT], [servers[name].path for name in rivals]))
        targets = [load.Target(addresses[name], PORT, clients[name].path) for name in rivals]
        results = []
        for mode, (text, unit, factor) in MODES.items():
            rates = load.measure(mode, targets, SECONDS)
            weir, *others = [[rate * factor for rate in turns] for turns in rates]
            for rival, other in zip(("direct veth", "bridge plugin"), others, strict=True):
                results.append(result.against(f"pod to pod, {text}", unit, rival, weir, other))
        return results
