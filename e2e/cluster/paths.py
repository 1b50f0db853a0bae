# SPDX-License-Identifier: Apache-2.0
"""Where a cluster keeps its files: everything is below build/cluster of the checkout."""

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STATE = REPOSITORY / "build" / "cluster"
KUBECONFIG = STATE / "kubeconfig"
SETTINGS = STATE / "cluster.json"
COMPLETE = STATE / "complete"  # there once a start got through; else the next one starts over
PKI = STATE / "pki"
ETCD = STATE / "etcd"
NODES = STATE / "nodes"
LOGS = STATE / "log"
RUN = STATE / "run"
IMAGE_STORE = STATE / "images"  # survives `make cluster-down`: makes the next start fast


@dataclass(frozen=True, slots=True)
class Place:
    """The folders of the control plane or of one node, as the machine sees them."""

    name: str

    @property
    def root(self) -> Path:
        """The root file system of a node."""
        return NODES / self.name / "root"

    @property
    def log(self) -> Path:
        return LOGS / self.name

    @property
    def run(self) -> Path:
        """PIDs of the components, inside their PID namespace."""
        return RUN / self.name
