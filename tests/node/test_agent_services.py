# SPDX-License-Identifier: Apache-2.0
"""What the agent does for Services beside their traffic: rows over restarts, health checks."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
from pathlib import Path

from support.agents import AgentNode, node_resource, service_resources
from support.namespaces import NetNs
from support.operators import ScriptedOperator
from support.traffic import eventually

from weir.api.address import parse
from weir.api.v1 import weir_pb2 as pb
from weir.cni.netns import netns_cookie
from weir.datapath import libbpf

HEALTH_PORT, PROXY_PORT, MODE_PORT, NODE_PORT = 32100, 10256, 10249, 30080
ADDRESSES = ("192.0.2.1", "2001:db8::1")
SIZES = {"netns_addresses": (8, 32), "services": (20, 20), "maglev": (8, 512), "runtime": (4, 16)}


def rows(agent: AgentNode, table: str) -> dict[bytes, bytes]:
    """A map's raw content."""
    pins = Path(agent.config["paths"]["pins"])  # type: ignore[index]
    fd = libbpf.get_pinned(pins / "maps" / table)
    assert fd is not None, table
    key_size, value_size = SIZES[table]
    found: dict[bytes, bytes] = {}
    try:
        for keys, values in libbpf.walk(fd, key_size, value_size, 64):
            for number in range(len(keys) // key_size):
                key = keys[number * key_size : (number + 1) * key_size]
                found[key] = values[number * value_size : (number + 1) * value_size]
    finally:
        os.close(fd)
    return found


def balancer(backends: dict[str, int], *, node: str = "node1") -> list[pb.Resource]:
    made = service_resources("web", ["10.96.0.10", "fd00:96::10"], 80, backends)
    service = made[0].service
    service.ports[0].node_port = NODE_PORT
    service.external_local = True
    service.health_check_node_port = HEALTH_PORT
    service.load_balancer_ips.append(parse("198.51.100.7"))
    for item in made[1:]:
        for endpoint in item.slice.endpoints:
            endpoint.node = node
    return made


def get(source: NetNs, address: str, port: int, path: str = "/") -> tuple[int, dict[str, str], str]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with source.entered():
        client = socket.socket(family, socket.SOCK_STREAM)
    client.settimeout(5)
    connection = http.client.HTTPConnection(address, port)
    connection.sock = client
    with client:
        client.connect((address, port))
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_a_pods_sockets_are_known_by_its_namespace_also_after_a_restart(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.config["loadBalancer"] = {"algorithm": "maglev", "maglevTableSize": 251}
    agent.start()
    addresses = {name: agent.add(pods[name], name) for name in "ab"}
    backends = {addr: 8080 for name in "ab" for addr in addresses[name]}
    operator.wait_acknowledged(operator.set(*balancer(backends)))
    with pods["a"].entered():
        cookie = netns_cookie().to_bytes(8, sys.byteorder)
    ipv4, ipv6 = map(parse, addresses["a"])
    assert rows(agent, "netns_addresses")[cookie] == ipv4 + ipv6
    before = {table: rows(agent, table) for table in SIZES}
    assert len(before["services"]) == 2 + 2 * (1 + 2)  # cluster IPs; load balancer, node ports
    assert len(before["maglev"]) == 2  # one block a family, of those on this node
    agent.stop()
    agent.start()
    for table in ("netns_addresses", "services", "maglev"):
        assert rows(agent, table) == before[table], table
    assert "Traceback" not in agent.log
    agent.cni("DEL", pods["a"], "a")
    assert cookie not in rows(agent, "netns_addresses")


def test_health_checks_answer_as_kube_proxy_does(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    agent.config["proxyHealthPort"] = PROXY_PORT
    agent.start()
    first, second = agent.add(pods["a"], "a")
    operator.wait_acknowledged(operator.set(*balancer({first: 8080, second: 8080})))

    def listens() -> bool:
        try:
            return bool(get(agent.outside, ADDRESSES[1], HEALTH_PORT))
        except OSError:
            return False

    assert eventually(listens), agent.log
    for address in (*ADDRESSES, "127.0.0.1"):
        source = agent.node if address == "127.0.0.1" else agent.outside
        status, headers, body = get(source, address, HEALTH_PORT)
        assert status == 200, body
        assert headers["Content-Type"] == "application/json"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["X-Load-Balancing-Endpoint-Weight"] == "1"
        assert body == (
            '{\n\t"service": {\n\t\t"namespace": "ns",\n\t\t"name": "web"\n\t},\n'
            '\t"localEndpoints": 1,\n\t"serviceProxyHealthy": true\n}'
        )
        status, headers, body = get(source, address, PROXY_PORT, "/healthz")
        assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
        assert json.loads(body)["nodeEligible"] is True
        assert get(source, address, PROXY_PORT, "/other")[0] == 404
    assert get(agent.node, "127.0.0.1", MODE_PORT, "/proxyMode")[::2] == (200, "ebpf")
    assert get(agent.node, "127.0.0.1", MODE_PORT, "/healthz")[0] == 404
    elsewhere = balancer({first: 8080, second: 8080}, node="node2")
    operator.wait_acknowledged(operator.set(*elsewhere))
    status, headers, body = get(agent.outside, ADDRESSES[0], HEALTH_PORT)
    assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "0")
    assert json.loads(body)["localEndpoints"] == 0
    leaving = node_resource("node1", list(ADDRESSES), ["10.244.1.0/24", "fd00:244:1::/64"])
    leaving.node.leaving = True
    operator.wait_acknowledged(operator.set(leaving))
    status, _, body = get(agent.outside, ADDRESSES[0], PROXY_PORT, "/healthz")
    assert (status, json.loads(body)["nodeEligible"]) == (503, False)
    assert get(agent.outside, ADDRESSES[0], PROXY_PORT, "/livez")[0] == 200
    gone = ("service/ns/web", *(item.name for item in elsewhere[1:]))
    operator.wait_acknowledged(operator.set(gone=gone))
    assert eventually(lambda: not listens())


def test_a_health_check_whose_port_is_taken_is_told_and_the_rest_goes_on(
    agent: AgentNode, operator: ScriptedOperator, pods: dict[str, NetNs]
) -> None:
    with agent.node.entered():
        taken = socket.create_server(("0.0.0.0", HEALTH_PORT))
    agent.start()
    first, second = agent.add(pods["a"], "a")
    operator.wait_acknowledged(operator.set(*balancer({first: 8080, second: 8080})))
    what = f"health check of service ns/web: port {HEALTH_PORT} at 0.0.0.0"
    assert eventually(lambda: what in agent.log), agent.log
    assert get(agent.outside, ADDRESSES[1], HEALTH_PORT)[0] == 200
    taken.close()
    assert agent.ask("status")["ready"]


def test_native_routing_leaves_no_overlay(agent: AgentNode) -> None:
    agent.start()
    assert "weir_vxlan" in agent.node.run("ip", "link")
    agent.stop()
    agent.config["routing"] = "native"
    agent.start()
    assert eventually(lambda: "weir_vxlan" not in agent.node.run("ip", "link")), agent.log
    assert agent.ask("status")["routing"] == "native"
