# SPDX-License-Identifier: Apache-2.0
"""LoadBalancerPools: whose addresses Services of type LoadBalancer get, and which of them can be.

A block that overlaps what is the cluster's own, or a block of a pool that was created earlier, is
not used: two Services would get one address, or a Service one that is routed elsewhere. An address
of a node is left out alone. The rest of the pool works. A pool whose selector cannot be
understood is for nobody: it was meant for somebody in particular.

No address is in two pools, as they come out of `judge`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from weir.api.address import V4_BITS, V4_PREFIX, Addr, Cidr, is_ipv4, parse, parse_cidr, text
from weir.operator import wire
from weir.operator.conditions import Condition
from weir.operator.objects import Key, Parsed, Problem, key_of
from weir.operator.policy import parse_label_selector
from weir.operator.selectors import LabelSelector

API = "weir.dev/v1alpha1"
PATH = f"/apis/{API}/loadbalancerpools"
KIND = "LoadBalancerPool"
ACCEPTED = "Accepted"
FREE_MOST = (1 << 53) - 1  # what every JSON parser can hold
_V4 = int.from_bytes(V4_PREFIX, "big")
_SPECIAL_IPV4 = ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3")
_SPECIAL_IPV6 = ("::/127", "fe80::/10", "ff00::/8")
_SPECIAL = tuple(parse_cidr(cidr) for cidr in (*_SPECIAL_IPV4, *_SPECIAL_IPV6))


class WireBlock(wire.Struct):
    cidr: str | None = None
    first: str | None = None
    last: str | None = None


class Spec(wire.Struct):
    blocks: list[WireBlock] | None = None
    service_selector: wire.LabelSelector | None = None
    namespace_selector: wire.LabelSelector | None = None
    auto_assign: bool | None = None
    announce: bool | None = None
    skip_network_and_broadcast: bool | None = None


class Counts(wire.Struct):
    """Addresses of one family in a pool. `free` may be more than FREE_MOST, and then is that."""

    used: int = 0
    free: int = 0


class Status(wire.Struct):
    conditions: list[Condition] | None = None
    ipv4: Counts | None = None
    ipv6: Counts | None = None


class WirePool(wire.Named):
    spec: Spec = msgspec.field(default_factory=Spec)
    status: Status | None = None


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Addresses as numbers of 128 bits, both ends included; all of one family."""

    first: int
    last: int

    @property
    def ipv4(self) -> bool:
        return self.first >> 32 == _V4

    @property
    def size(self) -> int:
        return self.last - self.first + 1

    def overlaps(self, other: Range) -> bool:
        return self.first <= other.last and other.first <= self.last

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last


_MAPPED = Range(_V4 << 32, ((_V4 + 1) << 32) - 1)


@dataclass(frozen=True, slots=True)
class Block:
    field: str  # as problems name it
    text: str
    range: Range


@dataclass(frozen=True, slots=True)
class Pool:
    """`problems` are those of the object alone; `status` is what it says now."""

    key: Key
    uid: str
    generation: int
    created: str  # RFC 3339 in UTC, so that text order is time order
    blocks: tuple[Block, ...]
    services: LabelSelector | None  # None: it cannot be understood
    namespaces: LabelSelector | None
    auto_assign: bool = True
    announce: bool = True
    problems: tuple[Problem, ...] = ()
    status: Status | None = None

    @property
    def condition(self) -> Condition | None:
        conditions = (self.status.conditions if self.status else None) or []
        return next((c for c in conditions if c.type == ACCEPTED), None)

    def has(self, number: int) -> bool:
        return any(number in block.range for block in self.blocks)

    def selects(self, labels: Mapping[str, str], namespace: Mapping[str, str] | None) -> bool:
        """`namespace`: its labels, None if it is not known."""
        if self.services is None or self.namespaces is None:
            return False
        if self.namespaces.requirements and namespace is None:
            return False
        return self.services.matches(labels) and self.namespaces.matches(namespace or {})

    def preference(self) -> tuple[int, str]:
        """Pools for some come before pools for all, then by name."""
        selectors = (self.services, self.namespaces)
        return -sum(bool(s and s.requirements) for s in selectors), self.key.name


def number(addr: Addr) -> int:
    return int.from_bytes(addr, "big")


def address(value: int) -> Addr:
    return Addr(value.to_bytes(16, "big"))


def range_of(cidr: Cidr) -> Range:
    first = number(cidr.address)
    return Range(first, first + (1 << (128 - cidr.bits)) - 1)


def parse_pool(raw: WirePool) -> Parsed[Pool]:
    """Problems are the judge's to tell, with those that are of the cluster."""
    problems: list[Problem] = []
    spec = raw.spec
    skip = bool(spec.skip_network_and_broadcast)
    blocks = [
        Block(f"spec.blocks[{i}]", words, found)
        for i, block in enumerate(spec.blocks or [])
        for words, found in _block(block, f"spec.blocks[{i}]", skip, problems)
    ]
    services, whole = parse_label_selector(spec.service_selector, "spec.serviceSelector", problems)
    namespaces, all_of_it = parse_label_selector(
        spec.namespace_selector, "spec.namespaceSelector", problems
    )
    meta = raw.metadata
    return Parsed(
        Pool(
            key=key_of(meta),
            uid=meta.uid,
            generation=meta.generation or 0,
            created=meta.creation_timestamp or "",
            blocks=tuple(blocks),
            services=services if whole else None,
            namespaces=namespaces if all_of_it else None,
            auto_assign=spec.auto_assign is not False,
            announce=spec.announce is not False,
            problems=tuple(problems),
            status=raw.status,
        )
    )


