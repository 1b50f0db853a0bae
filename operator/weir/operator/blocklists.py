# SPDX-License-Identifier: Apache-2.0
"""BlockLists: whose packets every node drops, less what would cut the cluster itself.

A prefix that cannot be read, or that has an address of a node, of an API server or of a pod CIDR
in it, is left out, and the object's condition and an Event say so; its other prefixes are in
force. What is the cluster's own changes with its nodes, so lists are judged again then.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from weir.api.address import Cidr, parse_cidr
from weir.api.v1 import weir_pb2 as pb
from weir.operator import wire
from weir.operator.claims import Tell
from weir.operator.conditions import Condition, Conditions
from weir.operator.objects import EndpointSlice, Key, Node, Parsed, Problem, key_of
from weir.operator.resources import Change
from weir.operator.servers import servers
from weir.operator.writes import Reference

API = "weir.dev/v1alpha1"
PATH = f"/apis/{API}/blocklists"
KIND = "BlockList"
ACCEPTED = "Accepted"
PROBLEMS_SHOWN = 3
CLUSTERS_OWN = "nodes, pods or API servers have addresses in it"


class Spec(wire.Struct):
    cidrs: list[str] | None = None


class Status(wire.Struct):
    conditions: list[Condition] | None = None


class WireBlockList(wire.Named):
    spec: Spec = msgspec.field(default_factory=Spec)
    status: Status | None = None


@dataclass(frozen=True, slots=True)
class BlockList:
    """`problems` are those of the object alone; `condition` is what its status says now."""

    key: Key
    uid: str
    generation: int
    cidrs: tuple[tuple[int, Cidr], ...]  # with their place in spec.cidrs
    problems: tuple[Problem, ...]
    condition: Condition | None


def parse_blocklist(raw: WireBlockList) -> Parsed[BlockList]:
    """Problems are the judge's to tell, with those that are of the cluster."""
    found: dict[Cidr, int] = {}
    problems: list[Problem] = []
    for i, text in enumerate(raw.spec.cidrs or []):
        try:
            found.setdefault(parse_cidr(text), i)
        except ValueError as error:
            problems.append(Problem(f"spec.cidrs[{i}]", str(error)))
    conditions = (raw.status.conditions if raw.status else None) or []
    meta = raw.metadata
    return Parsed(
        BlockList(
            key=key_of(meta),
            uid=meta.uid,
            generation=meta.generation or 0,
            cidrs=tuple((i, cidr) for cidr, i in found.items()),
            problems=tuple(problems),
            condition=next((c for c in conditions if c.type == ACCEPTED), None),
        )
    )


class _Own:
    """What the cluster needs, as intervals of addresses that do not overlap."""

    def __init__(self, cidrs: Iterable[Cidr]) -> None:
        self.first: list[int] = []
        self.last: list[int] = []
        for low, high in sorted(_interval(cidr) for cidr in cidrs):
            if self.last and low <= self.last[-1]:
                self.last[-1] = max(self.last[-1], high)
            else:
                self.first.append(low)
                self.last.append(high)

    def meets(self, cidr: Cidr) -> bool:
        low, high = _interval(cidr)
        at = bisect_right(self.first, high) - 1
        return at >= 0 and self.last[at] >= low


def _interval(cidr: Cidr) -> tuple[int, int]:
    low = int.from_bytes(cidr.address, "big")
    return low, low + (1 << (128 - cidr.bits)) - 1


@dataclass(slots=True)
class BlockLists:
    """All of them, and what is the cluster's own. `settle` once changes are over."""

    tell: Tell
    conditions: Conditions
    _lists: dict[Key, BlockList] = field(default_factory=dict)
    _own: dict[tuple[str, Key], frozenset[Cidr]] = field(default_factory=dict)
    _changed: dict[Key, None] = field(default_factory=dict)
    _told: dict[Key, tuple[str, tuple[Problem, ...]]] = field(default_factory=dict)

    def change(self, key: Key, new: BlockList | None) -> None:
        if new is None:
            self._lists.pop(key, None)
        else:
            self._lists[key] = new
        self._changed[key] = None

    def node(self, key: Key, new: Node | None) -> None:
        own = {Cidr(addr, 128) for addr in new.addresses} | {*new.pod_cidrs} if new else set()
        self._keep("Node", key, own)

    def slice(self, key: Key, new: EndpointSlice | None) -> None:
        """API servers need not be nodes."""
        if key.namespace == "default":
            named = new is not None and servers(new)
            own = {Cidr(e.address, 128) for e in new.endpoints} if new and named else set()
            self._keep("EndpointSlice", key, own)

    def _keep(self, kind: str, key: Key, own: set[Cidr]) -> None:
        old = self._own.pop((kind, key), frozenset())
        if own:
            self._own[kind, key] = frozenset(own)
        if old != own:
            self._changed.update(dict.fromkeys(self._lists))

    @property
    def with_problems(self) -> int:
        return sum(bool(problems) for _, problems in self._told.values())

    def settle(self) -> list[Change]:
        """Resources of the lists that changed; tells problems and conditions that are news."""
        if not self._changed:
            return []
        own = _Own(cidr for cidrs in self._own.values() for cidr in cidrs)
        changes = []
        changed, self._changed = self._changed, {}
        for key in changed:
            new = self._lists.get(key)
            if new is None:
                self._told.pop(key, None)
                self.conditions.forget(_status_path(key))
                changes.append(resource(key, None))
                continue
            cidrs = [cidr for _, cidr in new.cidrs if not own.meets(cidr)]
            problems = new.problems + tuple(
                Problem(
                    f"spec.cidrs[{i}]",
                    f"{cidr.text()} is not blocked: {CLUSTERS_OWN}",
                )
                for i, cidr in new.cidrs
                if own.meets(cidr)
            )
            self._judge(new, len(cidrs), problems)
            changes.append(resource(key, cidrs))
        return changes

    def _judge(self, of: BlockList, blocked: int, problems: tuple[Problem, ...]) -> None:
        self.conditions.want(_status_path(of.key), condition(of, blocked, problems), of.condition)
        if self._told.get(of.key, (of.uid, ())) != (of.uid, problems):
            about = Reference(API, KIND, "", of.key.name, of.uid, "", of.generation)
            self.tell(about, problems)
        self._told[of.key] = (of.uid, problems)


def _status_path(key: Key) -> str:
    return f"{PATH}/{key.name}/status"


def condition(of: BlockList, blocked: int, problems: tuple[Problem, ...]) -> Condition:
    in_force = f"{blocked} prefixes are blocked" if blocked != 1 else "1 prefix is blocked"
    if not problems:
        return Condition(ACCEPTED, "True", "Accepted", in_force, of.generation)
    shown = "; ".join(f"{p.field}: {p.message}" for p in problems[:PROBLEMS_SHOWN])
    more = len(problems) - PROBLEMS_SHOWN
    text = f"{shown}; and {more} more problems" if more > 0 else shown
    return Condition(ACCEPTED, "False", "Invalid", f"{text}; {in_force}", of.generation)


def resource(key: Key, cidrs: Iterable[Cidr] | None) -> Change:
    name = f"blocked/{key.name}"
    if cidrs is None:
        return Change(name, None)
    message = pb.Blocked(
        name=key.name, cidrs=[pb.Cidr(address=c.address, bits=c.bits) for c in sorted(cidrs)]
    )
    return Change(name, pb.Resource(name=name, blocked=message))
