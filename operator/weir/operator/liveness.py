# SPDX-License-Identifier: Apache-2.0
"""Nodes whose kubelet has fallen silent, seen in half the time that Kubernetes takes to say so.

Kubelets renew a Lease every 10 s; controller-manager calls a node not Ready after 40 to 50 s
without. Announced addresses need not wait for that. Each replica measures by its own clock since it
saw the Lease change, as `weir.operator.leader` does. An agent's stream would be no sign: agents
restart with every upgrade, while their node carries on.

If fewer than half of the nodes were heard of lately, it is not the others who fail: renewals do not
get through, or are not seen here. Then nobody is called silent anew. Once they get through again
everybody has the full time from then on, as kubelets come back one after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from weir.operator import wire
from weir.operator.objects import Key, Parsed, Problem

PATH = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
SILENT_SECONDS = 25.0  # two renewals missed
LATELY_SECONDS = 15.0  # whose last renewal was on time
LOOK_SECONDS = 1.0


class Spec(wire.Struct):
    renew_time: str | None = None


class WireLease(wire.Named):
    spec: Spec = msgspec.field(default_factory=Spec)


def parse_lease(raw: WireLease) -> Parsed[str]:
    """The time stands for the renewal; nobody compares it with another clock."""
    return Parsed(raw.spec.renew_time or "")


@dataclass(slots=True)
class Liveness:
    """The consumer of kubelets' Leases. `tell` is given a node and whether it is silent."""

    tell: Callable[[str, bool], None]
    clock: Callable[[], float] = time.monotonic
    silent: set[str] = field(default_factory=set)
    _heard: dict[str, float] = field(default_factory=dict)
    _deaf: float = float("-inf")  # when renewals did not get through, the last time

    def changed(self, _kind: str, key: Key, _old: object | None, new: object | None) -> None:
        if new is None:
            self._heard.pop(key.name, None)
        else:
            self._heard[key.name] = self.clock()
        if key.name in self.silent:
            self.silent.discard(key.name)
            self.tell(key.name, False)

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        """A Lease that cannot be read counts as none."""

    def synced(self, kind: str) -> None:
        """Nothing waits for it."""

    def look(self) -> None:
        now = self.clock()
        lately = sum(now - heard <= LATELY_SECONDS for heard in self._heard.values())
        if 2 * lately < len(self._heard):
            self._deaf = now
        if now - self._deaf <= SILENT_SECONDS:
            return
        late = {name for name, heard in self._heard.items() if now - heard > SILENT_SECONDS}
        for name in sorted(late - self.silent):
            self.silent.add(name)
            self.tell(name, True)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()
