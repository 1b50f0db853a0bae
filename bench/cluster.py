# SPDX-License-Identifier: Apache-2.0
"""The cluster that is up, as a test bed: load pods, Services in bulk, quiet CPUs.

The load program is sent into ordinary pods through `kubectl exec`, so it is in the pods' cgroups
and namespaces, where the datapath expects clients. Everything is in one Kubernetes namespace.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from bench import etcd, load
from bench.errors import BenchError
from e2e.cluster import host
from e2e.cluster.binaries import binary_folder
from e2e.cluster.paths import KUBECONFIG

NAMESPACE = "weir-bench"
IMAGE = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"
DIRECT_PORT = 7000
# The Services' backend listens on a port of its own: else direct and translated connections of
# the same client port meet in conntrack, and NAT looks slower than it is.
BACKEND_PORT = 7001
SERVICE_PORT = 80
PARALLEL_REQUESTS = 48
API_DEADLINE_S = 30.0
POD_DEADLINE_S = 60.0
ANSWER_DEADLINE_S = 300.0


def kubeconfig() -> Path:
    return Path(os.environ.get("KUBECONFIG") or KUBECONFIG)


def kubectl_command(*arguments: str) -> list[str]:
    built = binary_folder() / "kubectl"
    program = str(built) if built.exists() else "kubectl"
    return [program, f"--kubeconfig={kubeconfig()}", *arguments]


def kubectl(*arguments: str, text: str | bytes | None = None) -> str:
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(
        kubectl_command(*arguments), input=data, capture_output=True, check=False,
        timeout=ANSWER_DEADLINE_S,
    )  # fmt: skip
    if done.returncode:
        raise BenchError(f"kubectl {' '.join(arguments[:4])}: {done.stderr.decode().strip()}")
    return done.stdout.decode()


def require_up() -> None:
    if not kubeconfig().exists():
        raise BenchError("no cluster is up: run `make cluster` first")
    deadline = time.monotonic() + API_DEADLINE_S
    while True:
        try:
            kubectl("get", "--raw", "/readyz")
        except BenchError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
        else:
            return


# ---- pods ------------------------------------------------------------------------


def pod_manifest(name: str, node: str) -> dict[str, Any]:
    command = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1; done"]
    container = {
        "name": "load",
        "image": IMAGE,
        "command": command,
        "securityContext": {"capabilities": {"add": ["SYS_NICE"]}},  # load.c asks for it
    }
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 1}
    metadata = {"name": name, "labels": {"load": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def apply(*manifests: dict[str, Any]) -> None:
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": manifests})
    kubectl("apply", "-n", NAMESPACE, "-f", "-", text=text)


def execute(pod: str, *command: str, data: bytes | None = None) -> str:
    return kubectl("exec", "-i", "-n", NAMESPACE, pod, "--", *command, text=data)


@contextmanager
def load_pods(places: dict[str, str]) -> Iterator[dict[str, str]]:
    """Pods (name -> node) with the load program in them; gives their addresses.

    Takes down the namespace afterwards, with all that others put into it.
    """
    drop_namespace()
    kubectl("create", "namespace", NAMESPACE)
    try:
        apply(*(pod_manifest(name, node) for name, node in places.items()))
        wait = f"--timeout={POD_DEADLINE_S:.0f}s"
        kubectl("wait", "-n", NAMESPACE, "pod", "--all", "--for=condition=Ready", wait)
        program = load.build().read_bytes()
        for name in places:
            # A file that is still being written cannot be run: give it its name when it is whole.
            put = "cat >/tmp/new && chmod +x /tmp/new && mv /tmp/new /tmp/load"
            execute(name, "sh", "-c", put, data=program)
        pods = json.loads(kubectl("get", "pods", "-n", NAMESPACE, "-o=json"))["items"]
        yield {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in pods}
    finally:
        drop_namespace()


def drop_namespace() -> None:
    kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=true")


@contextmanager
def server(pod: str) -> Iterator[None]:
    """The load server in a pod, on both ports."""
    arguments = load.server_arguments([DIRECT_PORT, BACKEND_PORT])
    command = kubectl_command("exec", "-n", NAMESPACE, pod, "--", "/tmp/load", *arguments)
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                said.seek(0)
                words = said.read().strip()
                raise BenchError(f"the load server in pod {pod} did not start: {words}")
            yield
        finally:
            # Ending kubectl does not end what it started in the pod; the pod goes soon as well.
            with suppress(BenchError):
                execute(pod, "killall", "load")
            process.kill()


def measure(
    pod: str, mode: str, targets: Sequence[load.Target], seconds: float
) -> list[list[float]]:
    output = execute(pod, "/tmp/load", *load.client_arguments(mode, seconds, targets))
    return load.rates(output, len(targets))


def wait_for_answer(pod: str, target: load.Target, what: str) -> float:
    """Seconds until a connection to the target gets an answer."""
    start = time.monotonic()
    arguments = load.client_arguments("crr", 0.001, [target])
    while True:
        try:
            execute(pod, "/tmp/load", *arguments)
        except BenchError as error:
            if time.monotonic() - start > ANSWER_DEADLINE_S:
                raise BenchError(f"{what} never answered; last: {error}") from error
        else:
            return time.monotonic() - start
        time.sleep(0.2)


@contextmanager
def quiet_cpu() -> Iterator[None]:
    """The rest of the cluster keeps off the CPU of client and server, for as long as this lasts."""
    everything = os.sched_getaffinity(0)
    place(everything - {load.CPU} or everything)
    try:
        yield
    finally:
        place(everything)


def place(cpus: set[int]) -> None:
    for pid in [*host.processes(host.cluster_cgroup()), os.getpid()]:
        try:
            if Path(f"/proc/{pid}/comm").read_text() == f"{load.BINARY.name}\n":
                continue  # it pins itself
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cpus)
        except OSError:  # it ended meanwhile, or is the kernel's
            continue


# ---- Services in bulk ------------------------------------------------------------------


def service(name: str) -> dict[str, Any]:
    port = {"name": "load", "port": SERVICE_PORT, "targetPort": BACKEND_PORT, "protocol": "TCP"}
    spec = {"ports": [port], "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def endpoint_slice(name: str, addr: str) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "load", "port": BACKEND_PORT, "protocol": "TCP"}],
        "endpoints": [{"addresses": [addr], "conditions": {"ready": True}}],
    }


@contextmanager
def api_socket() -> Iterator[Path]:
    """A unix socket that speaks to the API server with the kubeconfig's rights."""
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as folder:
        path = Path(folder) / "api.sock"
        command = kubectl_command("proxy", f"--unix-socket={path}")
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                if not process.stdout.readline().startswith("Starting to serve"):
                    raise BenchError("kubectl proxy did not start")
                yield path
            finally:
                process.kill()


