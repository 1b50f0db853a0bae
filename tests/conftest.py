# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all rings. Rings that need root fail without it: a skip would hide them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support import namespaces
from support.datapaths import Datapaths
from support.kernel import KERNEL, XDP_INGRESS_KERNEL

from weir.datapath.datapath import Datapath
from weir.datapath.settings import Settings

# Marker → the first kernel that has what its tests need; pyproject.toml says what that is.
FIRST_KERNEL = {
    "forwarded": (5, 12),
    "netns_cookies": (5, 14),
    "xdp_sends": XDP_INGRESS_KERNEL,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = [name for name, first in FIRST_KERNEL.items() if first > KERNEL]
    chosen = [item for item in items if not any(map(item.get_closest_marker, missing))]
    if len(chosen) == len(items):
        return
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def private_mounts() -> None:
    """Mounts made from now on belong to this process and end with it."""
    if os.geteuid():
        pytest.fail("this ring needs root")
    namespaces.private_mounts()


@pytest.fixture(scope="session")
def datapaths(private_mounts: None) -> Iterator[Datapaths]:
    with ExitStack() as stack:
        yield Datapaths(stack)


@pytest.fixture
def settings() -> Settings:
    """The constants that `datapath` is loaded with: override it where a test needs others."""
    return Settings()


@pytest.fixture
def datapath(datapaths: Datapaths, settings: Settings) -> Datapath:
    """The real objects with `settings`, all tables empty; `.programs` has descriptors."""
    return datapaths.get(settings)
