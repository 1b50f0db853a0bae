# SPDX-License-Identifier: Apache-2.0
"""What becomes of a pinned map: every combination of shape, layout, successor, migration."""

from __future__ import annotations

from dataclasses import replace

import pytest

from weir.datapath.errors import LayoutChanged
from weir.datapath.libbpf import MapShape
from weir.datapath.migrate import Action, Desired, Migration, Pinned, Step, plan

SHAPE = MapShape(type=1, key_size=16, value_size=8, max_entries=100, flags=0)
BIGGER = replace(SHAPE, max_entries=200)
WANT = Desired(SHAPE, "new")
NEW, OLD, BOTH = frozenset({"new"}), frozenset({"old"}), frozenset({"old", "new"})
NONE: frozenset[str] = frozenset()
CONVERT = Migration("m", "old", "m", lambda key, value: (key, value))
RENAME = Migration("before", "old", "m", lambda key, value: (key, value))


@pytest.mark.parametrize(
    ("pinned", "migrations", "expected"),
    [
        pytest.param({}, (), Action("m", Step.CREATE), id="first start"),
        pytest.param({"m": Pinned(SHAPE, NEW)}, (), Action("m", Step.ADOPT), id="restart"),
        pytest.param(
            {"m": Pinned(SHAPE, NONE)}, (), Action("m", Step.ADOPT), id="layout not noted"
        ),
        pytest.param({"m": Pinned(BIGGER, NEW)}, (), Action("m", Step.REPLACE), id="other size"),
        pytest.param(
            {"m": Pinned(BIGGER, NEW, SHAPE)}, (), Action("m", Step.RESUME), id="stopped in between"
        ),
        pytest.param(
            {"m": Pinned(SHAPE, NEW, BIGGER)},
            (),
            Action("m", Step.REPLACE),
            id="stopped in between, then changed back: programs may use the successor",
        ),
        pytest.param(
            {"m": Pinned(SHAPE, OLD)},
            (CONVERT,),
            Action("m", Step.REPLACE, CONVERT),
            id="converted",
        ),
        pytest.param(
            {"m": Pinned(SHAPE, BOTH, SHAPE)},
            (CONVERT,),
            Action("m", Step.RESUME, CONVERT),
            id="stopped before the rename",
        ),
        pytest.param(
            {"m": Pinned(SHAPE, BOTH)}, (CONVERT,), Action("m", Step.ADOPT), id="and after it"
        ),
        pytest.param(
            {"before": Pinned(SHAPE, OLD)},
            (RENAME,),
            Action("m", Step.CREATE, RENAME),
            id="renamed",
        ),
        pytest.param(
            {"before": Pinned(SHAPE, OLD), "m": Pinned(SHAPE, NEW)},
            (RENAME,),
            Action("m", Step.ADOPT, RENAME),
            id="renamed, stopped while copying",
        ),
    ],
)
def test_action(
    pinned: dict[str, Pinned], migrations: tuple[Migration, ...], expected: Action
) -> None:
    assert plan({"m": WANT}, pinned, migrations) == [expected]


@pytest.mark.parametrize(
    "have",
    [
        pytest.param(Pinned(SHAPE, OLD), id="layout"),
        pytest.param(Pinned(replace(SHAPE, type=9), NEW), id="type"),
        pytest.param(Pinned(replace(SHAPE, key_size=20), NEW), id="key"),
        pytest.param(Pinned(replace(SHAPE, value_size=4), NONE), id="value"),
        pytest.param(Pinned(replace(SHAPE, flags=1), NEW), id="flags"),
    ],
)
@pytest.mark.parametrize("migrations", [(), (RENAME,)], ids=["none", "of another map"])
def test_another_layout_is_refused(have: Pinned, migrations: tuple[Migration, ...]) -> None:
    with pytest.raises(LayoutChanged, match="nothing was changed"):
        plan({"m": WANT}, {"m": have}, migrations)
