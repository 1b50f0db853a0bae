# SPDX-License-Identifier: Apache-2.0
"""Policies of every form, each against the whole matrix of live traffic (see `arena`).

`-k` chooses rows by their ids. The oracle says what must be; that it says anything at all is
tested where it lives.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from e2e.suite import cluster_policy_rows, policy_rows
from e2e.suite.api import api
from e2e.suite.arena import Arena, arena
from e2e.suite.policy_rows import Row


@pytest.fixture(scope="module")
def pods() -> Iterator[Arena]:
    with api() as made, arena(made) as built:
        yield built


def rows(table: list[Row]) -> list[object]:
    """All of them, or with POLICY_ROWS=core every third."""
    chosen = table[::3] if os.environ.get("POLICY_ROWS") == "core" else table
    return [pytest.param(row, id=row.id) for row in chosen]


@pytest.mark.parametrize("row", rows(policy_rows.ROWS))
def test_network_policies(pods: Arena, row: Row) -> None:
    pods.become(row.make(pods))
    pods.check()


@pytest.mark.parametrize("row", rows(cluster_policy_rows.ROWS))
def test_cluster_network_policies(pods: Arena, row: Row) -> None:
    pods.become(row.make(pods))
    pods.check()
