# SPDX-License-Identifier: Apache-2.0
"""The state file: what is committed survives, what is torn is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weir.agent.store import Position, Store
from weir.api.v1 import weir_pb2 as pb


def encoded(name: str, text: str = "") -> bytes:
    policy = pb.Policy(namespace="ns", name=text)
    return pb.Resource(name=name, policy=policy).SerializeToString()


def write(store: Store) -> None:
    store.written(store.take_pending(durable=True).write())


def position(revision: int) -> Position:
    return Position("one", revision, complete=True)


def test_a_reopened_store_has_what_was_written(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.replace({"a": encoded("a"), "b": encoded("b")}, position(1))
    store.set_numbers(b"[1]")
    write(store)
    store.apply([encoded("c")], ["a"], position(2))
    write(store)
    again = Store(tmp_path / "state")
    assert dict(again.resources) == {"b": encoded("b"), "c": encoded("c")}
    assert again.position == position(2)
    assert again.numbers == b"[1]"
    assert not again.dirty


def test_a_snapshot_names_what_is_gone_and_what_changed(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.replace({"a": encoded("a"), "b": encoded("b")}, position(1))
    changed = store.replace({"b": encoded("b"), "c": encoded("c")}, position(2)).changed
    assert changed == {"a": None, "c": encoded("c")}


def test_equal_resources_are_no_change(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.replace({"a": encoded("a")}, position(1))
    assert store.apply([encoded("a"), b"\xff\xff"], ["none"], position(2)).changed == {}


@given(cut=st.integers(1, 400), flip=st.none() | st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_a_damaged_file_gives_a_committed_state(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int | None
) -> None:
    path = tmp_path_factory.mktemp("store") / "state"
    store = Store(path)
    states = [dict(store.resources)]
    for revision in range(1, 5):
        gone = [f"r{revision - 2}"]
        store.apply(
            [encoded(f"r{revision}"), encoded("x", str(revision))], gone, position(revision)
        )
        write(store)
        states.append(dict(store.resources))
    data = bytearray(path.read_bytes())
    del data[max(0, len(data) - cut) :]
    if flip is not None and flip < len(data):
        data[flip] ^= 1
    path.write_bytes(data)
    again = Store(path)
    assert dict(again.resources) in states
    assert dict(again.resources) == states[again.position.revision]
    again.apply([encoded("new")], [], position(9))
    write(again)
    assert "new" in Store(path).resources


def test_the_file_does_not_grow_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weir.agent.store.SLACK", 4096)
    store = Store(tmp_path / "state")
    for revision in range(400):
        store.apply([encoded("a", str(revision))], [], position(revision))
        if revision % 10 == 0:
            write(store)
    write(store)
    assert (tmp_path / "state").stat().st_size < 8192
    assert Store(tmp_path / "state").position == position(399)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "state")
    store.replace({"a": encoded("a")}, position(1))
    write(store)
    store.apply([encoded("b")], [], position(2))
    store.take_pending(durable=True)  # its write failed
    store.failed()
    write(store)
    assert set(Store(tmp_path / "state").resources) == {"a", "b"}
