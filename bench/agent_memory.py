# SPDX-License-Identifier: Apache-2.0
"""The agent as a process, fed with a large cluster: memory, and how soon a change is in the maps.

10,000 Services of 5 endpoints and 50,000 pods, from a scripted operator that sends what a real one
would. Measured: RSS with nothing, with all of it, and after a restart from the state file;
the time from a changed slice to the agent's acknowledgement, which says that the maps have it.
"""

from __future__ import annotations

import ipaddress
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import quantiles

from support.agents import AgentNode, class_resource, node_resource, selector_resource
from support.datapaths import place
from support.operators import ScriptedOperator

from bench import result
from weir.api import address
from weir.api.v1 import weir_pb2 as pb

SERVICES = 10_000
ENDPOINTS = 5
CLASSES = 20
CHANGES = 100
SETTLE_S = 5.0
TCP = 6
KIB_PER_MIB = 1024
MAPS = {"services": 65536, "backends": 524288, "addresses": 262144, "policy": 65536}


def numbered(base: str, number: int) -> address.Addr:
    return address.parse(str(ipaddress.ip_address(base) + number))


def slice_resource(number: int, first: int, count: int) -> pb.Resource:
    """A Service's slice, with `count` pods from the pod number `first` on."""
    made = pb.Resource(name=f"slice/bench/service-{number}-abcde")
    made.slice.namespace, made.slice.service = "bench", f"service-{number}"
    made.slice.ports.add(name="http", protocol=TCP, port=8080)
    for pod in range(first, first + count):
        addr = numbered("10.128.0.0", pod)
        made.slice.endpoints.add(address=addr, ready=True, serving=True)
    return made


def cluster() -> list[pb.Resource]:
    found = [selector_resource(n, f"pods ns=bench app=a{n}") for n in range(1, CLASSES + 1)]
    found += [class_resource(n, n) for n in range(1, CLASSES + 1)]
    for pod in range(SERVICES * ENDPOINTS):
        addr = numbered("10.128.0.0", pod)
        name = f"service-{pod // ENDPOINTS}-6d4cf56db6-{pod:05x}"
        made = pb.Resource(name=f"address/{addr.hex()}")
        made.address.address, made.address.namespace, made.address.pod = addr, "bench", name
        setattr(made.address, "class", pod % CLASSES + 1)
        found.append(made)
    for number in range(SERVICES):
        made = pb.Resource(name=f"service/bench/service-{number}")
        made.service.namespace, made.service.name = "bench", f"service-{number}"
        made.service.cluster_ips.append(numbered("10.96.0.0", number + 1))
        made.service.ports.add(name="http", protocol=TCP, port=80)
        found += [made, slice_resource(number, number * ENDPOINTS, ENDPOINTS)]
    return found


def resident(agent: AgentNode, key: str = "VmRSS") -> float:
    time.sleep(SETTLE_S)
    assert agent.process is not None
    status = Path(f"/proc/{agent.process.pid}/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / KIB_PER_MIB


def changes(operator: ScriptedOperator) -> list[float]:
    """Milliseconds from a changed slice to its acknowledgement."""
    found = []
    for number in range(CHANGES):
        began = time.perf_counter()
        operator.wait_acknowledged(operator.set(slice_resource(number * 7, 0, ENDPOINTS - 1)))
        found.append((time.perf_counter() - began) * 1000)
    return found


def run() -> list[result.Result]:
    operator = ScriptedOperator()
    operator.set(node_resource("node1", ["192.0.2.1"], ["10.244.1.0/24"]))
    figures: dict[str, float] = {}
    with ExitStack() as stack:
        pins, cgroup = stack.enter_context(place())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weir-bench-")))
        agent = AgentNode(folder, pins, cgroup, operator)
        stack.callback(agent.close)
        agent.config["maps"] = MAPS | {"conntrack": 4096, "snat": 4096, "sockNat": 4096}
        operator._where = agent.node.entered()
        stack.callback(operator.stop)
        port = operator.start()
        agent.config["operators"] = [f"127.0.0.1:{port}"]
        agent.start()
        figures["empty"] = resident(agent)
        operator.stop()
        # Another instance: the agent gets a snapshot, as at its first start in such a cluster.
        operator.instance = "two"
        operator.set(*cluster())
        operator._where = agent.node.entered()
        operator.start(port)
        operator.wait_acknowledged(operator.revision, 120)
        figures["full"] = resident(agent)
        figures["at its peak"] = resident(agent, "VmHWM")
        seconds = changes(operator)
        operator.stop()
        agent.stop()
        agent.start()
        figures["restarted without an operator"] = resident(agent)
    size = f"{SERVICES} services of {ENDPOINTS}"
    return [
        *(result.alone(f"RSS of the agent, {name}", "MiB", [v]) for name, v in figures.items()),
        result.alone(f"service change to map, {size}, p50", "ms", seconds),
        result.alone(f"service change to map, {size}, p99", "ms", [quantiles(seconds, n=100)[98]]),
    ]
