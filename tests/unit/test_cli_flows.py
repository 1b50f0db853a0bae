# SPDX-License-Identifier: Apache-2.0
"""`weir ct` against a scripted agent and a scripted kubectl; and how the agent reads filters."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from weir.agent.conntrack import BadFilter, Filter, Flow, parse_filter, state, translation
from weir.api.address import parse
from weir.cli.main import main
from weir.cli.render import Stream
from weir.datapath.records import CtFlag

FLOW = {
    "protocol": "UDP",
    "source": {"address": "10.244.1.2", "port": 4000, "pod": "ns/a"},
    "destination": {"address": "fd00:96::10", "port": 53, "pod": ""},
    "direction": "egress",
    "state": "replied",
    "translation": "to backend",
    "translated": "[fd00:244:1::3]:5300",
    "service": "ns/dns",
    "generation": 7,
    "judged": True,
    "seconds_left": 42,
}
PLAIN = {**FLOW, "translation": "", "translated": "", "service": "", "judged": False}


@dataclass
class Script:
    """What the agent answers to /v1/ct, and what it was asked."""

    lines: list[Any] = field(default_factory=lambda: [FLOW, PLAIN, {}])
    status: int = 200
    cut: int = 0  # bytes that are missing at the end
    asked: list[str] = field(default_factory=list)
    path: str = ""


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Script]:
    script = Script(path=str(tmp_path / "agent.sock"))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/status":
                self._answer(200, [{"node": "node1"}])
                return
            script.asked.append(f"{self.command} {self.path}")
            self._answer(script.status, script.lines, script.cut)

        def do_POST(self) -> None:
            script.asked.append(f"{self.command} {self.path}")
            self._answer(script.status, [{"flows": 3}])

        def _answer(self, status: int, lines: list[Any], cut: int = 0) -> None:
            body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - cut])

        def log_message(self, *_: object) -> None:
            """Quiet."""

        def address_string(self) -> str:
            return "unix"

    class Server(socketserver.ThreadingUnixStreamServer):
        daemon_threads = True

    with Server(script.path, Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield script
        server.shutdown()
        thread.join()


def run(agent: Script, *words: str) -> int:
    return main(["ct", *words, "--socket", agent.path])


def test_a_list_for_people(agent: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(agent, "list", "--pod", "ns/a", "--port", "53") == 0
    assert agent.asked == ["GET /v1/ct?pod=ns%2Fa&port=53"]
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.startswith("NODE   PROTO  SOURCE")
    assert first == (
        "node1  UDP    ns/a:4000  [fd00:96::10]:53  egress     replied"
        "  to backend [fd00:244:1::3]:5300  ns/dns   7       42 s"
    )
    assert second.endswith("replied  -                                -        -       42 s")


def test_a_list_for_programs(agent: Script, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(agent, "list", "-o", "json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"node": "node1", **FLOW}, {"node": "node1", **PLAIN}]


@pytest.mark.parametrize("cut", [0, 20], ids=["between lines", "within a line"])
def test_a_list_that_breaks_off_is_an_error(
    agent: Script, capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    agent.lines, agent.cut = [FLOW], cut
    assert run(agent, "list") == 1
    assert "node1: the agent broke off" in capsys.readouterr().err


def test_what_the_agent_refuses_is_told(agent: Script, capsys: pytest.CaptureFixture[str]) -> None:
    agent.status, agent.lines = 400, ["port 'x' is not a number up to 65535"]
    assert run(agent, "list", "--port", "x") == 1
    assert "port 'x' is not a number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("--service", "ns/dns"), "POST /v1/ct/flush?service=ns%2Fdns"),
        (("--all",), "POST /v1/ct/flush?all=1"),
        (("--protocol", "udp", "--dry-run"), "GET /v1/ct?protocol=udp"),
    ],
    ids=["filter", "all", "dry run"],
)
def test_flush(
    agent: Script, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], asked: str
) -> None:
    assert run(agent, "flush", *words) == 0
    assert agent.asked == [asked]
    told = "2 flows would be forgotten" if "--dry-run" in words else "node1  3"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("words", [("flush",), ("list", "--pod", "a"), ("flush", "--dry-run")])
def test_what_needs_more_words_asks_nobody(
    agent: Script, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert run(agent, *words) == 1
    assert agent.asked == []
    err = capsys.readouterr().err
    assert "--all" in err or "namespace/name" in err


KUBECTL = """#!/bin/sh
case "$*" in
*" get pods "*) cat "{pods}";;
*agent-b*) echo '{flow}'; echo "weir: /run/weir/agent.sock: gone" >&2; exit 1;;
*"ct list --port 53 -o json") echo '{flow}'; echo '{flow}';;
*"ct flush --all -o json") echo '[{{"node": "x", "data": {{"flows": 5}}}}]';;
esac
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pods = [
        {
            "spec": {"nodeName": f"node-{name}"},
            "metadata": {"name": f"agent-{name}"},
            "status": {"phase": "Running"},
        }
        for name in "ab"
    ]
    (tmp_path / "pods").write_text(json.dumps({"items": pods}))
    flow = json.dumps({"node": "x", **FLOW})
    script = tmp_path / "kubectl"
    script.write_text(KUBECTL.format(pods=tmp_path / "pods", flow=flow))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_all_nodes_stream_and_a_broken_one_is_named(
    kubectl: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ct", "list", "--port", "53", "--context", "lab"]) == 1
    told = capsys.readouterr()
    assert sorted(line.split()[0] for line in told.out.splitlines()[1:]) == [
        *("node-a", "node-a", "node-b"),
    ]
    assert "node-b: /run/weir/agent.sock: gone" in told.err


def test_all_nodes_flush(kubectl: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ct", "flush", "--all", "--context", "lab", "--node", "node-a"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "node-a  5"


def test_a_stream_settles_its_widths_and_keeps_no_rows() -> None:
    shown: list[str] = []
    stream = Stream(["A", "B"], shown.append)
    for _ in range(Stream.SETTLE - 1):
        stream.row(["x", "y"])
    assert shown == []
    stream.row(["long", "y"])
    assert shown[:2] == ["A     B", "x     y"]
    stream.row(["longer", "y"])
    assert shown[-1] == "longer  y"
    stream.close()
    assert len(shown) == Stream.SETTLE + 2


A, B, C = map(parse, ("10.0.0.1", "fd00::2", "10.96.0.10"))


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({}, Filter()),
        ({"pod": "ns/a", "service": "ns/b"}, Filter(pod="ns/a", service="ns/b")),
        ({"address": "fd00::2", "port": "0"}, Filter(address=B, port=0)),
        ({"protocol": "SCTP"}, Filter(protocol=132)),
        ({"protocol": "icmpv6"}, Filter(protocol=58)),
        ({"protocol": "0"}, Filter(protocol=0)),
    ],
)
def test_filters(query: dict[str, str], wanted: Filter) -> None:
    assert parse_filter(query) == wanted
    assert bool(wanted) is bool(query)


