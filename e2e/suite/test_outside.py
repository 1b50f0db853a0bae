# SPDX-License-Identifier: Apache-2.0
"""The world outside of the cluster: masquerade and ICMP.

On the local cluster that is the control plane's end of the underlay; there a probe serves. On
another cluster WEIR_E2E_OUTSIDE names a host that runs `probe.py serve` with PROBE_TCP=[18080]
PROBE_UDP=[18081].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from e2e.suite.kubectl import REPOSITORY, get, is_local
from e2e.suite.world import World

TCP, UDP = 18080, 18081


@pytest.fixture(scope="module")
def outside() -> Iterator[list[str]]:
    """Addresses of a host that is no node, on which a probe answers."""
    named = os.environ.get("WEIR_E2E_OUTSIDE")
    if named:
        yield named.split(",")
        return
    if not is_local():
        pytest.skip("no host outside of this cluster: set WEIR_E2E_OUTSIDE")
    from e2e.cluster import namespaces  # noqa: PLC0415 - only the local cluster has them
    from e2e.cluster.paths import SETTINGS  # noqa: PLC0415
    from e2e.cluster.settings import CONTROL_PLANE, load_settings  # noqa: PLC0415

    settings = load_settings(SETTINGS)
    server = [sys.executable, str(REPOSITORY / "e2e" / "suite" / "probe.py"), "serve"]
    environment = {**os.environ, "PROBE_TCP": json.dumps([TCP]), "PROBE_UDP": json.dumps([UDP])}
    environment |= {"PROBE_CONTROL": f"/tmp/weir-e2e-{os.getpid()}.sock"}
    command = namespaces.entered(CONTROL_PLANE, server, only_network=True)
    process = subprocess.Popen(command, env=environment)
    try:
        time.sleep(0.5)
        assert process.poll() is None, "the probe outside did not start"
        yield [network.gateway for network in settings.networks]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("client", ["client-1", "client-2"])
def test_pods_leave_the_cluster_by_their_node_s_address(
    cluster: World, outside: list[str], client: str
) -> None:
    probe = cluster[client]
    status = get("node", probe.node)["status"]
    node = {a["address"] for a in status["addresses"] if a["type"] == "InternalIP"}
    for host in outside:
        for protocol, port in (("tcp", TCP), ("udp", UDP)):
            answer = probe.ask(protocol, host, port, timeout=2)
            assert answer.get("peer") in node, (protocol, host, answer)


@pytest.mark.parametrize("client", ["client-1", "client-2"])
def test_pods_ping_the_outside(cluster: World, outside: list[str], client: str) -> None:
    for host in outside:
        for size in (56, 2000):
            answer = cluster[client].call("ping", host=host, size=size)
            assert answer.get("bytes") == size + 8, (host, size, answer)


def test_a_closed_port_outside_is_refused_and_not_dropped(
    cluster: World, outside: list[str]
) -> None:
    """RST for TCP; for UDP the ICMP error finds its way back through the masquerade."""
    for host in outside:
        for protocol in ("tcp", "udp"):
            answer = cluster["client-1"].ask(protocol, host, 18099, timeout=2)
            assert answer.get("error") == "refused", (protocol, host, answer)


def test_large_transfers_to_the_outside(cluster: World, outside: list[str]) -> None:
    for host in outside:
        done = cluster["client-2"].call(
            "transfer", host=host, port=TCP, size=20_000_000, timeout=60
        )
        assert done["sent"], done
        assert done["fetched"], done
