# SPDX-License-Identifier: Apache-2.0
"""A client outside of the local cluster: connections to NodePorts and LoadBalancer addresses.

    outside --> node1:NodePort ------> near (node1)     LoadBalancer address, via node1: likewise
    outside --> node1:NodePort --> far (node2), by SNAT

The outside is the control plane's end of the underlay. Each path is measured from one client
address and from a thousand; in turns with connections to a process of the node itself.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from bench import cluster, load, result
from bench.errors import BenchError
from e2e.cluster import namespaces
from e2e.cluster.settings import CONTROL_PLANE, IPV4

FRONT = "node1"
FRONT_ADDRESS = IPV4.node(1)
CLIENTS = ipaddress.ip_network("198.18.0.0/22")
BALANCERS = ipaddress.ip_network("198.19.0.0/24")
# Of nobody: so no controller of the cluster takes the status away that is written here.
CLASS = "bench.weir.dev/none"
MANY = 1000
SECONDS = 12.0
# Between two turns of one of them, as many ports must be free again as one takes.
TEXTS = {"near": "backend on that node", "far": "backend on another node"}
SOURCES = {0: "1 client", MANY: f"{MANY} clients"}


@dataclass(frozen=True, slots=True)
class Outside:
    """targets: of the Services, by the path's name. node: a process of the node itself."""

    targets: Mapping[str, load.Target]
    node: load.Target

    def measure(self, services: int) -> list[result.Rates]:
        found = []
        for sources, clients in SOURCES.items():
            targets = [self.node, *self.targets.values()]
            first = str(CLIENTS[1]) if sources else ""
            targets = [load.Target(t.address, t.port, "-", first, sources) for t in targets]
            with cluster.quiet_cpu():
                direct, *others = measure(targets)
            found += [
                result.Rates(f"connect to a {name}, {clients}", services, values, direct)
                for name, values in zip(self.targets, others, strict=True)
            ]
        return found


def inside(place: str, *command: str) -> list[str]:
    """A command line in the network of the control plane or of a node."""
    return namespaces.entered(place, list(command), only_network=True)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")


def measure(targets: Sequence[load.Target]) -> list[list[float]]:
    command = inside(CONTROL_PLANE, str(load.build()))
    command += load.client_arguments("crr", SECONDS, targets)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=SECONDS * 2 + 30
    )
    if done.returncode:
        raise BenchError(f"load client outside: {done.stderr.strip()}")
    return load.rates(done.stdout, len(targets))


def wait_for_answer(name: str, target: load.Target) -> None:
    command = [*inside(CONTROL_PLANE, str(load.build()))]
    command += load.client_arguments("crr", 0.001, [target])
    deadline = time.monotonic() + cluster.POD_DEADLINE_S
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        if not done.returncode:
            return
        if time.monotonic() > deadline:
            raise BenchError(f"{name} never answered the outside; last: {done.stderr.strip()}")
        time.sleep(0.2)


def balanced(name: str, addr: str, balancer: str) -> load.Target:
    """Makes a LoadBalancer Service of one backend. Returns its node port on the front node."""
    made = cluster.service(name)
    made["spec"] |= {"type": "LoadBalancer", "loadBalancerClass": CLASS}
    cluster.apply(made, cluster.endpoint_slice(name, addr))
    status = {"status": {"loadBalancer": {"ingress": [{"ip": balancer, "ipMode": "VIP"}]}}}
    patch = ["patch", "service", "-n", cluster.NAMESPACE, name, "--subresource=status"]
    cluster.kubectl(*patch, "--type=merge", f"--patch={json.dumps(status)}")
    path = "-o=jsonpath={.spec.ports[0].nodePort}"
    port = cluster.kubectl("get", "service", "-n", cluster.NAMESPACE, name, path)
    return load.Target(FRONT_ADDRESS, int(port))


@contextmanager
def process_on_the_node() -> Iterator[load.Target]:
    arguments = load.server_arguments([cluster.DIRECT_PORT])
    command = inside(FRONT, str(load.build()), *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise BenchError(f"the load server on {FRONT} did not start")
            yield load.Target(FRONT_ADDRESS, cluster.DIRECT_PORT)
        finally:
            process.kill()


@contextmanager
def place(addresses: Mapping[str, str]) -> Iterator[Outside]:
    """The outside's addresses and routes, and Services over the load pods `near` and `far`."""
    targets: dict[str, load.Target] = {}
    with ExitStack() as stack:
        for route in (["local", str(CLIENTS), "dev", "lo"], [str(BALANCERS), "via", FRONT_ADDRESS]):
            run(*inside(CONTROL_PLANE, "ip", "route", "replace", *route))
            gone = inside(CONTROL_PLANE, "ip", "route", "del", *route)
            stack.callback(subprocess.run, gone, check=False, capture_output=True)
        for number, (pod, text) in enumerate(TEXTS.items(), 1):
            balancer = str(BALANCERS[number])
            targets[f"NodePort, {text}"] = balanced(f"outer-{pod}", addresses[pod], balancer)
            by_balancer = load.Target(balancer, cluster.SERVICE_PORT)
            targets[f"LoadBalancer address, {text}"] = by_balancer
        node = stack.enter_context(process_on_the_node())
        for name, target in targets.items():
            wait_for_answer(name, target)
        yield Outside(targets, node)
