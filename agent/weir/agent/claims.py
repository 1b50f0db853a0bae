# SPDX-License-Identifier: Apache-2.0
"""Who has an address and port that several ask for.

What Kubernetes itself gave out goes before what a user wrote into an object: a Service must not
take another's cluster IP by naming it in externalIPs. Among equals the first keeps it. The operator
refuses most of this before it gets here (`Service.refused`), and tells the user.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
Owner = TypeVar("Owner", bound=Hashable)


class Claims(Generic[K, Owner]):
    """Ranks: lower ones are better."""

    def __init__(self) -> None:
        self._owners: dict[K, Owner] = {}
        self._ranks: dict[K, int] = {}  # without those of rank 0: nearly all
        self._waiting: dict[K, list[tuple[int, Owner]]] = {}

    def owner(self, key: K) -> Owner | None:
        return self._owners.get(key)

    @property
    def owners(self) -> Mapping[K, Owner]:
        return self._owners

    def waiting(self) -> Iterator[tuple[K, Owner]]:
        """Claims that somebody else has."""
        for key, queue in self._waiting.items():
            for _, owner in queue:
                yield key, owner

    def claim(self, key: K, owner: Owner, rank: int) -> Owner | None:
        """Returns who lost it to `owner`. Whether `owner` has it now, `owner()` tells."""
        current = self._owners.get(key)
        if current is None:
            self._give(key, owner, rank)
            return None
        if current == owner:
            return None
        if rank >= self._ranks.get(key, 0):
            self._queue(key, owner, rank)
            return None
        self._unqueue(key, owner)
        self._queue(key, current, self._ranks.get(key, 0))
        self._give(key, owner, rank)
        return current

    def release(self, key: K, owner: Owner) -> Owner | None:
        """Returns who has it now, if `owner` had it and somebody waited."""
        if self._owners.get(key) != owner:
            self._unqueue(key, owner)
            return None
        queue = self._waiting.get(key)
        del self._owners[key]
        self._ranks.pop(key, None)
        if not queue:
            return None
        rank, following = min(queue, key=lambda item: item[0])
        self._unqueue(key, following)
        self._give(key, following, rank)
        return following

    def _give(self, key: K, owner: Owner, rank: int) -> None:
        self._owners[key] = owner
        if rank:
            self._ranks[key] = rank
        else:
            self._ranks.pop(key, None)

    def _queue(self, key: K, owner: Owner, rank: int) -> None:
        queue = self._waiting.setdefault(key, [])
        if all(waiting != owner for _, waiting in queue):
            queue.append((rank, owner))

    def _unqueue(self, key: K, owner: Owner) -> None:
        queue = [item for item in self._waiting.get(key, ()) if item[1] != owner]
        if queue:
            self._waiting[key] = queue
        else:
            self._waiting.pop(key, None)
