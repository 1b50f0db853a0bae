# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the node ring: real devices, links and traffic, in namespaces of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.datapaths import place
from support.namespaces import NetNs
from support.objects import compile_mini

from weir.datapath import features
from weir.datapath.datapath import Datapath
from weir.datapath.features import Features
from weir.datapath.settings import Settings, Sizes

Compile = Callable[..., Path]


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
