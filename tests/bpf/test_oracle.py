# SPDX-License-Identifier: Apache-2.0
"""Random clusters, from the API's JSON to packets, against an independent model of the specs."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from support.datapaths import clear, place
from support.oracle_checks import Checker, Difference, Moments
from support.oracle_node import Devices, TestedNode
from support.oracle_scripts import NODES, Script, beginning, shortest, some_action, some_script

from weir.api.address import parse
from weir.datapath.datapath import Datapath
from weir.datapath.settings import Settings, Sizes

STEPS = 6
SHORTEN_SECONDS = 20
SIZES = Sizes(
    services=1024, backends=4096, endpoints=256, addresses=4096, prefixes=4096, routes=256,
    policy=65536, ct=131072, snat=64, sock_nat=64, events=1 << 20,
)  # fmt: skip
HERE4, HERE6 = (parse(ip) for ip in NODES["n1"][0])


class Bench:
    """A loaded datapath and devices, and how to run a script on them."""

    def __init__(self, datapath: Datapath, devices: Devices) -> None:
        self.datapath = datapath
        self.devices = devices
        self.counts: Counter[str] = Counter()

    def run(self, seed: int, script: Script) -> None:
        """Raises Difference."""
        clear(self.datapath)
        with tempfile.TemporaryDirectory() as folder, self.devices.ns.entered():
            asyncio.run(self._run(seed, script, Path(folder)))

    async def _run(self, seed: int, script: Script, folder: Path) -> None:
        rng = Random(seed)
        node = TestedNode(self.datapath, self.devices, folder)
        checker = Checker(node, rng)
        try:
            await node.do(beginning(Random(seed)))
            for actions in script:
                await node.do(actions)
                checker.check(2)
        finally:
            node.close()
            self.counts += checker.counts

    def run_row_by_row(self, seed: int, script: Script) -> None:
        """One action a round, watched; the script's first step is not. Raises Difference."""
        clear(self.datapath)
        with tempfile.TemporaryDirectory() as folder, self.devices.ns.entered():
            asyncio.run(self._watch(seed, script, Path(folder)))

    async def _watch(self, seed: int, script: Script, folder: Path) -> None:
        moments = Moments(Random(seed))
        node = TestedNode(self.datapath, self.devices, folder, moments.wrote)
        moments.node = node
        try:
            await node.do([*beginning(Random(seed)), *script[0]])
            for action in (action for step in script[1:] for action in step):
                await moments.during(action)
        finally:
            node.close()
            self.counts += moments.counts


def must_agree(run: Callable[[int, Script], None], seed: int, script: Script) -> None:
    """A script that fails is cut down, then shown."""
    try:
        run(seed, script)
    except Difference as difference:
        short = shortest(script, lambda tried: _fails(run, seed, tried), SHORTEN_SECONDS)
        lines = "\n".join(f"{number}: {a}" for number, step in enumerate(short) for a in step)
        try:
            run(seed, short)
        except Difference as again:
            raise AssertionError(f"{again}\n{lines}") from difference
        raise


def _fails(run: Callable[[int, Script], None], seed: int, script: Script) -> bool:
    try:
        run(seed, script)
    except Difference:
        return True
    return False


@pytest.fixture(scope="module")
def bench(private_mounts: None) -> Iterator[Bench]:
    with ExitStack() as stack:
        root, cgroup = stack.enter_context(place())
        constants = Settings(node_ipv4=HERE4, node_ipv6=HERE6)
        datapath = Datapath.open(root, cgroup, constants, SIZES)
        stack.callback(datapath.close)
        stack.callback(Datapath.remove, root)
        devices = Devices()
        stack.callback(devices.ns.close)
        yield Bench(datapath, devices)


@settings(
    max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(seed=st.integers(0, 2**32))
def test_node_and_model_agree(bench: Bench, seed: int) -> None:
    """First packets, open flows in both directions, and Services, after each step."""
    must_agree(bench.run, seed, some_script(Random(seed), STEPS))


def policy_changes(rng: Random, count: int) -> Script:
    """A cluster, then policies that come, go and change, and pods and namespaces relabelled."""
    script: Script = [some_script(rng, 0)[0]]
    while len(script) <= count:
        action = some_action(rng)
        if "NetworkPolicy" in action[1] or action[0] == "relabel":
            script.append([action])
    return script


@settings(
    max_examples=12, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(seed=st.integers(0, 2**32))
def test_no_wrong_moment(bench: Bench, seed: int) -> None:
    """Row by row: what a change does not concern never sees it, whatever is written already."""
    must_agree(bench.run_row_by_row, seed, policy_changes(Random(seed), 8))
