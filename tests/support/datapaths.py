# SPDX-License-Identifier: Apache-2.0
"""The real objects in a bpffs and cgroup of their own, once for each distinct Settings."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from support import namespaces
from weir.datapath.datapath import RECORDS, Datapath
from weir.datapath.records import Runtime
from weir.datapath.settings import Settings, Sizes

# Large enough for tests, small enough to be quick to make and to clear.
SMALL = Sizes(
    services=1024,
    backends=4096,
    endpoints=256,
    addresses=4096,
    prefixes=1024,
    routes=256,
    policy=4096,
    ct=4096,
    snat=4096,
    sock_nat=4096,
    events=1 << 20,
)


@contextmanager
def place() -> Iterator[tuple[Path, Path]]:
    """(pins, cgroup) of a new installation."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weir-bpffs-")))
        stack.enter_context(namespaces.bpffs(folder))
        yield folder / "weir", stack.enter_context(namespaces.cgroup())


class Datapaths:
    """Loaded installations by settings; programs load once, tests clear tables between."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._opened: dict[Settings, Datapath] = {}

    def get(self, settings: Settings) -> Datapath:
        """A datapath with these settings, its tables empty."""
        if settings not in self._opened:
            root, cgroup = self._stack.enter_context(place())
            opened = Datapath.open(root, cgroup, settings, SMALL)
            self._stack.callback(opened.close)
            self._stack.callback(Datapath.remove, root)
            self._opened[settings] = opened
        datapath = self._opened[settings]
        clear(datapath)
        return datapath


def clear(datapath: Datapath) -> None:
    for name in RECORDS:
        if name != "runtime":  # an array: it has no deletion
            table = getattr(datapath.tables, name)
            table.delete([key for key, _ in table.items()])
    datapath.tables.runtime.update({0: Runtime(0, 0)})
    reader = datapath.events()
    while reader.drain():
        pass
    reader.close()
