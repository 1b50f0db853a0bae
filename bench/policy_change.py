# SPDX-License-Identifier: Apache-2.0
"""One change among 30,000 policies and 30,000 pods: from the API's event to the node's maps.

    fake API server → the real operator → the real agent → pinned maps

Both are processes that do all that they do in a cluster: reflectors, model, compiler, gRPC with
TLS, projection, plan, maps. The node has 30 pods. Timed is until the policy generation is raised,
which is the last step of a change that could deny something. Besides: their memory, how long
compiling all of it takes, and the rows of the node's policy map against another design's
(`identities`).
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import quantiles

from support import policy_cluster as world
from support.agents import AgentNode
from support.datapaths import place
from support.namespaces import NetNs
from support.operators import ScriptedOperator

from bench import result
from bench.errors import BenchError
from bench.identities import needed
from bench.operator_process import PORT, ApiThread, OperatorProcess
from weir.datapath import libbpf
from weir.operator import kinds
from weir.operator.app import GC_THRESHOLD
from weir.operator.compiler import Compiler
from weir.operator.revisions import Revisions

# NAMESPACES=30 makes a shorter run.
SHAPE = world.Shape(int(os.environ.get("NAMESPACES", "300")))
COMPILATIONS = 3
CHANGES = 100
RELABELLED_NAMESPACES = NEW_POLICIES = 20
SETTLE_S = 5.0
CHANGE_S = 30.0
READY_S = 180.0
POLL_S = 0.0005
KIB_PER_MIB = 1024
MAPS = {"addresses": 65536, "policy": 65536, "conntrack": 4096, "snat": 4096, "sockNat": 4096}
RUNTIME_BYTES = 16
SIZE = f"{SHAPE.policies:,} policies, {SHAPE.pods:,} pods"


def compiled(all_of_it: world.Objects) -> tuple[float, dict[str, int]]:
    """Seconds of CPU from parsed objects to encoded resources, and what the compiler counted."""
    gc.collect()
    gc.set_threshold(*GC_THRESHOLD)
    start = time.process_time()
    compiler, revisions = Compiler(), Revisions("bench")
    all_of_it.fill(compiler)
    revisions.publish(compiler.flush())
    return time.process_time() - start, compiler.counts()


class Node:
    """The agent's node with its pods, and how to see that a change has arrived."""

    def __init__(self, stack: ExitStack, api: ApiThread, operator: OperatorProcess,
                 agent: AgentNode) -> None:  # fmt: skip
        self.api = api
        self.operator = operator
        self.agent = agent
        runtime = libbpf.get_pinned(agent.pins / "maps" / "runtime")
        if runtime is None:
            raise BenchError("the agent has pinned no map `runtime`")
        self._runtime = runtime
        stack.callback(os.close, runtime)

    def generation(self) -> int:
        found = libbpf.lookup(self._runtime, bytes(4), RUNTIME_BYTES)
        return int.from_bytes((found or b"")[:4], "little")

    def timed(self, change: Callable[[], None]) -> float:
        """Milliseconds until the maps have it."""
        before = self.generation()
        start = time.perf_counter()
        change()
        while self.generation() == before:
            if time.perf_counter() - start > CHANGE_S:
                raise BenchError("a change never reached the maps")
            time.sleep(POLL_S)
        return (time.perf_counter() - start) * 1000

    def settle(self) -> None:
        """Until the generation stands still."""
        while True:
            before = self.generation()
            time.sleep(0.2)
            if self.generation() == before:
                return

    def rows(self, table: str) -> int:
        found = {view["name"]: int(view["rows"]) for view in self.agent.ask("status")["tables"]}
        return found[table]


def resident(pid: int, key: str = "VmRSS") -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{key}:")[2].split()[0]) / KIB_PER_MIB


