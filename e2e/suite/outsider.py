# SPDX-License-Identifier: Apache-2.0
"""A client that is neither pod nor node: at the control plane's end of the local underlay."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pytest

from e2e.suite.kubectl import REPOSITORY, is_local
from e2e.suite.probes import Probe, ProbeError

_PROBE = str(REPOSITORY / "e2e" / "suite" / "probe.py")
START_S = 10


class Outsider(Probe):
    """The probe there; it is reached by its socket, not through the API server."""

    def __init__(
        self, addresses: tuple[str, ...], device: str, socket: str, enter: list[str]
    ) -> None:
        """device: the one that is on the nodes' segment."""
        super().__init__("outside", "outside", "", addresses)
        self.device = device
        self._enter = enter
        self.environment = {**os.environ, "PROBE_CONTROL": socket, "PROBE_NAME": "outside"}

    def _relay(self) -> list[str]:
        socket = self.environment["PROBE_CONTROL"]
        return ["env", f"PROBE_CONTROL={socket}", sys.executable, _PROBE, "relay"]

    def serve(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._enter, sys.executable, _PROBE, "serve"], env=self.environment
        )

    def neighbours(self) -> dict[str, str]:
        """MAC addresses that its kernel knows, by address."""
        listed = subprocess.run(
            [*self._enter, "ip", "-json", "neigh", "show"], check=True, capture_output=True
        )
        return {n["dst"]: n["lladdr"] for n in json.loads(listed.stdout) if "lladdr" in n}

    @contextmanager
    def routes(
        self, addresses: dict[str, str], sources: dict[int, str] | None = None
    ) -> Iterator[None]:
        """To addresses of Services (key) by way of nodes (value), as a router would have them.
        sources: by family, the address to ask from, instead of the one that nodes know."""
        for action in ("replace", "del"):
            for address, via in addresses.items():
                family = 6 if ":" in address else 4
                source = ["src", sources[family]] if sources else []
                route = [f"-{family}", "route", action, address, "via", via, *source]
                subprocess.run([*self._enter, "ip", *route], check=True)
            if action == "replace":
                yield

    @contextmanager
    def more_addresses(self, addresses: Iterable[str]) -> Iterator[None]:
        """On the nodes' segment, besides those that it has, and not used unasked: of several IPv6
        addresses the kernel would take the latest, were it not deprecated."""
        for action in ("add", "del"):
            for address in addresses:
                command = ["ip", "address", action, address, "dev", self.device]
                if ":" in address and action == "add":
                    command += ["nodad", "preferred_lft", "0"]
                subprocess.run([*self._enter, *command], check=True)
            if action == "add":
                yield

    @contextmanager
    def ready_for_xdp(self, mode: str, nodes: Iterable[str]) -> Iterator[None]:
        """The far ends of the nodes' uplinks, which have the nodes' names."""
        command = [sys.executable, "-m", "e2e.suite.far_ends", mode, *nodes]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        process = subprocess.Popen(
            [*self._enter, *command], env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line == "ready\n", f"far_ends said {line!r}"
            yield
        finally:
            process.communicate()


@contextmanager
def outsider() -> Iterator[Outsider]:
    if not is_local():
        pytest.skip("no client outside of this cluster")
    from e2e.cluster import namespaces  # noqa: PLC0415 - only the local cluster has them
    from e2e.cluster.control_plane import BRIDGE  # noqa: PLC0415
    from e2e.cluster.paths import SETTINGS  # noqa: PLC0415
    from e2e.cluster.settings import CONTROL_PLANE, load_settings  # noqa: PLC0415

    networks = load_settings(SETTINGS).networks
    enter = namespaces.entered(CONTROL_PLANE, [], only_network=True)
    socket = f"/tmp/weir-e2e-client-{os.getpid()}.sock"
    made = Outsider(tuple(network.gateway for network in networks), BRIDGE, socket, enter)
    process = made.serve()
    try:
        deadline = time.monotonic() + START_S
        while not os.path.exists(socket):  # noqa: PTH110 - a path in a string
            if process.poll() is not None or time.monotonic() > deadline:
                raise ProbeError("the probe outside did not start")
            time.sleep(0.05)
        yield made
    finally:
        made.close()
        process.kill()
        process.wait()
        if os.path.exists(socket):  # noqa: PTH110
            os.unlink(socket)  # noqa: PTH108