async def _create(names: Sequence[str], addr: str, path: Path) -> None:
    pending = iter(names)
    core = f"http://localhost/api/v1/namespaces/{NAMESPACE}/services"
    slices = f"http://localhost/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"

    async def work(session: aiohttp.ClientSession) -> None:
        for name in pending:
            for url, body in ((core, service(name)), (slices, endpoint_slice(name, addr))):
                async with session.post(url, json=body) as answer:
                    if answer.status >= 300:
                        raise BenchError(f"creating {name}: {await answer.text()}")

    connector = aiohttp.UnixConnector(str(path))
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(work(session) for _ in range(PARALLEL_REQUESTS)))


def create_services(names: Sequence[str], addr: str) -> None:
    """Services without a selector, each with an EndpointSlice of one endpoint."""
    with api_socket() as path:
        try:
            asyncio.run(_create(names, addr, path))
        except aiohttp.ClientError as error:
            raise BenchError(
                f"the API server went away while Services were made: {error}"
            ) from error


@contextmanager
def filling(addr: str) -> Iterator[Callable[[int], str]]:
    """Gives a function that makes Services of the backend `addr` until there are so many.

    It returns the last one's name. The namespace's end is theirs; on the local cluster, where
    there may be many of them, they are gone before.
    """
    made = 0
    local = kubeconfig().resolve() == KUBECONFIG.resolve()

    def fill(size: int) -> str:
        nonlocal made
        new, made = range(made, size), size
        if local:
            names = etcd.create(NAMESPACE, new, service("")["spec"]["ports"],
                                endpoint_slice("", addr))  # fmt: skip
        else:
            names = [f"fill-{number}" for number in new]
            create_services(names, addr)
        return names[-1]

    try:
        yield fill
    finally:
        if local:
            etcd.remove(NAMESPACE, range(made))


def cluster_ip(name: str) -> str:
    return kubectl("get", "service", "-n", NAMESPACE, name, "-o=jsonpath={.spec.clusterIP}")
