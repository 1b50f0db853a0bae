# SPDX-License-Identifier: Apache-2.0
"""What nodes have no room for, told by an Event on each policy concerned.

An agent says of which policies its maps hold less than they allow. A thousand nodes may say so of
one policy, to several replicas. So what is told of a policy waits a little for the others to say
it, names one node and the number of the rest, and is one Event whoever posts it. Of very many
policies only some are told: the maps are full then, whatever policy one looks at.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from weir.api.v1 import weir_pb2 as pb
from weir.operator import cluster_policy, wire
from weir.operator.api import Api, ApiError
from weir.operator.claims import Tell
from weir.operator.objects import Key, Problem
from weir.operator.writes import Reference

logger = logging.getLogger(__name__)

SETTLE_SECONDS = 5.0
RETRY_SECONDS = 15.0
MOST_OF_NODE = 1000  # policies that one node's word is taken for
MOST_TOLD = 100  # policies at a time
REASON = "NoRoom"
NOT_FOUND = 404
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(slots=True)
class Troubles:
    """Of the agents connected here. Runs until cancelled."""

    api: Api
    tell: Tell
    settle_seconds: float = SETTLE_SECONDS
    retry_seconds: float = RETRY_SECONDS
    _nodes: dict[Key, dict[str, str]] = field(default_factory=dict)  # with what each says
    _policies: dict[str, frozenset[Key]] = field(default_factory=dict)  # by node
    _told: set[Key] = field(default_factory=set)
    _untold: dict[Key, None] = field(default_factory=dict)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __len__(self) -> int:
        """Policies that some node has no room for."""
        return len(self._nodes)

    def heard(self, node: str, said: Iterable[pb.PolicyTrouble]) -> None:
        """All that a node has to say; nothing, too, when its stream ends."""
        found: dict[Key, str] = {}
        for trouble in said:
            if len(found) == MOST_OF_NODE:
                logger.warning("%s: has no room for more than %d policies", node, MOST_OF_NODE)
                break
            names = (trouble.name, trouble.namespace or "none")
            if not all(_NAME.fullmatch(name) for name in names):
                logger.warning("%s: names a policy that cannot be: refused", node)
                continue
            found[Key(trouble.namespace, trouble.name)] = trouble.message
        for key in self._policies.pop(node, frozenset()) - found.keys():
            self._nodes[key].pop(node)
            if not self._nodes[key]:
                del self._nodes[key]
                self._told.discard(key)
                self._untold.pop(key, None)
                self._news.set()  # there may be room for another
        if found:
            self._policies[node] = frozenset(found)
        for key, message in found.items():
            self._nodes.setdefault(key, {})[node] = message
            if key not in self._told:
                self._untold[key] = None
                self._news.set()

    async def run(self) -> None:
        while True:
            await self._news.wait()
            await asyncio.sleep(self.settle_seconds)
            self._news.clear()
            while self._untold and len(self._told) < MOST_TOLD:
                key = next(iter(self._untold))
                del self._untold[key]
                self._told.add(key)
                try:
                    await self._tell(key)
                except ApiError as error:
                    logger.info("to be tried again: %s", error)
                    self._told.discard(key)
                    if key in self._nodes:
                        self._untold[key] = None
                        self._news.set()
                    await asyncio.sleep(self.retry_seconds)
            if self._untold:
                logger.warning("nodes have no room for %d more policies", len(self._untold))

    async def _tell(self, key: Key) -> None:
        about = await self._reference(key)
        nodes = self._nodes.get(key)
        if about is None or not nodes:
            return
        first = min(nodes)
        others = f" and {len(nodes) - 1} more" if len(nodes) > 1 else ""
        text = f"not all of it is enforced as written on node {first}{others}: {nodes[first]}"
        # Whoever posts it, and whatever nodes it names, it is one Event.
        self.tell(about, (Problem("", text, REASON, identity=REASON),))

    async def _reference(self, key: Key) -> Reference | None:
        """None: there is no such policy any more."""
        if key.namespace:
            version, kind = "networking.k8s.io/v1", "NetworkPolicy"
            path = f"/apis/{version}/namespaces/{key.namespace}/networkpolicies/{key.name}"
        else:
            version, kind = cluster_policy.API, cluster_policy.KIND
            path = f"{cluster_policy.PATH}/{key.name}"
        try:
            meta = msgspec.json.decode(await self.api.get(path), type=wire.Named).metadata
        except msgspec.DecodeError as error:
            logger.warning("%s %s: cannot be read: %s", kind, key, error)
            return None
        except ApiError as error:
            if error.status == NOT_FOUND:
                return None
            raise
        return Reference(
            version,
            kind,
            key.namespace,
            key.name,
            meta.uid,
            meta.resource_version,
            meta.generation or 0,
        )
