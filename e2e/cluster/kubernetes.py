# SPDX-License-Identifier: Apache-2.0
"""What the start-up asks of the API server, through kubectl."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.binaries import binary_folder
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import KUBECONFIG


@dataclass(frozen=True, slots=True)
class Node:
    """What matters here of a Node object."""

    name: str
    pod_cidrs: tuple[str, ...]
    ready: bool


def kubectl(*arguments: str, text: str | None = None) -> str:
    """Run kubectl on the cluster that is up; its standard output."""
    result = _kubectl(arguments, text)
    if result.returncode:
        raise ClusterError(f"kubectl {' '.join(arguments[:3])} failed: {result.stderr.strip()}")
    return result.stdout


def api_is_ready() -> bool:
    return _kubectl(("get", "--raw", "/readyz"), None).returncode == 0


def nodes() -> list[Node]:
    """All nodes that have registered."""
    return [_parse_node(item) for item in json.loads(kubectl("get", "nodes", "-o=json"))["items"]]


def is_available(namespace: str, deployment: str) -> bool:
    """Whether all replicas of a Deployment are available."""
    status = json.loads(kubectl("get", "deployment", deployment, f"-n={namespace}", "-o=json"))[
        "status"
    ]
    return bool(status.get("availableReplicas", 0) == status.get("replicas"))


def _parse_node(item: dict[str, dict[str, object]]) -> Node:
    conditions = item["status"].get("conditions", [])
    cidrs = item["spec"].get("podCIDRs", [])
    assert isinstance(conditions, list)
    assert isinstance(cidrs, list)
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return Node(str(item["metadata"]["name"]), tuple(map(str, cidrs)), ready)


def _kubectl(arguments: tuple[str, ...], text: str | None) -> "subprocess.CompletedProcess[str]":
    command = [str(_program()), f"--kubeconfig={KUBECONFIG}", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False)


def _program() -> Path:
    return binary_folder() / "kubectl"
