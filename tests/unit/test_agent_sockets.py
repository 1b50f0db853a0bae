# SPDX-License-Identifier: Apache-2.0
"""Ending sockets: what the kernel refuses keeps nobody from the rest."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from weir.agent import sockets
from weir.agent.sockets import Connected
from weir.api.address import parse
from weir.cni.netlink import NetlinkError

PEER = (parse("10.0.0.1"), 53)


class Diag:
    """Of a node with sockets 1, 2 and 3; 2 cannot be ended."""

    ended: list[int]

    def __init__(self) -> None:
        Diag.ended = []

    def __enter__(self) -> Diag:
        return self

    def __exit__(self, *_args: object) -> None:
        pass

    def connected_udp(self) -> Iterator[Connected]:
        for cookie in (1, 2, 3):
            yield Connected(cookie, PEER, socket.AF_INET, bytes(48))

    def destroy(self, victim: Connected) -> None:
        if victim.cookie == 2:
            raise NetlinkError("destroy", errno.EBUSY)
        self.ended.append(victim.cookie)


def test_one_that_cannot_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "SockDiag", Diag)
    assert sockets.destroy({1: {PEER}, 2: {PEER}, 3: {PEER}, 4: {PEER}}, ["/none"]) == 2
    assert Diag.ended == [1, 3]


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "no descriptor"), NetlinkError("list", errno.EPERM)]
)
def test_nothing_can_be_asked(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse() -> None:
        raise error

    monkeypatch.setattr(sockets, "SockDiag", refuse)
    assert sockets.destroy({1: {PEER}}, []) == 0
