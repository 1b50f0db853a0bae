# SPDX-License-Identifier: Apache-2.0
"""Entry point: `python -m bench [NAME,...]`, and `--inside NAME FILE` for one in its own process.

Each benchmark is a process: what it made (namespaces, mounts, pins) goes when it ends, however
it ends. Those that need no cluster have a mount namespace of their own as well.
"""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import result
from bench.errors import BenchError

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "bench.json"
# Name (module bench.NAME) -> what it compares. In the order of running.
LOCAL = {
    "pod_to_pod": "two pods on a node, policy on, against a direct veth and the bridge plugin",
    "from_pod": "one packet of an established flow through from_pod, by test run",
    "programs": "nanoseconds a packet in each program, on every path of Services and pods",
    "xdp": "the blocklist and a NodePort's packets in XDP against tc, by test run",
    "cni_add": "CNI ADD against bridge + host-local",
    "cold_start": "empty maps to 10,000 services",
    "agent_memory": "RSS of the agent with 10,000 services and 50,000 pods, and its reaction",
    "policy_packet": "new flows with 0, 1 and 1,000 rules through from_pod, by test run",
    "policy_change": "API event to map, memory and rows at 30,000 policies and 30,000 pods",
}
CLUSTER = {
    "cluster_ip": "connects to a ClusterIP against the pod's address, 10 and 10,000 services",
    "node_port": "connects from outside by NodePort and LoadBalancer address, 1 and 1,000 clients",
    "memory": "RSS of agent and operator",
    "kube_proxy": "all these connects against bridge + kube-proxy (makes its own clusters)",
    "policy_connect": "10 and 1,000 policies, against kube-router's firewall (makes its clusters)",
}
PRIVATE_MOUNTS = ("unshare", "--mount", "--propagation", "private")


def inside(name: str, path: Path) -> int:
    """One benchmark, in this process."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        module = importlib.import_module(f"bench.{name}")
        result.write(module.run(), path)
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def run(name: str) -> list[result.Result]:
    """One benchmark in a process of its own. Raises BenchError when it failed."""
    wrap = PRIVATE_MOUNTS if name in LOCAL else ()
    with tempfile.NamedTemporaryFile(prefix="weir-bench-", suffix=".json") as output:
        command = [*wrap, sys.executable, "-m", "bench", "--inside", name, output.name]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
        done = subprocess.run(command, check=False, env=environment)
        if done.returncode:
            raise BenchError(f"{name} failed")
        return result.read(Path(output.name))


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1], Path(arguments[2]))
    known = LOCAL | CLUSTER
    wanted = [name for argument in arguments for name in argument.split(",")] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        print(f"no benchmark {', '.join(unknown)}; there are:", file=sys.stderr)
        for name, text in known.items():
            print(f"  {name:<12} {text}", file=sys.stderr)
        return 2
    results: list[result.Result] = []
    failed = []
    for name in wanted:
        print(f"{name}: {known[name]}", flush=True)
        start = time.monotonic()
        try:
            results += run(name)
        except BenchError:
            failed.append(name)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    result.write(results, OUTPUT)
    print(f"\n{result.table(results)}\n\nwritten to {OUTPUT.relative_to(ROOT)}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
