# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the cluster suite. It needs kubectl and a cluster with Weir, nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator
from typing import Any

import pytest

from e2e.suite import export, world
from e2e.suite.kubectl import Manifest, apply, command, delete, get, kubectl
from e2e.suite.outsider import Outsider, outsider
from e2e.suite.world import World

EXPORTS = 3  # of each test function: a table of hundreds of rows may fail as a whole
_exports: Counter[str] = Counter()


@pytest.fixture(scope="session")
def cluster() -> Iterator[World]:
    """The shared pods; their namespaces are deleted in the background at the end."""
    built = world.build()
    yield built
    for probe in built.probes.values():
        probe.close()
    kubectl("delete", "namespaces", built.a, built.b, "--wait=false")


@pytest.fixture(scope="session")
def outside_client() -> Iterator[Outsider]:
    with outsider() as made:
        yield made


class Objects:
    """Creates objects for one test, which are deleted when it ends."""

    def __init__(self) -> None:
        self.made: list[Manifest] = []

    def apply(self, *manifests: Manifest) -> None:
        self.made += manifests
        apply(*manifests)

    def delete(self, *manifests: Manifest, wait: bool = True) -> None:
        delete(*manifests, wait=wait)
        self.made = [made for made in self.made if made not in manifests]


@pytest.fixture
def objects() -> Iterator[Objects]:
    made = Objects()
    yield made
    if made.made:
        delete(*made.made, wait=True)


@pytest.fixture
def monitor(cluster: World) -> Iterator[list[dict[str, Any]]]:
    """The events that `weir monitor` prints, as they come, from the agents of both nodes."""
    seen: list[dict[str, Any]] = []
    processes = []
    for item in get("pods", "--selector=app.kubernetes.io/name=weir-agent",
                    f"--namespace={cluster.weir}")["items"]:  # fmt: skip
        where = [item["metadata"]["name"], f"--namespace={cluster.weir}"]
        arguments = command("exec", *where, "--", "weir", "monitor", "-o", "json")
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        threading.Thread(target=collect, args=(process, seen), daemon=True).start()
    time.sleep(1)  # subscribing has no acknowledgement
    yield seen
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def collect(process: subprocess.Popen[str], seen: list[dict[str, Any]]) -> None:
    assert process.stdout is not None
    try:
        seen.extend(json.loads(line) for line in process.stdout)
    except ValueError:
        return  # closed, or cut at the end


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Export the cluster's state while it is still as the failure left it."""
    del call
    report = yield
    function = item.nodeid.partition("[")[0]
    if report.failed and report.when in {"setup", "call"} and _exports[function] < EXPORTS:
        _exports[function] += 1
        folder = export.export(item.nodeid.rpartition("/")[2], namespace_of_weir(item))
        report.sections.append(("exported", str(folder)))
        sys.stderr.write(f"\nexported to {folder}\n")
    return report


def namespace_of_weir(item: pytest.Item) -> str:
    arguments: dict[str, Any] = getattr(item, "funcargs", {})
    shared = arguments.get("cluster")
    return shared.weir if isinstance(shared, World) else "kube-system"
