# SPDX-License-Identifier: Apache-2.0
"""Which Service of type LoadBalancer has which addresses: pure, without clock or I/O.

Nothing is stored but in the Services' status: an allocator that is made anew is told what they
have, and comes to the same result. `settle` looks at the Services that something changed for.
First each keeps what its status says, then what it was given that nobody wrote yet, as far as it
may have that; if two have one address, the older Service keeps it. Then what is missing is given,
so that no new Service takes what another one has.

Two replicas can think for a while that they lead. What the other one writes is taken over, and
nothing in an outcome depends on what came first or together with what. So the oldest Service stays
as it was first written, then the next one, and the two agree. If each kept to what it decided
itself, they would overwrite each other for ever.

A Service keeps an address as long as a pool for it has that address. What it asks for comes
first; until that can be given it keeps what it has.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weir.api.address import Addr, is_ipv4, text
from weir.operator.balancers import IPS, Shown, Wish, family_name, of_family, share
from weir.operator.objects import Key, Problem
from weir.operator.pools import FREE_MOST, Counts, Judged, Pool, Range, address, number

NO_POOL, NO_ADDRESS, NOT_AVAILABLE = "NoPool", "NoFreeAddress", "AddressNotAvailable"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a Service is to have. None: it is somebody else's, who gave it what it has."""

    addresses: tuple[Addr, ...] | None
    problems: tuple[Problem, ...] = ()


class Room:
    """The addresses of one family in a pool. Below `_from` none is free."""

    def __init__(self, judged: Judged, ipv4: bool) -> None:
        self.pool: Pool = judged.pool
        self.ipv4 = ipv4
        self.used = 0
        self._ranges = [b.range for b in judged.pool.blocks if b.range.ipv4 is ipv4]
        self._starts: list[int] = []
        self._size = 0
        for part in self._ranges:
            self._starts.append(self._size)
            self._size += part.size
        self._excluded = {addr for addr in judged.excluded if is_ipv4(addr) is ipv4}
        self._from = 0

    def __bool__(self) -> bool:
        return self._size > 0

    @property
    def free(self) -> int:
        return self._size - len(self._excluded) - self.used

    @property
    def counts(self) -> Counts:
        return Counts(self.used, min(self.free, FREE_MOST))

    def excludes(self, addr: Addr) -> bool:
        return addr in self._excluded

    def next_free(self, held: Mapping[Addr, object]) -> Addr | None:
        while self._from < self._size:
            at = bisect_right(self._starts, self._from) - 1
            addr = address(self._ranges[at].first + self._from - self._starts[at])
            if addr not in held and addr not in self._excluded:
                return addr
            self._from += 1
        return None

    def freed(self, addr: Addr) -> None:
        value = number(addr)
        for start, part in zip(self._starts, self._ranges, strict=True):
            if value in part:
                self._from = min(self._from, start + value - part.first)

    def parts(self) -> list[Range]:
        return self._ranges


@dataclass(slots=True)
class _Served:
    wish: Wish
    shown: Shown
    addresses: tuple[Addr, ...]
    written: bool = True  # its status has other addresses than when it was last looked at


