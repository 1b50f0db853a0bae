# SPDX-License-Identifier: Apache-2.0
"""The address pool: rotation, rest, crash points, and what it does when it cannot."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weir.api.address import Addr, parse_cidr, text
from weir.api.address import parse as ip
from weir.cni import journal as journal_module
from weir.cni.errors import JournalError, NotReady, PoolExhausted
from weir.cni.ipam import Key, Pool

V4, V6 = "10.1.0.0/29", "fd00:1::/64"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def pool(path: Path, *cidrs: str, clock: Clock | None = None, cooldown: float = 30.0) -> Pool:
    wanted = [parse_cidr(c) for c in cidrs]
    return Pool(path, wanted, clock=clock or Clock(), cooldown=cooldown)


def texts(addresses: tuple[Addr, ...]) -> list[str]:
    return [text(a) for a in addresses]


async def take(p: Pool, count: int, first: int = 0) -> list[str]:
    return [texts(await p.assign(f"c{n}", "eth0"))[0] for n in range(first, first + count)]


async def test_one_address_of_each_family_without_the_reserved(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", V4, V6)
    assert texts(await p.assign("c", "eth0")) == ["10.1.0.2", "fd00:1::2"]
    # .0 network, .1 the node's, .7 broadcast
    assert await take(p, 4) == ["10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"]
    with pytest.raises(PoolExhausted, match=r"10\.1\.0\.0/29"):
        await p.assign("more", "eth0")
    assert ("more", "eth0") not in p.leases
    p.close()


@pytest.mark.parametrize(
    ("cidr", "usable"),
    [
        ("10.1.0.4/30", ["10.1.0.6"]),
        ("10.1.0.4/31", ["10.1.0.4", "10.1.0.5"]),
        ("10.1.0.4/32", ["10.1.0.4"]),
        ("fd00::4/126", ["fd00::6", "fd00::7"]),
        ("fd00::4/128", ["fd00::4"]),
    ],
)
async def test_small_prefixes(tmp_path: Path, cidr: str, usable: list[str]) -> None:
    p = pool(tmp_path / "j", cidr)
    assert await take(p, len(usable)) == usable
    with pytest.raises(PoolExhausted):
        await p.assign("more", "eth0")
    p.close()


async def test_several_prefixes_of_one_family(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", "10.1.0.0/30", "10.2.0.0/30", V6)
    assert await take(p, 2) == ["10.1.0.2", "10.2.0.2"]
    with pytest.raises(PoolExhausted, match=r"10\.1\.0\.0/30, 10\.2\.0\.0/30"):
        await p.assign("more", "eth0")
    p.close()


async def test_asked_again_gives_the_same(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", V4, V6)
    first = await p.assign("c", "eth0")
    assert await p.assign("c", "eth0") == first
    assert await p.assign("c", "net1") != first
    p.close()


async def test_rotation_before_reuse_and_across_restarts(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", V4, cooldown=0)
    given_out = []
    for n in range(5):
        given_out += await take(p, 1, first=n)
        await p.release(f"c{n}", "eth0")
        p.close()
        p = pool(tmp_path / "j", V4, cooldown=0)
    assert given_out == [f"10.1.0.{n}" for n in (2, 3, 4, 5, 6)]
    assert await take(p, 1) == ["10.1.0.2"]
    p.close()


async def test_released_address_rests_also_after_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    p = pool(tmp_path / "j", "10.1.0.0/30", clock=clock)
    await p.assign("a", "eth0")
    await p.release("a", "eth0")
    p.close()
    clock.now += 29
    p = pool(tmp_path / "j", "10.1.0.0/30", clock=clock)
    with pytest.raises(NotReady, match="1 were released less than 30 s ago"):
        await p.assign("b", "eth0")
    clock.now += 2
    assert await take(p, 1) == ["10.1.0.2"]
    p.close()


async def test_clock_set_back_does_not_lock_addresses_up(tmp_path: Path) -> None:
    clock = Clock()
    p = pool(tmp_path / "j", "10.1.0.0/30", clock=clock)
    await p.assign("a", "eth0")
    await p.release("a", "eth0")
    clock.now -= 500
    assert await take(p, 1) == ["10.1.0.2"]
    p.close()


async def test_without_a_pod_cidr(tmp_path: Path) -> None:
    p = pool(tmp_path / "j")
    with pytest.raises(NotReady, match="no pod CIDR"):
        await p.assign("a", "eth0")
    with pytest.raises(NotReady, match="no pod CIDR"):
        p.check()
    p.set_cidrs([parse_cidr(V4)])
    p.check()
    await p.assign("a", "eth0")
    p.close()


async def test_changed_pod_cidr(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", V4)
    before = await p.assign("old", "eth0")
    p.set_cidrs([parse_cidr("10.9.0.0/24")])
    assert await take(p, 1) == ["10.9.0.2"]
    assert p.leases["old", "eth0"] == before
    await p.release("old", "eth0")
    p.close()
    p = pool(tmp_path / "j", "10.9.0.0/24")
    assert set(p.leases) == {("c0", "eth0")}
    p.close()


async def test_nothing_is_given_out_that_the_journal_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = pool(tmp_path / "j", V4)

    async def full(_: bytes) -> None:
        raise JournalError("cannot write the journal", details="No space left on device")

    kept = await p.assign("kept", "eth0")
    with monkeypatch.context() as patch:
        patch.setattr(p._journal, "append", full)
        with pytest.raises(JournalError):
            await p.assign("a", "eth0")
        assert set(p.leases) == {("kept", "eth0")}
        with pytest.raises(JournalError):
            await p.release("kept", "eth0")
        assert not p.leases  # a release counts at once
    p.close()
    p = pool(tmp_path / "j", V4)
    assert dict(p.leases) == {("kept", "eth0"): kept}  # for the service to release again
    p.close()


async def test_claim_of_a_wired_pod_wins(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", V4)
    await p.assign("impostor", "eth0")
    await p.claim("wired", "eth0", (ip("10.1.0.2"),))
    assert dict(p.leases) == {("wired", "eth0"): (ip("10.1.0.2"),)}
    p.close()
    p = pool(tmp_path / "j", V4)
    assert set(p.leases) == {("wired", "eth0")}
    assert await take(p, 1) == ["10.1.0.3"]
    p.close()


@pytest.mark.parametrize("record", [b"assign c", b"assign c eth0 nonsense", b"grant x", b"release"])
def test_unreadable_record_is_named(tmp_path: Path, record: bytes) -> None:
    line = journal_module.encode(b"weir-ipam 1") + journal_module.encode(record)
    (tmp_path / "j").write_bytes(line)
    with pytest.raises(JournalError, match=record.decode()):
        pool(tmp_path / "j", V4)


@pytest.mark.parametrize("bad", ["a b", "", "a\nb"])
async def test_names_that_would_break_a_record(tmp_path: Path, bad: str) -> None:
    p = pool(tmp_path / "j", V4)
    with pytest.raises(ValueError, match="bad container id"):
        await p.assign(bad, "eth0")
    p.close()


def state(p: Pool) -> dict[Key, tuple[Addr, ...]]:
    owners = [addr for addresses in p.leases.values() for addr in addresses]
    assert len(owners) == len(set(owners)), "an address has two owners"
    return dict(p.leases)


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["assign", "release", "wait"]), st.integers(0, 6)), max_size=30
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=OPERATIONS, compact_at=st.sampled_from([3, 1000]), data=st.data())
def test_crash_anywhere(
    operations: list[tuple[str, int]], compact_at: int, data: st.DataObject
) -> None:
    """Any operations, the file cut at any byte: what is recovered is the state after one of
    the operations since the last rewrite, and operation goes on without a double address."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "COMPACT_MIN_LINES", compact_at)
        path = Path(folder) / "j"
        clock = Clock()

        async def play() -> list[tuple[int, dict[Key, tuple[Addr, ...]]]]:
            p = pool(path, V4, V6, clock=clock)
            inode, states = path.stat().st_ino, [(path.stat().st_size, state(p))]
            for what, n in operations:
                try:
                    match what:
                        case "assign":
                            await p.assign(f"c{n}", "eth0")
                        case "release":
                            await p.release(f"c{n}", "eth0")
                        case _:
                            clock.now += n * 7
                except (PoolExhausted, NotReady):
                    pass
                if path.stat().st_ino != inode:
                    inode, states = path.stat().st_ino, []
                states.append((path.stat().st_size, state(p)))
            p.close()
            return states

        async def grow(seen: dict[Key, tuple[Addr, ...]]) -> None:
            p = pool(path, V4, V6, clock=clock)
            try:
                assert state(p) == seen
                fresh = await p.assign("new", "eth0")
                assert not set(fresh) & {a for held in seen.values() for a in held}
                state(p)
            except (PoolExhausted, NotReady):
                pass
            p.close()

        states = asyncio.run(play())
        first, last = states[0][0], states[-1][0]
        cut = data.draw(st.integers(first, last), label="cut")
        path.write_bytes(path.read_bytes()[:cut])
        asyncio.run(grow([s for size, s in states if size <= cut][-1]))


async def test_a_hundred_at_once_are_distinct(tmp_path: Path) -> None:
    p = pool(tmp_path / "j", "10.1.0.0/24", V6)
    found = await asyncio.gather(*(p.assign(f"c{n}", "eth0") for n in range(100)))
    assert len({a for addresses in found for a in addresses}) == 200
    before = state(p)
    p.close()
    p = pool(tmp_path / "j", "10.1.0.0/24", V6)
    assert state(p) == before
    p.close()


async def test_long_history_is_compacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "COMPACT_MIN_LINES", 20)
    clock = Clock()
    p = pool(tmp_path / "j", "10.1.0.0/24", clock=clock)
    await p.assign("stays", "eth0")
    last = ""
    for n in range(200):
        last = (await take(p, 1, first=n))[0]
        await p.release(f"c{n}", "eth0")
        clock.now += 1
    p.close()
    assert (tmp_path / "j").read_bytes().count(b"\n") < 120
    p = pool(tmp_path / "j", "10.1.0.0/24", clock=clock)
    assert set(p.leases) == {("stays", "eth0")}
    following = int(last.rpartition(".")[2]) + 1
    assert await take(p, 1) == [f"10.1.0.{following}"]  # the rotation goes on
    p.close()
