# SPDX-License-Identifier: Apache-2.0
"""The command against a scripted agent socket and a scripted kubectl."""

from __future__ import annotations

import json
import os
import socketserver
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from weir.cli import render
from weir.cli.main import main

STATUS = {
    "node": "node1",
    "version": "0.1.0",
    "ready": True,
    "why_not": "",
    "operator": "192.0.2.1:9890",
    "operator_connected": True,
    "operator_error": "",
    "endpoints": 2,
    "pod_cidrs": ["10.244.1.0/24"],
    "routing": "vxlan",
    "audit": True,
    "xdp": {"eth0": "native", "wire0": "refused"},
    "pod_mtu": 1450,
    "tables": [{"name": "policy", "rows": 95, "max_entries": 100, "rejected": 0}],
    "rejected": {"policy": ["policy ns/a", "policy ns/b"]},
    "bad_resources": {},
    "errors": {},
    "announced": ["192.0.2.9", "2001:db8::9"],
}
EVENT = {
    "time": 0.5,
    "verdict": "drop",
    "reason": "policy-ingress",
    "direction": "ingress",
    "protocol": "TCP",
    "source": {"address": "10.0.0.1", "port": 40000, "pod": "ns/a"},
    "destination": {"address": "fd00::2", "port": 80, "pod": ""},
    "policies": ["ns/web-only"],
    "near_miss": "ingress rule 0 of ns/web-only matches all but the port",
    "bytes": 74,
}
AUDITED = {
    **EVENT,
    "verdict": "audit",
    "policies": ["ClusterNetworkPolicy guard"],
    "near_miss": "",
    "rule": "ingress rule 3 of ClusterNetworkPolicy guard",
}
ANSWERS: dict[str, list[Any]] = {
    "/v1/status": [STATUS],
    "/v1/endpoints": [
        [
            {
                "pod": "ns/a",
                "addresses": ["10.244.1.2"],
                "device": "weir0",
                "ingress": ["ns/p"],
                "egress": [],
                "audit": True,
            }
        ]
    ],
    "/v1/services": [
        [
            {
                "service": "ns/web",
                "type": "LoadBalancer",
                "kind": "LoadBalancer",
                "port_name": "http",
                "address": "fd00::a",
                "port": 80,
                "protocol": "TCP",
                "scope": "inside",
                "policy": "Cluster",
                "affinity_seconds": 60,
                "source_ranges": ["2001:db8::/32"],
                "backends": [],
                "draining": ["[fd00::1]:80"],
                "maglev": False,
                "taken_by": "",
            }
        ]
    ],
    "/v1/policies": [
        [
            {
                "policy": "ns/p",
                "subject": "pods ns=ns",
                "ingress": True,
                "egress": False,
                "rules": 1,
                "pods": ["ns/a"],
                "tier": "",
                "priority": 0,
            },
            {
                "policy": "ClusterNetworkPolicy guard",
                "subject": "nspods / app=a",
                "ingress": True,
                "egress": True,
                "rules": 2,
                "pods": [],
                "tier": "admin",
                "priority": 5,
            },
        ]
    ],
    "/v1/events": [{}, EVENT, AUDITED, {**EVENT, "source": {**EVENT["source"], "pod": "ns/other"}}],  # type: ignore[dict-item]
}


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        lines = ANSWERS[self.path.partition("?")[0]]
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def address_string(self) -> str:
        return "unix"


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "agent.sock")
    with _Server(path, _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield path
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        pytest.param("status", ["node1", "ready", "10.244.1.0/24", "vxlan/1450"], id="status"),
        pytest.param("endpoints", ["ns/a", "10.244.1.2", "ns/p"], id="endpoints"),
        pytest.param(
            "services",
            ["ns/web", "[fd00::a]:80/TCP", "affinity 60 s", "2001:db8::/32", "refused draining: ["],
            id="services",
        ),
        pytest.param("policies", ["ns/p", "ingress", "pods ns=ns"], id="policies"),
    ],
)
def test_tables(
    agent: str, capsys: pytest.CaptureFixture[str], command: str, expected: list[str]
) -> None:
    assert main([command, "--socket", agent]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({lines[0].find(word) for word in ("NODE",)}) == 1
    for word in expected:
        assert word in lines[1]


def test_status_says_what_is_wrong(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "--socket", agent])
    out = capsys.readouterr().out
    assert "map policy is full, left out: policy ns/a, policy ns/b" in out
    assert "map policy has 95 of 100 rows" in out
    assert "audit mode (policy.audit)" in out
    assert "wire0 does not take XDP as configured" in out
    assert "eth0 does not take" not in out
    assert "announces 192.0.2.9, 2001:db8::9" in out


def test_json(agent: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "-o", "json", "--socket", agent])
    assert json.loads(capsys.readouterr().out) == [{"node": "node1", "data": STATUS}]


def test_monitor_prints_a_line_per_event_of_the_pod(
    agent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", "--socket", agent, "--pod", "ns/a"]) == 0
    line, audited = capsys.readouterr().out.splitlines()
    assert line.partition(" ")[2] == (
        "DROP policy-ingress ns/a -> [fd00::2]:80/TCP ingress by ns/web-only"
        " (ingress rule 0 of ns/web-only matches all but the port)"
    )
    assert audited.partition(" ")[2] == (
        "AUDIT policy-ingress ns/a -> [fd00::2]:80/TCP ingress by ClusterNetworkPolicy guard"
        " (ingress rule 3)"
    )


def test_no_agent_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--socket", str(tmp_path / "none")]) == 1
    err = capsys.readouterr().err
    assert "The agent does not run here" in err
    assert "KUBECONFIG" in err


KUBECTL = """#!/bin/sh
echo "$@" >> "{log}"
case "$*" in
*" get pods "*|"get pods "*) cat "{pods}";;
*node-b*) echo "container not found" >&2; exit 1;;
*) echo '[{{"node": "x", "data": {status}}}]';;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    pods = [
        {
            "spec": {"nodeName": node},
            "metadata": {"name": f"weir-agent-{node}"},
            "status": {"phase": phase},
        }
        for node, phase in (("node-a", "Running"), ("node-b", "Running"), ("node-c", "Pending"))
    ]
    (tmp_path / "pods").write_text(json.dumps({"items": pods}))
    log = tmp_path / "log"
    script = folder / "kubectl"
    script.write_text(KUBECTL.format(log=log, pods=tmp_path / "pods", status=json.dumps(STATUS)))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return log


def test_every_node_is_asked_and_a_broken_one_is_named(
    kubectl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--context", "lab", "-n", "net"]) == 1
    out = capsys.readouterr().out
    assert "node-a" in out
    assert "node-b: container not found" in out
    assert "node-c" not in out
    calls = kubectl.read_text().splitlines()
    assert calls[0].startswith("--context=lab get pods -n net -l app.kubernetes.io/name=weir-agent")
    assert "--context=lab exec -n net weir-agent-node-a -c agent -- weir status -o json" in calls


def test_a_node_without_agent_is_an_error(
    kubectl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--node", "node-c"]) == 1
    assert "Nodes with one: node-a, node-b" in capsys.readouterr().err


def test_it_starts_quickly_because_it_imports_little() -> None:
    code = "import sys, weir.cli.main; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"grpc", "kubernetes", "aiohttp", "kopf", "yaml", "google.protobuf", "weir.agent"}
    assert not heavy & set(done.stdout.split())


def test_a_table_is_aligned() -> None:
    text = render.table(["A", "B"], [["long", "x"], ["s", "y"]])
    assert text == "A     B\nlong  x\ns     y"
