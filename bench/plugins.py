# SPDX-License-Identifier: Apache-2.0
"""The peer among CNI plugins: bridge with host-local, as Debian packages them."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError
from bench.namespaces import Namespace

FOLDERS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))


@dataclass(frozen=True, slots=True)
class BridgePlugin:
    """The plugin with one network configuration. `thread` is in a node's namespace."""

    thread: ThreadPoolExecutor
    folder: Path
    config: str

    def call(self, command: str, container_id: str, netns: str) -> str:
        """Runs the plugin as a runtime does; returns what it printed."""
        variables = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(self.folder),
        }
        start = self.thread.submit(
            subprocess.run,
            [self.folder / "bridge"],
            env=variables, input=self.config, capture_output=True, text=True, check=False,
        )  # fmt: skip
        done = start.result()
        if done.returncode:
            raise BenchError(f"bridge plugin, {command}: {done.stdout}{done.stderr}")
        return done.stdout

    def add(self, container_id: str, pod: Namespace) -> str:
        """Wires the pod; returns its address."""
        answer = json.loads(self.call("ADD", container_id, pod.path))
        addr: str = answer["ips"][0]["address"]
        return addr.partition("/")[0]


@contextmanager
def bridge_plugin(node: Namespace) -> Iterator[BridgePlugin]:
    folder = next((f for f in FOLDERS if (f / "bridge").exists()), None)
    if folder is None:
        raise BenchError("no bridge plugin: install containernetworking-plugins (make setup)")
    with tempfile.TemporaryDirectory(prefix="weir-bench-") as data:
        config = {
            "cniVersion": "1.0.0",
            "name": "bench",
            "type": "bridge",
            "bridge": "bench0",
            "isGateway": True,
            "ipam": {
                "type": "host-local",
                "dataDir": data,
                "ranges": [[{"subnet": "10.98.0.0/16"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
        with ThreadPoolExecutor(1, initializer=node.enter_for_good) as thread:
            yield BridgePlugin(thread, folder, json.dumps(config))
