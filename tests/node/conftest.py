# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the node ring: real devices, links and traffic, in namespaces of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.agents import (
    SHIM,
    AgentNode,
    class_resource,
    node_resource,
    pod_resource,
    selector_resource,
)
from support.datapaths import place
from support.namespaces import NetNs
from support.objects import compile_mini
from support.operators import ScriptedOperator

from weir.datapath import features
from weir.datapath.datapath import Datapath
from weir.datapath.features import Features
from weir.datapath.settings import Settings, Sizes

Compile = Callable[..., Path]
CIDRS = ["10.244.1.0/24", "fd00:244:1::/64"]


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles mini.bpf.c with macros, each combination once."""
    folder = tmp_path_factory.mktemp("objects")
    made: dict[tuple[tuple[str, int], ...], Path] = {}

    def compile_once(**defines: int) -> Path:
        key = tuple(sorted(defines.items()))
        if key not in made:
            made[key] = compile_mini(folder, **defines)
        return made[key]

    return compile_once


@pytest.fixture(scope="session", params=["tcx", "clsact"])
def kernel(request: pytest.FixtureRequest) -> Features:
    """The kernel as it is, and as if it had no TCX."""
    real = features.probe()
    if request.param == "tcx" and not real.tcx:
        return real  # an old kernel: both runs take the other path
    return Features(
        request.param == "tcx", real.set_retval, real.redirect_peer, real.loop, real.kernel
    )


class Installation:
    """A bpffs and a cgroup of its own, opened as often as the test likes."""

    def __init__(self, root: Path, cgroup: Path, mini: Compile) -> None:
        self.root = root
        self.cgroup = cgroup
        self._mini = mini
        self._opened: list[Datapath] = []

    def open(
        self,
        settings: Settings | None = None,
        sizes: Sizes | None = None,
        kernel: Features | None = None,
        **defines: int,
    ) -> Datapath:
        """As an agent's start does; what was open before is closed first, as by its end."""
        self.close()
        datapath = Datapath.open(
            self.root,
            self.cgroup,
            settings or Settings(),
            sizes,
            objects=[self._mini(**defines)],
            features=kernel,
        )
        self._opened.append(datapath)
        return datapath

    def close(self) -> None:
        while self._opened:
            self._opened.pop().close()

    def pins(self) -> set[str]:
        found = (p for p in self.root.rglob("*") if not p.is_dir())
        return {str(p.relative_to(self.root)) for p in found}


@pytest.fixture
def installation(private_mounts: None, mini: Compile) -> Iterator[Installation]:
    with place() as (root, cgroup):
        made = Installation(root, cgroup, mini)
        yield made
        made.close()
        Datapath.remove(root)


@pytest.fixture
def netns() -> Iterator[Callable[[], NetNs]]:
    """Makes network namespaces."""
    with ExitStack() as stack:

        def make() -> NetNs:
            made = NetNs()
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture
def operator() -> Iterator[ScriptedOperator]:
    made = ScriptedOperator()
    made.set(
        node_resource("node1", ["192.0.2.1", "2001:db8::1"], CIDRS),
        node_resource("node2", ["192.0.2.2", "2001:db8::2"], ["10.244.2.0/24", "fd00:244:2::/64"]),
        selector_resource(1, "pods ns=ns app=a"),
        selector_resource(2, "pods ns=ns app=b"),
        class_resource(1, 1),
        class_resource(2, 2),
        class_resource(3),
        pod_resource("a", 1),
        pod_resource("b", 2),
        pod_resource("c", 3),
    )
    yield made
    made.stop()


@pytest.fixture
def agent(tmp_path: Path, operator: ScriptedOperator) -> Iterator[AgentNode]:
    assert SHIM.exists(), "build the shim: make shim"
    with ExitStack() as stack:
        pins, cgroup = stack.enter_context(place())
        operator._where = _nowhere()
        made = AgentNode(tmp_path, pins, cgroup, operator)
        operator._where = made.node.entered()
        port = operator.start()
        made.config["operators"] = [f"127.0.0.1:{port}"]
        stack.callback(made.close)
        yield made


def _nowhere() -> ExitStack:
    return ExitStack()


@pytest.fixture
def pods() -> Iterator[dict[str, NetNs]]:
    made = {name: NetNs() for name in "abc"}
    yield made
    for pod in made.values():
        pod.close()