def changes(node: Node) -> dict[str, list[float]]:
    """Milliseconds of each change, by what it is."""

    def policy(turn: int) -> None:
        changed = world.policy(0, turn % world.APPS, 0, first_port=9000 + turn)
        node.api.put(kinds.POLICY.path, changed)

    def labels(turn: int) -> None:
        """Of a pod elsewhere that rules of pods here select: another app, and so another class."""
        laps, number = divmod(turn, world.PODS - world.PER_NODE)
        number += world.PER_NODE
        changed = world.pod(SHAPE, 0, number, app=f"app{(number + 1 + laps) % world.APPS}")
        node.api.put(kinds.POD.path, changed)

    def namespace(turn: int) -> None:
        """Its hundred pods leave their team, or come back."""
        team = f"team{0 if turn % 2 else 99}"
        node.api.put(kinds.NAMESPACE.path, world.namespace(2, team=team))

    def new_policy(turn: int) -> None:
        """For pods here, by a selector that no policy has had before."""
        made = world.policy(0, turn % world.APPS, 0)
        made["metadata"] = world.metadata(f"fresh-{turn}", world.HOME)
        without = {"key": f"fresh-{turn}", "operator": "DoesNotExist"}
        made["spec"]["podSelector"]["matchExpressions"] = [without]
        node.api.put(kinds.POLICY.path, made)

    found: dict[str, list[float]] = {}
    for name, change, times in (
        ("one policy's rule", policy, CHANGES),
        ("one pod's labels", labels, CHANGES),
        ("one namespace's labels", namespace, RELABELLED_NAMESPACES),
        ("one new policy", new_policy, NEW_POLICIES),
    ):
        found[name] = []
        for turn in range(times):
            node.settle()
            found[name].append(node.timed(partial(change, turn)))
    return found


def run() -> list[result.Result]:
    results = compile_figures()
    with ExitStack() as stack:
        pins, cgroup = stack.enter_context(place())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weir-bench-")))
        # It only lends its certificate's place: the operator is a real one.
        agent = AgentNode(folder, pins, cgroup, ScriptedOperator())
        stack.callback(agent.close)
        api = ApiThread(agent.node.entered())
        stack.callback(api.close)
        for kind, items in (
            (kinds.NODE, world.nodes(SHAPE)),
            (kinds.NAMESPACE, world.namespaces(SHAPE)),
            (kinds.POLICY, world.policies(SHAPE)),
            (kinds.POD, world.pods(SHAPE)),
        ):
            api.fill(kind.path, items)
        api.admit(world.HOME_NODE)
        operator = OperatorProcess(api, folder)
        stack.callback(operator.stop)
        start = time.perf_counter()
        operator.start(agent.node.entered())
        started = time.perf_counter() - start
        (folder / "account" / "operator-ca.crt").write_bytes(operator.ca)
        agent.config |= {"operators": [f"127.0.0.1:{PORT}"], "maps": MAPS}
        start = time.perf_counter()
        agent.start(wait=False)
        agent.wait_ready(READY_S)
        learned = time.perf_counter() - start
        for number in range(world.PER_NODE):
            agent.add(NetNs(), f"p{number}")
        node = Node(stack, api, operator, agent)
        node.settle()
        rows = node.rows("policy")
        times = changes(node)
        time.sleep(SETTLE_S)
        assert agent.process is not None
        results += [
            result.alone(f"operator serves, {SIZE}", "s", [started]),
            result.alone(f"agent ready, {SIZE}", "s", [learned]),
        ]
        for who, pid in (("operator", operator.pid), ("agent", agent.process.pid)):
            memory = [resident(pid)], [resident(pid, "VmHWM")]
            results.append(result.alone(f"RSS of the {who}, {SIZE}", "MiB", memory[0]))
            results.append(result.alone(f"RSS of the {who} at its peak", "MiB", memory[1]))
    for name, values in times.items():
        results.append(result.alone(f"{name} to map, p50", "ms", values))
        slow = quantiles(values, n=100)[98]
        results.append(
            result.Result(f"{name} to map, p99", slow, "ms", "", None, None, len(values))
        )
    return results + row_figures(rows)


def compile_figures() -> list[result.Result]:
    all_of_it = world.objects(SHAPE)
    runs = [compiled(all_of_it) for _ in range(COMPILATIONS)]
    counts = runs[0][1]
    return [
        result.alone(f"compiling {SIZE}", "s of CPU", [seconds for seconds, _ in runs]),
        result.alone("classes, pods' and addresses'", "", [counts["classes"]]),
    ]


def row_figures(rows: int) -> list[result.Result]:
    found = []
    for text, unique in (("a label set a workload", False), ("a label set a pod", True)):
        shape = world.Shape(SHAPE.namespaces, unique)
        those = world.objects(shape)
        home = [pod for pod in those.pods if pod.node == world.HOME_NODE]
        other = needed(those.pods, those.namespaces, those.policies, home)
        peer = f"identities, {text}"
        name = f"rows of the policy map, {len(home)} pods on the node"
        found.append(result.against(name, "rows", peer, [rows], [other.rows]))
    return found