@pytest.mark.parametrize(
    "query",
    [
        {"pod": "a"},
        {"service": "b"},
        {"address": "10.0.0"},
        {"port": "65536"},
        {"port": "-1"},
        {"protocol": "dns"},
        {"protocol": "256"},
    ],
    ids=str,
)
def test_bad_filters(query: dict[str, str]) -> None:
    with pytest.raises(BadFilter):
        parse_filter(query)


@pytest.mark.parametrize(
    ("query", "plain", "translated"),
    [
        ({"protocol": "tcp"}, True, True),
        ({"protocol": "udp"}, False, False),
        ({"address": "fd00::2"}, True, True),
        ({"address": "10.96.0.10"}, False, True),
        ({"port": "53"}, False, True),
        ({"port": "80", "address": "10.0.0.1"}, True, True),
        ({"port": "81", "address": "10.0.0.1"}, False, False),
    ],
)
def test_a_row_alone(query: dict[str, str], plain: bool, translated: bool) -> None:
    """`nat` of an entry without translation means nothing."""
    for flags, admitted in ((0, plain), (CtFlag.SERVICE, translated)):
        flow = Flow(0, 6, (A, 4000), (B, 80), int(flags), (C, 53), 0, 0)
        assert parse_filter(query).admits(flow) is admitted


@pytest.mark.parametrize(
    ("protocol", "flags", "words"),
    [
        (6, CtFlag(0), "opening"),
        (6, CtFlag.REPLIED, "established"),
        (6, CtFlag.REPLIED | CtFlag.FIN_REPLY, "half-closed"),
        (6, CtFlag.FIN_ORIGIN | CtFlag.FIN_REPLY, "closed"),
        (6, CtFlag.REPLIED | CtFlag.RESET, "reset"),
        (17, CtFlag(0), "unreplied"),
        (132, CtFlag.REPLIED, "established"),
        (58, CtFlag.REPLIED, "replied"),
    ],
)
def test_states(protocol: int, flags: CtFlag, words: str) -> None:
    assert state(protocol, int(flags)) == words


def test_translations() -> None:
    assert translation(int(CtFlag.SERVICE)) == "to backend"
    assert translation(int(CtFlag.SERVICE | CtFlag.SNAT)) == "to backend, as node"
    assert translation(int(CtFlag.REV_NAT)) == "replies from"
    assert translation(int(CtFlag.REPLIED)) == ""
