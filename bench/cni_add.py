# SPDX-License-Identifier: Apache-2.0
"""CNI ADD: Weir's shim and agent against the bridge plugin with host-local.

Whole: from the start of the plugin's process to its end, as a runtime sees it, in turns with the
peer. Agent side: inside the agent, from the parsed request to the answer; also with 100 at once.
The agent's part here is the real CNI service, wiring, address journal, map rows and attaching;
the pod's class is known at once, as it is for a pod that the operator announced before.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bench import result
from bench.errors import BenchError
from bench.namespaces import Namespace
from bench.plugins import bridge_plugin
from bench.weir_node import CLIENT_CLASS, MTU, POD_CIDR, WeirNode, weir_node
from weir.cni.endpoint import EndpointStore, LocalEndpoint, PodRef
from weir.cni.ipam import Pool
from weir.cni.protocol import CniReply, CniRequest, Command
from weir.cni.server import CniServer
from weir.cni.service import CniService
from weir.cni.wiring import Wiring

ROOT = Path(__file__).resolve().parents[1]
SHIM = ROOT / "build" / "shim" / "weir"
ROUNDS = 60
AT_ONCE = 100
CONFIG = '{"cniVersion": "1.0.0", "name": "weir", "type": "weir"}'


class BenchHost:
    """The agent's part in an ADD, on a node without an operator."""

    def __init__(self, node: WeirNode) -> None:
        self._node = node
        self._endpoints: dict[str, LocalEndpoint] = {}

    async def identity(self, pod: PodRef, timeout: float) -> None:  # noqa: ASYNC109 EndpointHost's
        """Known."""

    async def publish(self, endpoint: LocalEndpoint) -> None:
        self._endpoints[endpoint.container_id] = endpoint
        await asyncio.to_thread(self._node.publish, endpoint, CLIENT_CLASS)

    async def attach(self, ifname: str) -> None:
        await asyncio.to_thread(self._node.datapath.attach_pod, ifname)

    async def withdraw(self, container_id: str) -> None:
        endpoint = self._endpoints.pop(container_id, None)
        if endpoint is not None:
            await asyncio.to_thread(self._node.withdraw, endpoint)

    def status(self) -> None:
        """Well."""


class TimedService(CniService):
    """Notes how long each ADD took inside the agent."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]  # handed on as they came
        self.seconds: list[float] = []

    async def handle(self, request: CniRequest) -> CniReply:
        start = time.perf_counter()
        reply = await super().handle(request)
        if request.command is Command.ADD:
            self.seconds.append(time.perf_counter() - start)
        return reply


@contextmanager
def agent(node: WeirNode, folder: Path) -> Iterator[TimedService]:
    """The CNI half of an agent, on a loop in a thread that is in the node's namespace."""
    pool = Pool(folder / "ipam.journal", [POD_CIDR], cooldown=0.0)
    store = EndpointStore(folder / "endpoints")
    ready = threading.Event()
    made: list[TimedService] = []
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        wiring = Wiring(MTU)
        service = TimedService(pool, wiring, BenchHost(node), store)
        await service.start()
        server = CniServer(service, folder / "cni.sock")
        task = asyncio.ensure_future(server.run())
        await server.listening.wait()
        loop = asyncio.get_running_loop()
        made.append(service)
        stop.append(lambda: loop.call_soon_threadsafe(task.cancel))
        ready.set()
        await asyncio.gather(task, return_exceptions=True)
        wiring.close()

    def thread() -> None:
        node.namespace.enter_for_good()
        try:
            asyncio.run(serve())
        finally:
            ready.set()

    runner = threading.Thread(target=thread)
    runner.start()
    ready.wait()
    if not made:
        raise BenchError("the agent's CNI half did not start")
    try:
        yield made[0]
    finally:
        stop[0]()
        runner.join()
        store.close()
        pool.close()


def shim(folder: Path, command: str, container_id: str, netns: str) -> None:
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container_id,
        "CNI_NETNS": netns,
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"K8S_POD_NAMESPACE=bench;K8S_POD_NAME={container_id};K8S_POD_UID=1",
        "WEIR_CNI_SOCKET": str(folder / "cni.sock"),
    }
    done = subprocess.run(
        [SHIM], env=variables, input=CONFIG, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"weir, {command}: {done.stdout}{done.stderr}")


def timed(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return (time.perf_counter() - start) * 1000


def run() -> list[result.Result]:
    # The shim is started from here, the peer from a thread in its node: neither needs nsenter.
    with (
        weir_node() as node,
        bridge_plugin(Namespace()) as bridge,
        tempfile.TemporaryDirectory(prefix="weir-bench-") as name,
    ):
        folder = Path(name)
        node.add_uplink()
        with agent(node, folder) as service:
            weir_ms: list[float] = []
            bridge_ms: list[float] = []
            for number in range(ROUNDS):
                pods = Namespace(), Namespace()
                container = f"round{number}"
                for command, weir, peer in (("ADD", weir_ms, bridge_ms), ("DEL", [], [])):
                    mine, theirs = (pod.path for pod in pods)
                    weir.append(timed(lambda: shim(folder, command, container, mine)))  # noqa: B023
                    peer.append(timed(lambda: bridge.call(command, container, theirs)))  # noqa: B023
                for pod in pods:
                    pod.close()
            inside_ms = [seconds * 1000 for seconds in service.seconds]
            service.seconds.clear()
            many_at_once(folder)
            crowd_ms = sorted(seconds * 1000 for seconds in service.seconds)
    p99 = crowd_ms[int(len(crowd_ms) * 0.99) - 1]
    return [
        result.against("CNI ADD, whole", "ms", "bridge + host-local", weir_ms, bridge_ms),
        result.alone("CNI ADD, agent side", "ms", inside_ms),
        result.Result(f"CNI ADD, agent side, {AT_ONCE} at once, p99", p99, "ms", "", None, None, 1),
    ]


def many_at_once(folder: Path) -> None:
    pods = [Namespace() for _ in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for command in ("ADD", "DEL"):
            jobs = [
                threads.submit(shim, folder, command, f"crowd{number}", pod.path)
                for number, pod in enumerate(pods)
            ]
            for job in jobs:
                job.result()
    for pod in pods:
        pod.close()
