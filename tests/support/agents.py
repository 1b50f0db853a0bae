# SPDX-License-Identifier: Apache-2.0
"""The real agent as a process on a node made of namespaces, fed by a scripted operator."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from support.namespaces import NetNs, veth
from support.operators import ScriptedOperator
from weir.api.address import parse, parse_cidr
from weir.api.v1 import weir_pb2 as pb

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "build" / "shim" / "weir"
SECONDS = 30


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(self._path))


class AgentNode:
    """A node namespace with an uplink on a bridge, and the agent in it. `start` may be repeated.

    `neighbour`: another node, whose segment this one joins.
    """

    def __init__(
        self,
        folder: Path,
        pins: Path,
        cgroup: Path,
        operator: ScriptedOperator,
        number: int = 1,
        neighbour: AgentNode | None = None,
        **config: object,
    ) -> None:
        self.number = number
        self.folder = folder
        self.pins = pins
        self.node = NetNs()
        self.outside: NetNs = neighbour.outside if neighbour else NetNs()
        self.operator = operator
        self.process: subprocess.Popen[bytes] | None = None
        if neighbour is None:
            self.outside.run("ip", "link", "add", "br0", "type", "bridge")
            self.outside.run("ip", "link", "set", "br0", "up")
            self._address(self.outside, 254, "br0")
        veth("eth0", self.node, f"node{number}", self.outside)
        self.outside.run("ip", "link", "set", f"node{number}", "master", "br0")
        self._address(self.node, number, "eth0")
        self.node.run("ip", "route", "add", "default", "via", "192.0.2.254")
        (folder / "account").mkdir()
        (folder / "account" / "operator-ca.crt").write_bytes(operator.ca)
        (folder / "token").write_text("secret")
        paths = {
            "pins": str(pins),
            "cgroup": str(cgroup),
            "sysctls": "/proc/sys",
            "state": str(folder / "state"),
            "run": str(folder / "run"),
            "token": str(folder / "token"),
            "service_account": str(folder / "account"),
            "cni_bin": str(folder / "bin"),
            "cni_conf": str(folder / "conf"),
            "shim": str(SHIM),
        }
        maps = {"conntrack": 4096, "snat": 4096, "sockNat": 4096, "services": 4096}
        maps |= {"backends": 16384, "addresses": 65536, "policy": 65536}
        self.config: dict[str, object] = {
            "operators": [f"127.0.0.1:{operator.port}"],
            "paths": paths,
            "maps": maps,
        }
        self.config |= config

    @staticmethod
    def _address(net: NetNs, last: int, device: str) -> None:
        net.run("ip", "address", "add", f"192.0.2.{last}/24", "dev", device)
        net.run("ip", "address", "add", f"2001:db8::{last}/64", "dev", device, "nodad")

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def start(self, wait: bool = True) -> None:
        self.process = self.run_module("weir.agent")
        if wait:
            self.wait_ready()

    def run_module(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """`python -m NAME` on the node, with the agent's configuration."""
        path = self.folder / "config.yaml"
        path.write_text(json.dumps(self.config))
        environment = {
            **os.environ,
            "NODE_NAME": f"node{self.number}",
            "POD_NAMESPACE": "weir",
            "HOST_IP": f"192.0.2.{self.number}",
        }
        with self.node.entered(), (self.folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", name, "--config", str(path), *arguments],
                env=environment,
                stdout=log,
                stderr=log,
            )

    def wait_ready(self, seconds: float = SECONDS) -> None:
        deadline = time.monotonic() + seconds
        last: object = "nothing"
        while time.monotonic() < deadline:
            assert self.process is not None
            assert self.process.poll() is None, self.log
            try:
                last = self.ask("status")
            except OSError as error:
                last = error
            else:
                if isinstance(last, dict) and last["ready"]:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready: {last}\n{self.log}")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.send_signal(number)
            self.process.wait(SECONDS)
            self.process = None

    def close(self) -> None:
        self.stop(signal.SIGKILL)
        self.node.close()
        self.outside.close()

    def ask(self, what: str) -> Any:
        connection = UnixConnection(self.folder / "run" / "agent.sock")
        try:
            connection.request("GET", f"/v1/{what}")
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def cni(self, command: str, pod: NetNs, name: str) -> Any:
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME={name};K8S_POD_UID=u-{name}"
        done = subprocess.run(
            [str(SHIM)],
            input=json.dumps({"cniVersion": "1.1.0", "name": "weir", "type": "weir"}).encode(),
            capture_output=True,
            timeout=SECONDS,
            check=False,
            env={
                "CNI_COMMAND": command,
                "CNI_PATH": str(SHIM.parent),
                "CNI_CONTAINERID": f"c-{name}",
                "CNI_NETNS": pod.path,
                "CNI_IFNAME": "eth0",
                "CNI_ARGS": args,
                "WEIR_CNI_SOCKET": str(self.folder / "run" / "cni.sock"),
            },
        )
        answer = json.loads(done.stdout) if done.stdout else None
        assert done.returncode == 0, (answer, done.stderr, self.log)
        return answer

    def add(self, pod: NetNs, name: str) -> list[str]:
        """The pod's addresses."""
        answer = self.cni("ADD", pod, name)
        return [ip["address"].partition("/")[0] for ip in answer["ips"]]


def node_resource(name: str, addresses: list[str], cidrs: list[str]) -> pb.Resource:
    prefixes = [parse_cidr(text) for text in cidrs]
    return pb.Resource(
        name=f"node/{name}",
        node=pb.Node(
            name=name,
            addresses=[parse(text) for text in addresses],
            pod_cidrs=[pb.Cidr(address=p.address, bits=p.bits) for p in prefixes],
        ),
    )


def address_resource(address: str, name: str, number: int) -> pb.Resource:
    raw = parse(address)
    resource = pb.Resource(name=f"address/{raw.hex()}")
    resource.address.address, resource.address.namespace, resource.address.pod = raw, "ns", name
    setattr(resource.address, "class", number)
    return resource


def class_resource(number: int, *selectors: int) -> pb.Resource:
    resource = pb.Resource(name=f"class/{number}")
    getattr(resource, "class").number = number
    getattr(resource, "class").selectors.extend(selectors)
    getattr(resource, "class").SetInParent()
    return resource


def selector_resource(number: int, key: str) -> pb.Resource:
    return pb.Resource(name=f"selector/{number}", selector=pb.Selector(number=number, key=key))


def pod_resource(name: str, number: int) -> pb.Resource:
    pod = pb.Pod(namespace="ns", name=name, uid=f"u-{name}")
    setattr(pod, "class", number)
    return pb.Resource(name=f"pod/u-{name}", pod=pod)


def service_resources(
    name: str, vips: list[str], port: int, backends: dict[str, int]
) -> list[pb.Resource]:
    """A service and one slice for each backend address."""
    service = pb.Service(
        namespace="ns",
        name=name,
        cluster_ips=[parse(vip) for vip in vips],
        ports=[pb.ServicePort(name="p", protocol=protocol, port=port) for protocol in (6,)],
    )
    result = [pb.Resource(name=f"service/ns/{name}", service=service)]
    for number, (address, target) in enumerate(backends.items()):
        endpoint = pb.SliceEndpoint(address=parse(address), ready=True, serving=True)
        item = pb.Slice(
            namespace="ns",
            service=name,
            ports=[pb.SlicePort(name="p", protocol=6, port=target)],
            endpoints=[endpoint],
        )
        result.append(pb.Resource(name=f"slice/ns/{name}-{number}", slice=item))
    return result
