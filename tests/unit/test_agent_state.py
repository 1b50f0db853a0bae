# SPDX-License-Identifier: Apache-2.0
"""Between stream, store and projection: what may be acknowledged, and one writer at a time."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from weir.agent.reconciler import Reconciler
from weir.agent.state import PARSE_AT_ONCE, DesiredState
from weir.agent.store import Pending, Position, Store
from weir.agent.tables import Projection
from weir.api.v1 import weir_pb2 as pb


class NoRuntime:
    def set_features(self, features: int) -> None:
        pass

    def bump(self) -> int:
        return 1


def desired_state(path: Path) -> DesiredState:
    projection = Projection()
    return DesiredState(Store(path), projection, Reconciler(projection, {}, NoRuntime()))


def selectors(count: int) -> list[bytes]:
    return [
        pb.Resource(
            name=f"selector/{n}", selector=pb.Selector(number=n, key=f"pods ns=n app={n}")
        ).SerializeToString()
        for n in range(1, count + 1)
    ]


async def test_a_change_counts_as_applied_only_once_the_projection_has_it(tmp_path: Path) -> None:
    state = desired_state(tmp_path / "state")
    taking = asyncio.create_task(
        state.change(selectors(3 * PARSE_AT_ONCE), [], Position("one", 7, complete=True))
    )
    await asyncio.sleep(0)
    assert state.position.revision == 7
    assert not taking.done()
    assert state.applied == 0
    await taking
    assert state.applied == 7


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_write_ends_before_the_next_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    began, go_on = threading.Event(), threading.Event()
    write = Pending.write

    def slow(pending: Pending) -> int:
        began.set()
        assert go_on.wait(10)
        if fails:
            raise OSError(28, "No space left on device")
        return write(pending)

    state = desired_state(tmp_path / "state")
    await state.change(selectors(3), [], Position("one", 7, complete=True))
    monkeypatch.setattr(Pending, "write", slow)
    writing = asyncio.create_task(state.persist())
    await asyncio.to_thread(began.wait, 10)
    writing.cancel()
    done, _ = await asyncio.wait([writing], timeout=0.1)
    assert not done
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    monkeypatch.setattr(Pending, "write", write)
    await state.persist()
    assert Store(tmp_path / "state").position.revision == 7
    assert len(Store(tmp_path / "state")) == 3


async def test_the_file_has_a_change_before_the_maps_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that is killed must not take its maps back to an older state."""
    path = tmp_path / "state"
    state = desired_state(path)
    seen: list[int] = []
    apply = Projection.apply

    def applied(projection: Projection, changed: dict[str, Any]) -> None:
        seen.append(Store(path).position.revision)
        apply(projection, changed)

    monkeypatch.setattr(Projection, "apply", applied)
    await state.snapshot(selectors(3), Position("one", 7, complete=True))
    await state.change([], ["selector/1"], Position("one", 8, complete=True))
    assert seen == [7, 8]
    assert sorted(Store(path).resources) == ["selector/2", "selector/3"]


async def test_a_full_disk_leaves_no_older_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    state = desired_state(path)
    await state.snapshot(selectors(3), Position("one", 7, complete=True))

    def full(pending: Pending) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Pending, "write", full)
        await state.change([], ["selector/1"], Position("one", 8, complete=True))
    assert state.applied == 8
    assert not path.exists()
    await state.persist()
    assert sorted(Store(path).resources) == ["selector/2", "selector/3"]
