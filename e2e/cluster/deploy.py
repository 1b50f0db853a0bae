# SPDX-License-Identifier: Apache-2.0
"""Put Weir on the cluster that is up: build its image, import it into every node, run helm."""

import os
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from e2e.cluster import namespaces
from e2e.cluster.binaries import binary_folder
from e2e.cluster.errors import ClusterError
from e2e.cluster.nodeconfig import CONTAINERD_SOCKET
from e2e.cluster.paths import KUBECONFIG, REPOSITORY
from e2e.cluster.progress import Progress
from e2e.cluster.settings import Settings

IMAGE_ARCHIVE = REPOSITORY / "build/image/weir.oci.tar"
IMAGE_REFERENCE = REPOSITORY / "build/image/reference"  # its tag names its content
CHART = REPOSITORY / "charts/weir"
_CTR = ("ctr", f"--address={CONTAINERD_SOCKET}", "--namespace=k8s.io")
_IMPORT_S = 30.0
_HELM_TIMEOUT = "3m"


def deploy(settings: Settings, progress: Progress) -> None:
    """Import the image that was built last, and `helm upgrade --install`."""
    repository, _, tag = reference().rpartition(":")
    missing = [name for name in settings.node_names if not _has_image(name, reference())]
    load_image(missing, IMAGE_ARCHIVE)
    progress.step("Weir's image in all nodes")
    # The tag changes with the image, so a changed Weir is an upgrade that rolls out.
    values = {
        "image.repository": repository,
        "image.tag": tag,
        "routing": settings.routing.value,
    }
    flags = [f"--set-string={name}={value}" for name, value in values.items()]
    helm = [str(binary_folder() / "helm"), "upgrade", "--install", "weir", str(CHART)]
    helm += ["--namespace=kube-system", f"--kubeconfig={KUBECONFIG}", *flags]
    _command("helm", [*helm, "--wait", f"--timeout={_HELM_TIMEOUT}"])
    progress.step("Weir installed by helm")
    # helm is content with all nodes but maxUnavailable.
    kubectl = [str(binary_folder() / "kubectl"), f"--kubeconfig={KUBECONFIG}"]
    rollout = ["--namespace=kube-system", "rollout", "status", "daemonset/weir-agent"]
    _command("kubectl", [*kubectl, *rollout, f"--timeout={_HELM_TIMEOUT}"])
    progress.step("an agent ready on every node")


def build_image() -> None:
    """Make `build/image` current; quick when nothing changed."""
    _command("the image", ["make", "--no-print-directory", "image"])


def reference() -> str:
    """The name of the image that was built last."""
    return IMAGE_REFERENCE.read_text().strip()


def load_image(nodes: Iterable[str], archive: Path) -> None:
    """Import an image tar (docker or OCI) into the containerd of these nodes."""
    if not archive.exists():
        raise ClusterError(f"no image archive {archive}", "run `make image`")
    imports: list[tuple[str, subprocess.Popen[str]]] = []
    for name in nodes:  # all at once: unpacking waits for the disk
        _wait_for_containerd(name)
        # Standard input: the file need not be visible inside the node.
        with archive.open("rb") as content:
            imports.append(
                (name, namespaces.start(name, [*_CTR, "images", "import", "-"], content))
            )
    for name, process in imports:
        _, message = process.communicate()
        if process.returncode:
            raise ClusterError(f"{name} did not take {archive}: {message.strip()}")


def _wait_for_containerd(name: str) -> None:
    deadline = time.monotonic() + _IMPORT_S
    while not _output(name, [*_CTR, "version"]):
        if time.monotonic() > deadline:
            raise ClusterError(f"containerd of {name} does not answer", "see `make cluster-status`")
        time.sleep(0.1)


def _has_image(name: str, image: str) -> bool:
    _wait_for_containerd(name)
    return image in _output(name, [*_CTR, "images", "list", "--quiet"]).split()


def _output(name: str, command: list[str]) -> str:
    """What a command in a node prints; nothing if it fails."""
    process = namespaces.start(name, command)
    output, _ = process.communicate()
    return output if process.returncode == 0 else ""


def _command(what: str, command: list[str]) -> None:
    result = subprocess.run(command, cwd=REPOSITORY, env=os.environ, check=False)
    if result.returncode:
        raise ClusterError(f"{what}: `{' '.join(command[:4])}` failed ({result.returncode})")
