# SPDX-License-Identifier: Apache-2.0
"""Builds and drives load.c: servers, and one client that gives its targets turns."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BenchError

SOURCE = Path(__file__).parent / "load.c"
BINARY = Path(__file__).resolve().parents[2] / "build" / "bench" / "load"
TURN_MS = 100
# The first turn of each target warms caches, conntrack and neighbours.
WARM_UP_TURNS = 2
# The last CPU: interrupts and the rest of the machine prefer the first.
CPU = max(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Target:
    """Where a client connects to, and from which network namespace ("-": its own).

    sources: IPv4 addresses to connect from in turn, from `source` on; 0: the kernel's choice.
    """

    address: str
    port: int
    netns: str = "-"
    source: str = ""
    sources: int = 0

    def __str__(self) -> str:
        where = f"{self.netns},{self.address},{self.port}"
        return f"{where},{self.source},{self.sources}" if self.sources else where


def build() -> Path:
    """Static, so that it runs in any container."""
    if not BINARY.exists() or BINARY.stat().st_mtime < SOURCE.stat().st_mtime:
        BINARY.parent.mkdir(parents=True, exist_ok=True)
        compiler = ["gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror"]
        subprocess.run([*compiler, "-o", BINARY, SOURCE], check=True)
    return BINARY


def server_arguments(ports: Sequence[int], namespaces: Sequence[str] = ("-",)) -> list[str]:
    return ["server", str(CPU), ",".join(map(str, ports)), *namespaces]


def client_arguments(mode: str, seconds: float, targets: Sequence[Target]) -> list[str]:
    return ["client", str(CPU), mode, str(seconds), str(TURN_MS), *map(str, targets)]


def probe_arguments(seconds: float, gap_ms: int, target: Target) -> list[str]:
    """On any CPU: what is measured is not its own speed."""
    return ["probe", "-1", str(seconds), str(gap_ms), str(target)]


def rates(output: str, count: int) -> list[list[float]]:
    """Per target, the rate a second of each turn that all targets had."""
    turns: list[list[float]] = [[] for _ in range(count)]
    for line in output.splitlines():
        target, done, nanoseconds = map(int, line.split())
        turns[target].append(done / nanoseconds * 1e9)
    whole = min(map(len, turns))
    if whole <= WARM_UP_TURNS:
        raise BenchError(f"only {whole} turns in: {output!r}")
    return [values[WARM_UP_TURNS:whole] for values in turns]


@contextmanager
def server(ports: Sequence[int], namespaces: Sequence[str]) -> Iterator[None]:
    """One server process, listening on the ports in each of the namespaces."""
    command = [str(build()), *server_arguments(ports, namespaces)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise BenchError("the load server did not start")
            yield
        finally:
            process.kill()


def measure(mode: str, targets: Sequence[Target], seconds: float) -> list[list[float]]:
    """Rates of each turn, a list a target; raises when any request failed."""
    command = [str(build()), *client_arguments(mode, seconds, targets)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds * 2 + 30
    )
    if done.returncode:
        raise BenchError(f"load client ({mode}): {done.stderr.strip()}")
    return rates(done.stdout, len(targets))