def _block(
    raw: WireBlock, where: str, skip: bool, problems: list[Problem]
) -> Iterable[tuple[str, Range]]:
    """One or none."""
    try:
        return [_range(raw, skip)]
    except ValueError as error:
        problems.append(Problem(where, str(error)))
        return []


def _range(raw: WireBlock, skip: bool) -> tuple[str, Range]:
    """In words, and in numbers. ValueError."""
    if raw.cidr and (raw.first or raw.last):
        raise ValueError("has both a cidr and a range: choose one")
    if raw.cidr:
        cidr = parse_cidr(raw.cidr)
        words, found = cidr.text(), range_of(cidr)
        if skip:
            found = _hosts(cidr, found)
    elif raw.first and raw.last:
        first, last = parse(raw.first), parse(raw.last)
        words, found = f"{text(first)}-{text(last)}", Range(number(first), number(last))
        if is_ipv4(first) != is_ipv4(last):
            raise ValueError(f"{words}: first and last must be of one family")
        if last < first:
            raise ValueError(f"{words}: last is before first")
    else:
        raise ValueError("needs a cidr, or first and last")
    if not found.ipv4 and found.overlaps(_MAPPED):
        raise ValueError(f"{words} has IPv4 addresses written as IPv6: write them as IPv4")
    for special in _SPECIAL:
        if found.overlaps(range_of(special)):
            raise ValueError(f"{words} overlaps {special.text()}, which no Service can have")
    return words, found


def _hosts(cidr: Cidr, whole: Range) -> Range:
    """Without the network's own address, and IPv4's broadcast address, where there are such."""
    if cidr.is_ipv4:
        return Range(whole.first + 1, whole.last - 1) if cidr.bits < V4_BITS + 31 else whole
    return Range(whole.first + 1, whole.last) if cidr.bits < 127 else whole


@dataclass(frozen=True, slots=True)
class Cluster:
    """What pools may not give away."""

    networks: tuple[tuple[str, Range], ...] = ()  # with whose they are, in words
    hosts: Mapping[Addr, str] = field(default_factory=dict)  # addresses with their nodes


@dataclass(frozen=True, slots=True)
class Judged:
    """A pool with what of it can be given: blocks that no other pool has, less single addresses
    of others. `problems` are all that there are."""

    pool: Pool
    problems: tuple[Problem, ...] = ()
    excluded: frozenset[Addr] = frozenset()


def judge(pools: Iterable[Pool], cluster: Cluster) -> dict[Key, Judged]:
    judged: dict[Key, Judged] = {}
    accepted: list[tuple[Range, Pool]] = []
    hosts = sorted((number(addr), node) for addr, node in cluster.hosts.items())
    numbers = [at for at, _ in hosts]
    for pool in sorted(pools, key=lambda pool: (pool.created, pool.key)):
        kept: list[Block] = []
        problems = list(pool.problems)
        excluded: dict[Addr, str] = {}
        for block in pool.blocks:
            whose = _owner(block.range, pool, cluster, accepted)
            if whose:
                message = f"{block.text} is not used: it overlaps {whose}; choose other addresses"
                problems.append(Problem(block.field, message, "Overlap"))
                continue
            for part in _without(block.range, (r for r, of in accepted if of.key == pool.key)):
                kept.append(replace(block, range=part))
                accepted.append((part, pool))
            low = bisect_right(numbers, block.range.first - 1)
            high = bisect_right(numbers, block.range.last)
            excluded |= {address(at): node for at, node in hosts[low:high]}
        if excluded:
            shown = ", ".join(f"{text(a)} ({node})" for a, node in list(excluded.items())[:3])
            more = f" and {len(excluded) - 3} more" if len(excluded) > 3 else ""
            message = f"has addresses of nodes, which are left out: {shown}{more}"
            problems.append(Problem("spec.blocks", message, "Overlap"))
        usable = replace(pool, blocks=tuple(sorted(kept, key=lambda block: block.range)))
        judged[pool.key] = Judged(usable, tuple(problems), frozenset(excluded))
    return judged


def _owner(wanted: Range, pool: Pool, cluster: Cluster, accepted: list[tuple[Range, Pool]]) -> str:
    """Whose some of it is. Empty: nobody's."""
    for whose, network in cluster.networks:
        if wanted.overlaps(network):
            return whose
    for other, of in accepted:
        if of.key != pool.key and wanted.overlaps(other):
            return f"LoadBalancerPool {of.key}, which was created first"
    return ""


def _without(wanted: Range, known: Iterable[Range]) -> list[Range]:
    """What a pool says twice, it has once."""
    parts = [wanted]
    for other in known:
        parts = [
            piece
            for part in parts
            for piece in (
                (
                    Range(part.first, min(part.last, other.first - 1)),
                    Range(max(part.first, other.last + 1), part.last),
                )
                if part.overlaps(other)
                else (part,)
            )
            if piece.first <= piece.last
        ]
    return parts


def condition(judged: Judged) -> Condition:
    pool = judged.pool
    if not judged.problems:
        return Condition(ACCEPTED, "True", "Accepted", "all blocks are used", pool.generation)
    words = "; ".join(f"{p.field}: {p.message}" for p in judged.problems[:5])
    more = len(judged.problems) - 5
    words += f"; and {more} more problems" if more > 0 else ""
    return Condition(ACCEPTED, "False", judged.problems[0].reason, words, pool.generation)
