# SPDX-License-Identifier: Apache-2.0
"""The node's addresses: one of each family for every pod, from the node's pod CIDRs.

Rotation: the next address is the first free one after the last one given, and a released one
rests for `cooldown` seconds, so that neither another node's maps nor a client's connection
table can take a new pod for the old. Both survive a restart, as the journal tells them.

Nothing is handed out that the journal does not hold; a release counts at once even if the
disk refuses it, and `reconcile` repeats it after a restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from weir.api import address
from weir.api.address import Addr, Cidr
from weir.cni.errors import JournalError, NotReady, PoolExhausted
from weir.cni.journal import Journal

logger = logging.getLogger(__name__)

Key = tuple[str, str]
"""(container id, interface name)"""

COOLDOWN_SECONDS = 30.0
"""Longer than an address's class takes to every node, shorter than a /24 takes to rotate."""


class Pool:
    """Who has which address. Calls for one key must not overlap; the service sees to it."""

    def __init__(
        self,
        path: Path,
        cidrs: Iterable[Cidr] = (),
        *,
        cooldown: float = COOLDOWN_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cooldown = cooldown
        self._clock = clock
        self._leases: dict[Key, tuple[Addr, ...]] = {}
        self._owners: dict[Addr, Key] = {}
        self._resting: dict[Addr, float] = {}  # when it was released
        self._last: dict[bool, Addr] = {}  # by "is IPv4": the last address given
        self._cidrs: dict[bool, tuple[Cidr, ...]] = {}
        self.set_cidrs(cidrs)
        self._journal = Journal(path, kind="weir-ipam", sync=True)
        for line in self._journal.lines:
            self._replay(line.decode())

    def set_cidrs(self, cidrs: Iterable[Cidr]) -> None:
        """New pods get addresses of these; what is given out stays until it is released."""
        wanted = tuple(cidrs)
        families = {
            is_v4: tuple(c for c in wanted if c.is_ipv4 is is_v4) for is_v4 in (True, False)
        }
        self._cidrs = {is_v4: found for is_v4, found in families.items() if found}

    @property
    def cidrs(self) -> tuple[Cidr, ...]:
        return tuple(cidr for family in self._cidrs.values() for cidr in family)

    @property
    def leases(self) -> Mapping[Key, tuple[Addr, ...]]:
        return self._leases

    async def assign(self, container_id: str, ifname: str) -> tuple[Addr, ...]:
        """The addresses of an interface, one of each family; the same when asked again.

        NotReady without a pod CIDR or while all free addresses rest, PoolExhausted, JournalError.
        """
        key = _key(container_id, ifname)
        if key in self._leases:
            return self._leases[key]
        if not self._cidrs:
            raise NotReady("this node has no pod CIDR yet", details="spec.podCIDRs is empty")
        now = self._clock()
        addresses = tuple(self._next(is_v4, now) for is_v4 in self._cidrs)
        self._take(key, addresses)
        try:
            await self._journal.append(_assign(key, addresses))
        except JournalError:
            self._forget(key)
            raise
        await self._compact()
        return addresses

    async def release(self, container_id: str, ifname: str) -> None:
        """Gives the addresses back; nothing to do is fine. JournalError: they are free
        nevertheless, but a restart will find them taken until `reconcile`."""
        addresses = self._forget((container_id, ifname))
        if addresses:
            now = self._clock()
            self._resting.update(dict.fromkeys(addresses, now))
            await self._journal.append(_release(addresses, now))
            await self._compact()

    async def claim(self, container_id: str, ifname: str, addresses: tuple[Addr, ...]) -> None:
        """Records addresses that a wired pod has, whatever the journal says."""
        key = _key(container_id, ifname)
        if self._leases.get(key) == addresses:
            return
        self._take(key, addresses)
        await self._journal.append(_assign(key, addresses))

    def check(self) -> None:
        """NotReady when no address could be given for want of a CIDR.

        Being exhausted is not reported: the runtime would call the whole node not ready and
        its pods would be evicted, though they are well.
        """
        if not self._cidrs:
            raise NotReady("this node has no pod CIDR yet", details="spec.podCIDRs is empty")

    def close(self) -> None:
        self._journal.close()

    def _next(self, is_v4: bool, now: float) -> Addr:
        """The next free address of a family. The turns are bounded by what is not free."""
        cidrs = self._cidrs[is_v4]
        resting = 0
        for addr in _after(cidrs, self._last.get(is_v4)):
            if addr in self._owners:
                continue
            released = self._resting.get(addr)
            # a clock that was set back must not lock an address up
            if released is not None and 0 <= now - released < self._cooldown:
                resting += 1
                continue
            return addr
        names = ", ".join(cidr.text() for cidr in cidrs)
        if resting:
            raise NotReady(
                f"no free address in {names} right now",
                details=f"{resting} were released less than {self._cooldown:g} s ago",
            )
        raise PoolExhausted(
            f"no free address in {names}", details="all belong to pods of this node"
        )

    def _take(self, key: Key, addresses: tuple[Addr, ...]) -> None:
        """Records the owner. A later owner wins: then the release between the two was lost."""
        self._forget(key)
        for addr in addresses:
            if addr in self._owners:
                self._forget(self._owners[addr])
            self._owners[addr] = key
            self._resting.pop(addr, None)
            self._last[address.is_ipv4(addr)] = addr
        self._leases[key] = addresses

    def _forget(self, key: Key) -> tuple[Addr, ...]:
        addresses = self._leases.pop(key, ())
        for addr in addresses:
            del self._owners[addr]
        return addresses

    def _replay(self, line: str) -> None:
        try:
            self._replay_record(line.split(" "))
        except ValueError as error:
            raise JournalError(
                f"{self._journal.path}: a record that this version cannot read",
                details=f"{line[:200]!r}: {error}",
            ) from error

    def _replay_record(self, words: list[str]) -> None:
        match words:
            case ["assign", container_id, ifname, addresses]:
                self._take((container_id, ifname), _parse(addresses))
            case ["release", addresses, when]:
                for addr in _parse(addresses):
                    if addr in self._owners:
                        self._forget(self._owners[addr])
                    self._resting[addr] = float(when)
            case ["last", addr]:
                self._last[address.is_ipv4(address.parse(addr))] = address.parse(addr)
            case _:
                raise ValueError("not assign, release or last")

    async def _compact(self) -> None:
        if self._journal.long():
            await self._journal.compact(self._live())

    def _live(self) -> Iterator[bytes]:
        now = self._clock()
        self._resting = {a: t for a, t in self._resting.items() if 0 <= now - t < self._cooldown}
        for addr, when in self._resting.items():
            yield _release((addr,), when)
        for key, addresses in self._leases.items():
            yield _assign(key, addresses)
        for addr in self._last.values():
            yield b"last " + address.text(addr).encode()


def _after(cidrs: tuple[Cidr, ...], last: Addr | None) -> Iterator[Addr]:
    """Every usable address once, beginning after `last`."""
    ranges = [_usable(cidr) for cidr in cidrs]
    at = int.from_bytes(last, "big") if last is not None else -1
    start = next((i for i, r in enumerate(ranges) if r.start <= at < r.stop), None)
    if start is None:
        order = ranges
    else:
        here = ranges[start]
        order = [range(at + 1, here.stop), *ranges[start + 1 :], *ranges[:start]]
        order.append(range(here.start, at + 1))
    for part in order:
        for number in part:
            yield Addr(number.to_bytes(16, "big"))


def _usable(cidr: Cidr) -> range:
    """Without the network's own address, the first one (the node may use it as its own in the
    CIDR) and the IPv4 broadcast address. Prefixes of one or two addresses have no such roles."""
    first = int.from_bytes(cidr.address, "big")
    size = 1 << (128 - cidr.bits)
    if size <= 2:
        return range(first, first + size)
    return range(first + 2, first + size - (1 if cidr.is_ipv4 else 0))


def _key(container_id: str, ifname: str) -> Key:
    if not container_id or not ifname or any(c.isspace() for c in container_id + ifname):
        raise ValueError(f"bad container id or interface name: {container_id!r} {ifname!r}")
    return container_id, ifname


def _parse(addresses: str) -> tuple[Addr, ...]:
    return tuple(address.parse(one) for one in addresses.split(","))


def _text(addresses: tuple[Addr, ...]) -> str:
    return ",".join(address.text(one) for one in addresses)


def _assign(key: Key, addresses: tuple[Addr, ...]) -> bytes:
    return f"assign {key[0]} {key[1]} {_text(addresses)}".encode()


def _release(addresses: tuple[Addr, ...], when: float) -> bytes:
    return f"release {_text(addresses)} {when:.3f}".encode()
