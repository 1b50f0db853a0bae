# SPDX-License-Identifier: Apache-2.0
"""The agent as a whole: real process, real datapath, real shim, real traffic.

pod a ── veth ─┐
pod b ── veth ─┤ node namespace: agent ── eth0 ── outside
               └ scripted operator on 127.0.0.1
"""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from typing import Any

import pytest
from support.agents import (
    AgentNode,
    UnixConnection,
    service_resources,
)
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.traffic import Echo, connects, deny_all, eventually

from weir.api.v1 import weir_pb2 as pb
from weir.cli.main import main


def test_pods_are_wired_and_policy_decides(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "abc"}
    echo = Echo(pods["b"], 80)
    try:
        for address in addresses["b"]:
            assert connects(pods["a"], address, 80, 5), (address, agent.log)
            assert connects(pods["c"], address, 80, 5), (address, agent.log)
        operator.wait_acknowledged(operator.set(deny_all("only-a", 2, 1)))
        for address in addresses["b"]:
            assert connects(pods["a"], address, 80, 5), agent.log
            assert not connects(pods["c"], address, 80), agent.log
            assert connects(agent.node, address, 80, 5), "the node reaches its own pods"
        operator.wait_acknowledged(operator.set(gone=("policy/ns/only-a",)))
        for address in addresses["b"]:
            assert connects(pods["c"], address, 80, 5), agent.log
    finally:
        echo.close()
    status = agent.ask("status")
    assert status["endpoints"] == 3
    assert status["operator_connected"]
    assert status["pod_mtu"] == 1450
    assert {view["pod"] for view in agent.ask("endpoints")} == {"ns/a", "ns/b", "ns/c"}
    named = {e.name for a in operator.announcements for e in a.added}
    assert named == {"a", "b", "c"}
    assert operator.tokens[0] == "Bearer secret"
    assert (agent.folder / "conf" / "05-weir.conflist").exists()
    for name in "abc":
        agent.cni("DEL", pods[name], name)
    assert agent.ask("status")["endpoints"] == 0


