# SPDX-License-Identifier: Apache-2.0
"""Which ports masquerading takes beside the node's own connections."""

from __future__ import annotations

import logging

import pytest

from weir.agent.node import snat_ports


@pytest.mark.parametrize(
    ("own", "ours"),
    [
        ((32768, 60999), (1024, 29999)),  # Linux's default
        ((15000, 60999), (1024, 14999)),
        ((1024, 32767), (32768, 65535)),
        ((2000, 60000), (60001, 65535)),
    ],
)
def test_the_larger_side_of_the_nodes_own(own: tuple[int, int], ours: tuple[int, int]) -> None:
    assert snat_ports(*own) == ours


def test_no_side_is_left(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert snat_ports(1024, 65535) == (1024, 29999)
    assert "ip_local_port_range leaves no port" in caplog.text
