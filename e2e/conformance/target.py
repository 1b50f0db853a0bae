# SPDX-License-Identifier: Apache-2.0
"""The cluster that a suite runs against, and how its program is started there.

Suites talk to node addresses too. For the local cluster that works in the control plane's network,
where the API server has its underlay address.
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import binaries, host, namespaces
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import KUBECONFIG, PKI, REPOSITORY, SETTINGS
from e2e.cluster.settings import CONTROL_PLANE, Cni, load_settings

OUTPUT = REPOSITORY / "build" / "conformance"


@dataclass(frozen=True, slots=True)
class Target:
    """`config` is the kubeconfig as the suite's program can use it."""

    kubeconfig: Path
    local: bool

    @property
    def config(self) -> Path:
        return PKI / "admin.conf" if self.local else self.kubeconfig

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[str]:
        """The program with its output, errors too, in a pipe."""
        if self.local:
            command = namespaces.entered(CONTROL_PLANE, command, only_network=True)
        return subprocess.Popen(
            command,
            cwd=OUTPUT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_join_control_plane if self.local else None,  # noqa: PLW1509 - no threads
        )

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        """Its output; that it fails means that the cluster does not answer."""
        program = binaries.binary_folder() / "kubectl"
        command = [str(program), f"--kubeconfig={self.kubeconfig}", *arguments]
        result = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ClusterError(f"the cluster of {self.kubeconfig}: {result.stderr.strip()}")
        return result.stdout

    def describe(self) -> tuple[str, str]:
        """A name of the cluster's stack for a file, and its settings for people."""
        if not self.local:
            return "cluster", str(self.kubeconfig)
        settings = load_settings(SETTINGS)
        weir = settings.cni is Cni.WEIR
        cni = f"{settings.cni}-{settings.routing}" if weir else str(settings.cni)
        proxy = "" if settings.kube_proxy == "none" else f"-kube-proxy-{settings.kube_proxy}"
        firewall = "" if settings.netpol == "none" else f"-{settings.netpol}"
        return cni + proxy + firewall, settings.describe()


def find() -> Target:
    """The one that KUBECONFIG names, or the local one."""
    given = os.environ.get("KUBECONFIG")
    kubeconfig = Path(given).resolve() if given else KUBECONFIG
    if not kubeconfig.exists():
        raise ClusterError(f"no kubeconfig {kubeconfig}", "run `make cluster`, or set KUBECONFIG")
    return Target(kubeconfig, kubeconfig == KUBECONFIG)


def _join_control_plane() -> None:
    """Into the cluster's cgroup, so that `make cluster-down` ends a run that was left alone."""
    namespaces.join(host.cluster_cgroup() / CONTROL_PLANE / "system")