def test_a_service_reaches_its_backends(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ab"}
    vips = ["10.96.0.10", "fd00:96::10"]
    backends = dict.fromkeys(addresses["b"], 8080)
    operator.wait_acknowledged(operator.set(*service_resources("web", vips, 80, backends)))
    echo = Echo(pods["b"], 8080)
    try:
        for vip in vips:
            assert connects(pods["a"], vip, 80, 5), (vip, agent.log)
    finally:
        echo.close()
    (first, *_) = agent.ask("services")
    assert first["service"] == "ns/web"


def test_the_monitor_names_policy_and_near_miss(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ab"}
    policy = deny_all("web-only", 2, 1)
    policy.policy.rules[0].ports.append(pb.PortRange(protocol=6, first=443, last=443))
    operator.wait_acknowledged(operator.set(policy))
    connection = UnixConnection(agent.folder / "run" / "agent.sock")
    connection.request("GET", "/v1/events")
    response = connection.getresponse()
    assert response.readline() == b"{}\n"
    assert not connects(pods["a"], addresses["b"][0], 80)
    event = {}
    while not event:
        event = json.loads(response.readline())
    connection.close()
    assert event["verdict"] == "drop"
    assert event["reason"] == "policy-ingress"
    assert event["source"]["pod"] == "ns/a"
    assert event["destination"] == {"address": addresses["b"][0], "port": 80, "pod": "ns/b"}
    assert event["policies"] == ["ns/web-only"]
    assert event["near_miss"] == "ingress rule 0 of ns/web-only matches all but the port"


def test_the_command_tells_what_the_packets_do(
    agent: AgentNode,
    operator: ScriptedOperator,
    pods: dict[str, NetNs],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`weir policy` on the node: why, before and after the policy, and what was denied."""

    def weir(*words: str) -> Any:
        socket_path = agent.folder / "run" / "agent.sock"
        code = main(["policy", *words, "-o", "json", f"--socket={socket_path}"])
        return code, json.loads(capsys.readouterr().out)

    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ab"}
    code, told = weir("why", "ns/a", "ns/b", "80/tcp")
    assert (code, told["allowed"], told["missing"]) == (0, True, []), told
    assert len(told["directions"]) == 4, "egress and ingress, IPv4 and IPv6"
    policy = deny_all("web-only", 2, 1)
    policy.policy.rules[0].ports.append(pb.PortRange(protocol=6, first=443, last=443))
    operator.wait_acknowledged(operator.set(policy))
    for address in addresses["b"]:
        assert not connects(pods["a"], address, 80)
    code, told = weir("why", "ns/a", "ns/b", "80/tcp")
    assert (code, told["allowed"]) == (0, False), told
    denied = [one for one in told["directions"] if not one["maps"]["allowed"]]
    assert {(one["direction"], one["destination"]) for one in denied} == {
        ("ingress", address) for address in addresses["b"]
    }
    for one in denied:
        assert one["agree"]
        assert one["model"]["near_misses"][0]["wants"] == "TCP port 443"
    assert weir("why", "ns/a", addresses["b"][0], "443/tcp")[1]["allowed"] is True
    _, [answer] = weir("denials")
    assert {row["destination"]["address"] for row in answer["data"]} == set(addresses["b"])
    for row in answer["data"]:
        assert (row["source"]["pod"], row["destination"]["port"]) == ("ns/a", 80)
        assert (row["policies"], row["packets"] > 0) == (["ns/web-only"], True)
        assert abs(row["last_seen"] - time.time()) < 60
    code, told = weir("why", "ns/a", "10.244.9.9", "80/tcp")
    assert (code, told["allowed"], told["directions"][0]["direction"]) == (0, True, "egress"), told


class Pinger:
    """A UDP packet every 5 ms and one TCP connection that talks all the time."""

    def __init__(self, source: NetNs, address: str, port: int) -> None:
        with source.entered():
            self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.tcp = socket.create_connection((address, port), timeout=5)
        self.udp.connect((address, port))
        self.udp.settimeout(2)
        self.sent = self.lost = self.turns = 0
        self.slowest = 0.0
        self.failed: list[str] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._udp, self._tcp)]
        for thread in self._threads:
            thread.start()

    def _udp(self) -> None:
        while not self._stopped.is_set():
            self.sent += 1
            try:
                self.udp.send(b"x")
                self.udp.recv(16)
            except OSError:
                self.lost += 1
            time.sleep(0.005)

    def _tcp(self) -> None:
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                self.tcp.sendall(b"y")
                assert self.tcp.recv(16)
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))
                return
            self.turns += 1
            self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.005)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self.udp.close()
        self.tcp.close()


@pytest.mark.parametrize("operator_away", [False, True], ids=["operator-there", "operator-away"])
def test_killing_the_agent_loses_nothing(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs], operator_away: bool
) -> None:
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "abc"}
    vips = ["10.96.0.10"]
    backends = {addresses["b"][0]: 80}
    operator.set(*service_resources("web", vips, 80, backends))
    operator.wait_acknowledged(operator.set(deny_all("only-a", 2, 1)))
    echo = Echo(pods["b"], 80)
    pingers = [Pinger(pods["a"], target, 80) for target in (addresses["b"][0],)]
    try:
        time.sleep(1.5)  # what the operator said must be on disk: the writer's gap is 1 s
        if operator_away:
            operator.stop()
        agent.stop(signal.SIGKILL)
        assert not connects(pods["c"], addresses["b"][0], 80)
        time.sleep(0.5)
        agent.start()
        assert connects(pods["a"], addresses["b"][0], 80, 5), agent.log
        assert connects(pods["a"], vips[0], 80, 5), agent.log
        assert not connects(pods["c"], addresses["b"][0], 80)
        time.sleep(0.5)
    finally:
        for pinger in pingers:
            pinger.stop()
        echo.close()
    for pinger in pingers:
        assert pinger.sent > 100
        assert not pinger.lost, agent.log
        assert not pinger.failed, agent.log
        assert pinger.slowest < 1
    assert agent.ask("status")["tables"]
    assert agent.ask("status")["rejected"] == {}


def mtu_of(net: NetNs, device: str) -> int:
    return int(json.loads(net.run("ip", "-j", "link", "show", device))[0]["mtu"])


def test_every_device_follows_the_uplinks_mtu(agent: AgentNode, pods: dict[str, NetNs]) -> None:
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ab"}
    ends = {view["pod"]: view["device"] for view in agent.ask("endpoints")}

    def follows(mtu: int) -> bool:
        return eventually(
            lambda: (
                {
                    mtu_of(agent.node, "weir_vxlan"),
                    *(mtu_of(agent.node, device) for device in ends.values()),
                    *(mtu_of(pods[name], "eth0") for name in "ab"),
                }
                == {mtu}
            )
        )

    assert follows(1450), agent.log
    agent.node.run("ip", "link", "set", "eth0", "mtu", "1400")
    assert follows(1350), agent.log
    agent.add(pods["c"], "c")
    assert mtu_of(pods["c"], "eth0") == 1350
    agent.stop()
    # What changes while no agent is there, it finds at its start; and not only a change.
    agent.node.run("ip", "link", "set", "eth0", "mtu", "1500")
    agent.node.run("ip", "link", "set", ends["ns/a"], "mtu", "1300")
    agent.start()
    assert follows(1450), agent.log
    echo = Echo(pods["b"], 80)
    try:
        for address in addresses["b"]:
            assert connects(pods["a"], address, 80, 5), agent.log
    finally:
        echo.close()


def test_cni_files_come_back(agent: AgentNode) -> None:
    agent.config["cniConfName"] = "02-mine.conflist"
    agent.config["resyncSeconds"] = 1
    agent.start()
    wanted = [agent.folder / "conf" / "02-mine.conflist", agent.folder / "bin" / "weir"]
    assert eventually(lambda: all(path.exists() for path in wanted)), agent.log
    before = [path.read_bytes() for path in wanted]
    assert [path.name for path in (agent.folder / "conf").iterdir()] == ["02-mine.conflist"]
    for path in wanted:
        path.unlink()
    assert eventually(lambda: all(path.exists() for path in wanted)), agent.log
    assert [path.read_bytes() for path in wanted] == before


@pytest.mark.parametrize("module", ["weir.agent", "weir.agent.uninstall"])
def test_uninstallation_leaves_nothing(
    agent: AgentNode, pods: dict[str, NetNs], module: str
) -> None:
    agent.start()
    (address, *_) = agent.add(pods["a"], "a")
    assert (agent.folder / "conf" / "05-weir.conflist").exists()
    agent.stop()
    done = agent.folder / "done"
    action = ["cleanup"] if module == "weir.agent" else ["--done", str(done)]
    process = agent.run_module(module, *action)
    if module == "weir.agent":
        assert process.wait(20) == 0, agent.log
    else:
        assert eventually(done.exists), agent.log
        assert process.poll() is None
        process.terminate()
        assert process.wait(5) == 0
    assert not agent.pins.exists()
    for name in ("conf", "bin", "run", "state"):
        assert not list((agent.folder / name).iterdir()), name
    assert "weir_vxlan" not in agent.node.run("ip", "link")
    assert not agent.node.run("ip", "route", "show", "proto", "87")
    assert not agent.node.run("ip", "-6", "route", "show", "proto", "87")
    # The pod is as it was, and now nothing judges it.
    echo = Echo(pods["a"], 80)
    try:
        assert connects(agent.node, address, 80, 5)
    finally:
        echo.close()
    agent.start()
    agent.add(pods["b"], "b")


def test_the_node_is_kept_right(agent: AgentNode, operator: ScriptedOperator) -> None:
    agent.start()
    routes = agent.node.run("ip", "route", "show", "proto", "87")
    assert "10.244.2.0/24 dev weir_vxlan" in routes
    assert "src 192.0.2.1" in routes
    agent.node.run("ip", "route", "del", "10.244.2.0/24")
    agent.node.run("ip", "link", "set", "eth0", "mtu", "1400")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        routes = agent.node.run("ip", "route", "show", "proto", "87")
        device = agent.node.run("ip", "link", "show", "weir_vxlan")
        if "10.244.2.0/24" in routes and "mtu 1350" in device:
            break
        time.sleep(0.1)
    assert "10.244.2.0/24" in routes, agent.log
    assert "mtu 1350" in device, agent.log
    operator.wait_acknowledged(operator.set(gone=("node/node2",)))
    deadline = time.monotonic() + 10
    while "10.244.2.0" in agent.node.run("ip", "route") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "10.244.2.0" not in agent.node.run("ip", "route"), agent.log
