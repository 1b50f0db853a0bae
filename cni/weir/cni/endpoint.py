# SPDX-License-Identifier: Apache-2.0
"""A wired pod, who owns its map rows, and the file that remembers it.

The file is a journal like the pool's, but not synced to disk: what it describes, links and
namespaces, does not outlive a power cut either. It must survive the agent only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from weir.api.address import Addr
from weir.cni.errors import JournalError
from weir.cni.journal import Journal

HOST_PREFIX = "weir"


@dataclass(frozen=True, slots=True)
class PodRef:
    """The pod as the kubelet names it; all empty outside Kubernetes."""

    namespace: str = ""
    name: str = ""
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}" if self.name else "(no pod)"


NO_POD = PodRef()


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    """A pod on this node. `ifindex` and `host_mac` are those of the host end of the veth.
    `netns_cookie` names its network namespace, 0 where the kernel does not tell (before 5.14)."""

    container_id: str
    netns: str
    ifname: str
    host_ifname: str
    ifindex: int
    mac: bytes
    host_mac: bytes
    addresses: tuple[Addr, ...]
    pod: PodRef
    network: str = "weir"
    netns_cookie: int = 0


class EndpointHost(Protocol):
    """What the agent does for a pod: class, map rows, programs. Every call may raise CniError."""

    async def identity(self, pod: PodRef, timeout: float) -> None:  # noqa: ASYNC109 its error says why
        """Returns once the pod's class is known; NotReady after `timeout` seconds."""

    async def publish(self, endpoint: LocalEndpoint) -> None:
        """Returns once all map rows of the endpoint are in place. Idempotent."""

    async def attach(self, ifname: str) -> None:
        """Attaches the programs to the host end, which is still down."""

    async def withdraw(self, container_id: str) -> None:
        """Takes back publish and attach; the device may be gone. Idempotent."""

    def status(self) -> None:
        """NotReady when an ADD would not work now."""


def host_ifname(container_id: str, ifname: str) -> str:
    """The host end's name: 4 + 11 characters, all that IFNAMSIZ leaves."""
    return HOST_PREFIX + _digest(container_id, ifname).hex()[:11]


def mac_addresses(container_id: str, ifname: str) -> tuple[bytes, bytes]:
    """(pod end, host end): locally administered, and the same at every try, so that
    neither udev nor a repeated ADD changes them under permanent neighbour entries."""
    digest = _digest(container_id, ifname)
    return _local(digest[6:12]), _local(digest[12:18])


def _digest(container_id: str, ifname: str) -> bytes:
    return hashlib.sha256(f"{container_id} {ifname}".encode()).digest()


def _local(mac: bytes) -> bytes:
    return bytes([(mac[0] & 0xFC) | 0x02]) + mac[1:]


class _Put(msgspec.Struct, frozen=True, tag="put"):
    endpoint: LocalEndpoint


class _Drop(msgspec.Struct, frozen=True, tag="drop"):
    container_id: str


class EndpointStore:
    """The wired pods by container id, in memory and on disk."""

    def __init__(self, path: Path) -> None:
        self._journal = Journal(path, kind="weir-endpoints", sync=False)
        self._decoder = msgspec.json.Decoder(_Put | _Drop)
        self._endpoints: dict[str, LocalEndpoint] = {}
        for line in self._journal.lines:
            try:
                record = self._decoder.decode(line)
            except msgspec.MsgspecError as error:
                raise JournalError(
                    f"{path}: a record that this version cannot read",
                    details=f"{line[:200]!r}: {error}",
                ) from error
            if isinstance(record, _Put):
                self._endpoints[record.endpoint.container_id] = record.endpoint
            else:
                self._endpoints.pop(record.container_id, None)

    @property
    def endpoints(self) -> Mapping[str, LocalEndpoint]:
        return self._endpoints

    async def put(self, endpoint: LocalEndpoint) -> None:
        """Remembers it; JournalError when the disk does not take it, and then it is forgotten."""
        self._endpoints[endpoint.container_id] = endpoint
        try:
            await self._journal.append(msgspec.json.encode(_Put(endpoint)))
        except JournalError:
            self._endpoints.pop(endpoint.container_id, None)
            raise
        await self._compact()

    async def drop(self, container_id: str) -> None:
        """Forgets it. After a JournalError it is still on disk, where the next start finds that
        its link is gone."""
        if self._endpoints.pop(container_id, None) is not None:
            await self._journal.append(msgspec.json.encode(_Drop(container_id)))
            await self._compact()

    async def _compact(self) -> None:
        if self._journal.long():
            await self._journal.compact(
                [msgspec.json.encode(_Put(e)) for e in self._endpoints.values()]
            )

    def close(self) -> None:
        self._journal.close()