@dataclass(slots=True)
class Allocator:
    """`outcomes` are the latest of every Service."""

    outcomes: dict[Key, Outcome] = field(default_factory=dict)
    _rooms: list[Room] = field(default_factory=list)  # by preference
    _parts: list[tuple[int, int, Room]] = field(default_factory=list)  # first, last, whose
    _served: dict[Key, _Served] = field(default_factory=dict)
    _held: dict[Addr, dict[Key, Wish]] = field(default_factory=dict)
    _shared: dict[str, dict[Addr, None]] = field(default_factory=dict)  # by sharing key
    _namespaces: dict[str, dict[str, str]] = field(default_factory=dict)
    _dirty: set[Key] = field(default_factory=set)
    _waiting: set[Key] = field(default_factory=set)  # did not get all

    # Inputs

    def pools(self, judged: Iterable[Judged]) -> None:
        """All of them: each Service is looked at again."""
        ordered = sorted(judged, key=lambda one: one.pool.preference())
        self._rooms = [room for one in ordered for v4 in (True, False) if (room := Room(one, v4))]
        self._parts = sorted(
            (part.first, part.last, room) for room in self._rooms for part in room.parts()
        )
        for addr in self._held:
            if (known := self._room(addr)) is not None:
                known.used += 1
        self._dirty.update(self._served)

    def namespace(self, name: str, labels: Mapping[str, str] | None) -> None:
        if labels is None:
            self._namespaces.pop(name, None)
        elif self._namespaces.get(name) != labels:
            self._namespaces[name] = dict(labels)
            self._dirty.update(key for key in self._served if key.namespace == name)

    def service(self, key: Key, wish: Wish | None, shown: Shown | None = None) -> None:
        """What it has is what its status says when that is new; else what it was given."""
        served = self._served.get(key)
        if wish is None:
            if served is not None:
                before = self._holders(served.addresses)
                self._release(key, served.addresses)
                self._waiting.discard(key)
                self._wake(before)
                del self._served[key]
                self.outcomes.pop(key, None)
                self._dirty.discard(key)
            return
        shown = shown or Shown()
        if served is None:
            self._served[key] = _Served(wish, shown, ())
        elif served.wish == wish and served.shown == shown:
            return
        else:
            served.written |= served.shown.addresses != shown.addresses
            served.wish, served.shown = wish, shown
        self._dirty.add(key)

    # Decisions

    def settle(self) -> set[Key]:
        """The Services whose outcome is another one now."""
        changed: set[Key] = set()
        while self._dirty:
            self._dirty |= self._rivals()
            dirty = sorted(self._dirty, key=lambda key: self._served[key].wish.order())
            self._dirty = set()
            had = {key: self._had(self._served[key]) for key in dirty}
            before = self._holders(addr for key in dirty for addr in self._served[key].addresses)
            for key in dirty:
                served = self._served[key]
                self._release(key, served.addresses)
                served.addresses, served.written = (), False
            for key in dirty:
                self._keep(key, had[key][0])
            for key in dirty:
                self._keep(key, self._lacking(key, had[key][1]))
            for key in dirty:
                outcome = self._decide(key)
                if self.outcomes.get(key) != outcome:
                    self.outcomes[key] = outcome
                    changed.add(key)
            nobody: Mapping[Key, Wish] = {}
            given = (addr for key in dirty for addr in self._served[key].addresses)
            self._wake(dict.fromkeys(given, nobody) | before)
        return changed

    def _rivals(self) -> set[Key]:
        """Who holds what the status of others says now: age decides, not who came first."""
        news = (self._served[key] for key in self._dirty)
        shown = (addr for served in news if served.written for addr in served.shown.addresses)
        return {key for addr in shown for key in self._held.get(addr, ())}

    def _holders(self, addresses: Iterable[Addr]) -> dict[Addr, dict[Key, Wish]]:
        return {addr: dict(self._held[addr]) for addr in addresses}

    def _wake(self, before: Mapping[Addr, Mapping[Key, Wish]]) -> None:
        """Somebody may have waited for an address that nobody holds any more, or been told who
        has it. `before`: who held those that may have moved."""
        moved = {addr for addr, holders in before.items() if self._held.get(addr, {}) != holders}
        if moved - self._held.keys():
            self._dirty |= self._waiting
        elif moved:
            waiting = ((key, self._served[key].wish.requested) for key in self._waiting)
            self._dirty.update(key for key, asked in waiting if not moved.isdisjoint(asked))

    def counts(self) -> dict[Key, tuple[Counts, Counts]]:
        """Of IPv4 and IPv6, by pool; a pool without addresses is not there."""
        found: dict[Key, tuple[Counts, Counts]] = {}
        for room in self._rooms:
            ipv4, ipv6 = found.get(room.pool.key, (Counts(), Counts()))
            if room.ipv4:
                ipv4 = room.counts
            else:
                ipv6 = room.counts
            found[room.pool.key] = (ipv4, ipv6)
        return found

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def _had(self, served: _Served) -> tuple[tuple[Addr, ...], tuple[Addr, ...]]:
        """What its status says, and what it was given besides."""
        outcome, shown = self.outcomes.get(served.wish.key), served.shown.addresses
        if outcome is None or outcome.addresses is None:
            return shown, ()
        if not served.written:
            shown = tuple(addr for addr in served.addresses if addr in shown)
        return shown, tuple(addr for addr in served.addresses if addr not in shown)

    def _lacking(self, key: Key, given: Iterable[Addr]) -> list[Addr]:
        """Without what its status says something else in place of, unless it asks for that."""
        served = self._served[key]
        has = {is_ipv4(addr) for addr in served.addresses}
        return [a for a in given if is_ipv4(a) not in has or a in served.wish.requested]

    def _theirs(self, served: _Served) -> bool:
        """A class-less Service that somebody else gave what it has; or nobody gives it anything,
        as there are no pools."""
        wish, shown = served.wish, served.shown
        known = self.outcomes.get(wish.key)
        if wish.explicit or shown.condition is not None or (known and known.addresses is not None):
            return False
        if not self._rooms:
            return True
        if not shown.addresses:
            return shown.odd
        return not all(self._room(addr) is not None for addr in shown.addresses)

    def _keep(self, key: Key, had: Sequence[Addr]) -> None:
        served = self._served[key]
        if self._theirs(served):
            return
        for addr in had:
            if is_ipv4(addr) in served.wish.families and not self._why_not(addr, served.wish):
                self._hold(addr, served)

    def _decide(self, key: Key) -> Outcome:
        served = self._served[key]
        self._waiting.discard(key)
        if self._theirs(served):
            return Outcome(None)
        problems: list[Problem] = []
        wish = served.wish
        for addr in wish.requested:
            if is_ipv4(addr) not in wish.families:
                name = family_name(is_ipv4(addr))
                words = f"{text(addr)} is of {name}, which the Service is not: add it to "
                problems.append(Problem("", words + "spec.ipFamilies", NOT_AVAILABLE))
        result: list[Addr] = []
        for ipv4 in wish.families:
            requested = of_family(wish.requested, ipv4)
            if requested:
                result += self._give_requested(served, requested, ipv4, problems)
            else:
                result += self._give_any(served, ipv4, problems)
        surplus = tuple(addr for addr in served.addresses if addr not in result)
        served.addresses = tuple(result)
        self._release(key, surplus)
        if problems:
            self._waiting.add(key)
        return Outcome(tuple(result), tuple(problems))

    def _give_requested(
        self, served: _Served, requested: list[Addr], ipv4: bool, problems: list[Problem]
    ) -> list[Addr]:
        before = of_family(served.addresses, ipv4)
        given: list[Addr] = []
        for addr in requested:
            why_not = "" if addr in before else self._why_not(addr, served.wish)
            if why_not:
                problems.append(Problem("", why_not, NOT_AVAILABLE))
                continue
            if addr not in before:
                self._hold(addr, served)
            given.append(addr)
        return given or before

    def _give_any(self, served: _Served, ipv4: bool, problems: list[Problem]) -> list[Addr]:
        if before := of_family(served.addresses, ipv4):
            return before[:1]
        wish = served.wish
        for addr in self._shared.get(wish.sharing.key, ()) if wish.sharing.key else ():
            room = self._room(addr)
            if is_ipv4(addr) != ipv4 or room is None or not room.pool.auto_assign:
                continue
            if not self._why_not(addr, wish):
                self._hold(addr, served)
                return [addr]
        rooms = [r for r in self._rooms if r.ipv4 == ipv4 and self._selects(r, wish)]
        for room in rooms:
            if not room.pool.auto_assign:
                continue
            free = room.next_free(self._held)
            if free is not None:
                self._hold(free, served)
                return [free]
        problems.append(_nothing(ipv4, rooms))
        return []

    # Who holds what

    def _room(self, addr: Addr) -> Room | None:
        value = number(addr)
        at = bisect_right(self._parts, value, key=lambda part: part[0]) - 1
        return self._parts[at][2] if at >= 0 and value <= self._parts[at][1] else None

    def _selects(self, room: Room, wish: Wish) -> bool:
        return room.pool.selects(dict(wish.labels), self._namespaces.get(wish.key.namespace))

    def _why_not(self, addr: Addr, wish: Wish) -> str:
        """What keeps a Service from having it. Empty: nothing."""
        room = self._room(addr)
        if room is None:
            return f"{text(addr)} is in no usable block of a LoadBalancerPool"
        if room.excludes(addr):
            return f"{text(addr)} is a node's address"
        if not self._selects(room, wish):
            words = f"{text(addr)} is of LoadBalancerPool {room.pool.key}, whose selectors"
            return f"{words} do not select this Service"
        for other in sorted(self._held.get(addr, {}).values(), key=Wish.order):
            if why_not := share(wish, other):
                return f"{text(addr)} is that of Service {other.key}, not to be shared {why_not}"
        return ""

    def _hold(self, addr: Addr, served: _Served) -> None:
        holders = self._held.setdefault(addr, {})
        if not holders and (room := self._room(addr)) is not None:
            room.used += 1
        holders[served.wish.key] = served.wish
        served.addresses += (addr,)
        if served.wish.sharing.key:
            self._shared.setdefault(served.wish.sharing.key, {})[addr] = None

    def _release(self, key: Key, addresses: Iterable[Addr]) -> None:
        for addr in addresses:
            holders = self._held[addr]
            wish = holders.pop(key)
            sharing = wish.sharing.key
            if sharing and not any(other.sharing.key == sharing for other in holders.values()):
                del self._shared[sharing][addr]
                if not self._shared[sharing]:
                    del self._shared[sharing]
            if holders:
                continue
            del self._held[addr]
            if (room := self._room(addr)) is not None:
                room.used -= 1
                room.freed(addr)


def _nothing(ipv4: bool, rooms: list[Room]) -> Problem:
    """`rooms`: those that there are for the Service."""
    name = family_name(ipv4)
    given = [str(room.pool.key) for room in rooms if room.pool.auto_assign]
    if given:
        words = f"no {name} address is free in LoadBalancerPool {', '.join(given)}: add a block"
        return Problem("", words, NO_ADDRESS)
    if rooms:
        words = f"LoadBalancerPool {', '.join(str(room.pool.key) for room in rooms)} has "
        words += f"autoAssign false: ask for one of its addresses by annotation {IPS}"
        return Problem("", words, NO_POOL)
    words = f"no LoadBalancerPool with {name} addresses selects this Service: add one, or change "
    return Problem("", words + "the Service's labels", NO_POOL)
