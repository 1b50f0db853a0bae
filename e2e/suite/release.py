# SPDX-License-Identifier: Apache-2.0
"""The helm release that Weir was installed by. Only the local cluster's may be changed."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from e2e.suite.kubectl import REPOSITORY, KubectlError, is_local, kubeconfig, kubectl, program

CHART = REPOSITORY / "charts" / "weir"
WAIT_S = 180


class Release:
    def __init__(self, weir: str) -> None:
        """weir: the namespace that it is in."""
        if not is_local():
            pytest.skip("only the local cluster's release may be changed")
        self._weir = weir
        self._helm = [program("helm"), f"--kubeconfig={kubeconfig()}", f"--namespace={weir}"]

    def values(self) -> dict[str, Any]:
        """Defaults included."""
        found: dict[str, Any] = json.loads(
            _run([*self._helm, "get", "values", "weir", "--all", "--output=json"])
        )
        return found

    def upgrade(self, **changes: object) -> None:
        """Returns when it is rolled out; the values not named stay. A dot in a name is `__`."""
        flags = [f"--set={name.replace('__', '.')}={value}" for name, value in changes.items()]
        wait = ["--reuse-values", "--wait", f"--timeout={WAIT_S}s"]
        _run([*self._helm, "upgrade", "weir", str(CHART), *flags, *wait])
        # helm is content with all nodes but maxUnavailable.
        kubectl("rollout", "status", "daemonset/weir-agent", f"--namespace={self._weir}",
                f"--timeout={WAIT_S}s", timeout=WAIT_S)  # fmt: skip


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S + 20)
    if done.returncode:
        raise KubectlError(f"{' '.join(command[:5])}: {done.stderr.strip()}")
    return done.stdout
