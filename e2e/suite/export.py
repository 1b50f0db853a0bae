# SPDX-License-Identifier: Apache-2.0
"""What a failed test leaves behind in build/e2e/: objects, logs, Weir's tables, drop counters."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from e2e.suite.kubectl import REPOSITORY, command
from e2e.suite.world import LABEL

OUT = REPOSITORY / "build" / "e2e"
_KINDS = ("pods", "services", "endpointslices", "networkpolicies", "clusternetworkpolicies")
_COMMANDS = ("status", "endpoints", "services", "policies", "policy denials")
_AGENT = "app.kubernetes.io/name=weir-agent"
_OPERATOR = "app.kubernetes.io/name=weir-operator"


def export(test: str, weir: str) -> Path:
    """Collect what is there; what cannot be had is a note in its file, never another failure."""
    folder = OUT / re.sub(r"[^\w.-]+", "_", test)
    folder.mkdir(parents=True, exist_ok=True)
    space = f"--namespace={weir}"
    save(folder / "nodes.txt", "get", "nodes", "--output=wide")
    save(folder / "pods.txt", "get", "pods", "--all-namespaces", "--output=wide")
    save(folder / "events.txt", "get", "events", "--all-namespaces", "--sort-by=.lastTimestamp")
    for kind in _KINDS:
        save(folder / f"{kind}.yaml", "get", kind, "--all-namespaces", "--output=yaml")
    save(folder / "namespaces.yaml", "get", "namespaces", f"--selector={LABEL}", "--output=yaml")
    for part, selector in (("agent", _AGENT), ("operator", _OPERATOR)):
        listing = run("get", "pods", space, f"--selector={selector}", "--output=name")
        for pod in listing.split():
            name = pod.rpartition("/")[2]
            save(folder / f"{name}.log", "logs", space, name, "--tail=2000")
            save(folder / f"{name}.previous.log", "logs", space, name, "--previous", "--tail=2000")
            if part == "agent":
                for what in _COMMANDS:
                    target = folder / f"{name}.{what.replace(' ', '-')}.json"
                    save(target, "exec", space, name, "--", "weir", *what.split(), "-o", "json")
    return folder


def save(path: Path, *arguments: str) -> None:
    path.write_text(run(*arguments))


def run(*arguments: str) -> str:
    try:
        done = subprocess.run(
            command(*arguments), capture_output=True, text=True, check=False, timeout=20
        )
    except subprocess.TimeoutExpired:
        return f"kubectl {' '.join(arguments)}: no answer in 20 s\n"
    return done.stdout + done.stderr
