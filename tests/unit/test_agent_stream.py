# SPDX-License-Identifier: Apache-2.0
"""The stream against a scripted operator over real TLS, and the configuration."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import pytest
from support.agents import selector_resource
from support.operators import ScriptedOperator
from support.worlds import endpoint

from weir.agent.config import parse_config
from weir.agent.errors import ConfigError
from weir.agent.frontends import NodePortRule
from weir.agent.servers import Known
from weir.agent.store import Position
from weir.agent.stream import Assembler, OperatorStream
from weir.api.address import parse_cidr
from weir.api.v1 import weir_pb2 as pb
from weir.cni.endpoint import LocalEndpoint

ENVIRONMENT = {"NODE_NAME": "node1", "POD_NAMESPACE": "weir"}


class Recorder:
    """A Sink that remembers."""

    def __init__(self) -> None:
        self.position = Position()
        self.snapshots: list[int] = []
        self.changes: list[tuple[int, list[str]]] = []

    async def change(self, resources: list[bytes], removed: list[str], position: Position) -> None:
        self.position = position
        self.changes.append((len(resources), removed))

    async def snapshot(self, resources: list[bytes], position: Position) -> None:
        self.position = position
        self.snapshots.append(len(resources))

    def endpoints(self) -> Iterable[LocalEndpoint]:
        return [endpoint(1)]


async def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  polls threads of the operator
            await asyncio.sleep(0.01)


@pytest.fixture
async def operators() -> AsyncIterator[list[ScriptedOperator]]:
    made = [ScriptedOperator("one"), ScriptedOperator("two")]
    made[1].key, made[1].ca = made[0].key, made[0].ca
    for item in made:
        item.set(selector_resource(1, "a"))
        await asyncio.to_thread(item.start)
    yield made
    for item in made:
        await asyncio.to_thread(item.stop)


async def test_it_says_hello_takes_the_snapshot_and_moves_to_another_operator(
    operators: list[ScriptedOperator], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    targets = tuple(f"127.0.0.1:{item.port}" for item in operators)

    async def find() -> Known:
        return Known(targets, (), operators[0].ca.decode())

    sink = Recorder()
    stream = OperatorStream("node1", "1", find, token, sink)
    task = asyncio.create_task(stream.run())
    try:
        await until(lambda: sink.snapshots)
        first = next(item for item in operators if item.hellos)
        other = next(item for item in operators if item is not first)
        assert first.tokens == ["Bearer secret"]
        assert (first.hellos[0].node, first.hellos[0].instance) == ("node1", "")
        await until(lambda: first.announcements)
        assert first.announcements[0].complete
        assert [e.uid for e in first.announcements[0].added] == ["u1"]
        first.set(gone=("selector/1",))
        await until(lambda: sink.changes == [(0, ["selector/1"])])
        stream.acknowledge(first.revision, ready=True)
        await until(lambda: first.ready and first.acknowledged == first.revision)
        stream.tell_troubles({("", "guard"): "no room"})
        stream.tell_troubles({("", "guard"): "no room"})
        await until(lambda: first.troubles)
        assert [(t.namespace, t.name, t.message) for t in first.troubles[0].policies] == [
            ("", "guard", "no room")
        ]
        await asyncio.to_thread(first.stop)
        await until(lambda: other.hellos)
        assert other.hellos[0].instance == first.instance
        await until(lambda: len(sink.snapshots) == 2)
        assert sink.position.instance == other.instance
        await until(lambda: other.acknowledged)
        await until(lambda: other.troubles)
        assert other.troubles == first.troubles  # once each
        stream.tell_troubles({})
        await until(lambda: other.troubles[-1] == pb.Trouble())
    finally:
        task.cancel()
        await asyncio.wait([task])


def test_updates_are_put_together_to_whole_changes() -> None:
    assembler = Assembler()
    assert not assembler.add(pb.Update(resources=[b"a"], more=True))
    assert assembler.add(pb.Update(resources=[b"b"], removed=["c"]))
    assert assembler.take() == ([b"a", b"b"], ["c"], False)
    assert not assembler.add(pb.Update(resources=[b"a"], snapshot_begins=True))
    assert not assembler.add(pb.Update(resources=[b"b"]))
    assert assembler.add(pb.Update(snapshot_ends=True))
    assert assembler.take() == ([b"a", b"b"], [], True)


def test_a_snapshot_that_begins_anew_forgets_the_first() -> None:
    assembler = Assembler()
    assembler.add(pb.Update(resources=[b"a"], snapshot_begins=True))
    assembler.add(pb.Update(resources=[b"b"], snapshot_begins=True, snapshot_ends=True))
    assert assembler.take() == ([b"b"], [], True)


def test_all_bad_settings_are_reported_together() -> None:
    values = {
        "routing": "vlan",
        "mtu": 100,
        "masquerade": "yes",
        "masqueradeExcludeCIDRs": ["10.0.0.0/33"],
        "apiServer": "10.0.0.1:6443",
        "maps": {"policy": -1, "plicy": 5},
        "policy": {"audit": "on", "adit": True},
        "nodePortAddresses": ["primary", "10.0.0.0/8"],
        "loadBalancer": {"algorithm": "best", "maglevTableSize": 4096, "mode": "nat"},
        "metricsAddress": "everywhere",
        "typo": 1,
    }
    with pytest.raises(ConfigError) as caught:
        parse_config("test", values, {})
    found = " ".join(caught.value.problems)
    for word in (
        "routing",
        "mtu",
        "masquerade",
        "10.0.0.0/33",
        "apiServer",
        "maps.policy",
        "maps.plicy",
        "policy.audit",
        "policy.adit",
        "primary stands alone",
        "loadBalancer.algorithm",
        "4096 is not a prime",
        "loadBalancer.mode",
        "everywhere",
        "typo",
        "NODE_NAME",
    ):
        assert word in found, word


def test_the_charts_values_are_understood() -> None:
    config = parse_config(
        "test",
        {
            "routing": "native",
            "mtu": 0,
            "uplinks": ["eth0"],
            "policy": {"audit": True},
            "maps": {"conntrack": 1000, "maglev": 2000},
            "nodePortAddresses": ["10.0.0.0/8"],
            "loadBalancer": {"algorithm": "maglev", "maglevTableSize": 251, "mode": "dsr"},
        },
        ENVIRONMENT,
    )
    assert not config.tunnel
    assert config.uplinks == ("eth0",)
    assert config.policy_audit
    assert config.sizes.ct == 1000
    assert config.sizes.policy is None
    assert config.sizes.maglev == 2000
    assert config.node_ports == NodePortRule((parse_cidr("10.0.0.0/8"),))
    assert (config.maglev_table_size, config.dsr) == (251, True)


def test_without_settings_for_services_there_are_no_tables() -> None:
    config = parse_config("test", {"loadBalancer": {"maglevTableSize": 251}}, ENVIRONMENT)
    assert (config.maglev_table_size, config.dsr) == (0, False)
    assert config.node_ports == NodePortRule()
    primary = parse_config("test", {"nodePortAddresses": ["primary"]}, ENVIRONMENT)
    assert primary.node_ports == NodePortRule(primary=True)


class Cutter:
    """A way to an operator that can be cut like a cable."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._ends: set[asyncio.StreamWriter] = set()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()

    async def close(self) -> None:
        self._server.close()
        self.cut()
        await self._server.wait_closed()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._ends |= {writer, back}
        await asyncio.gather(self._pump(reader, back), self._pump(there, writer))

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()


async def test_nothing_is_left_behind_of_a_stream_that_broke(
    operators: list[ScriptedOperator], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio used to complain of a destroyed task and of a generator that could not be closed."""
    token = tmp_path / "token"
    token.write_text("secret")
    cable = Cutter(operators[0].port)
    target = f"127.0.0.1:{await cable.start()}"

    async def find() -> Known:
        return Known((target,), (), operators[0].ca.decode())

    sink = Recorder()
    task = asyncio.create_task(OperatorStream("node1", "1", find, token, sink).run())
    try:
        for number in range(3):
            await until(lambda number=number: len(operators[0].hellos) > number)  # type: ignore[misc]
            cable.cut()
            await asyncio.sleep(0)
            gc.collect()
    finally:
        task.cancel()
        await asyncio.wait([task])
        await cable.close()
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
