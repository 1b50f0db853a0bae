# SPDX-License-Identifier: Apache-2.0
"""`weir ct`: flows as they stream in. A node has up to millions, so nothing here keeps them."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from typing import Any
from urllib.parse import urlencode

from weir.cli.errors import CliError
from weir.cli.render import Stream, flush, party
from weir.cli.source import Question, Source

HEADER = [
    *("NODE", "PROTO", "SOURCE", "DESTINATION", "DIRECTION", "STATE"),
    *("TRANSLATION", "SERVICE", "POLICY", "LEFT"),
]
FILTERS = {
    "pod": ("NAMESPACE/NAME", "flows from or to this pod"),
    "service": ("NAMESPACE/NAME", "flows through this Service"),
    "address": ("ADDRESS", "flows with this address at either end, or translated to it"),
    "port": ("NUMBER", "flows with this port at either end, or translated to it"),
    "protocol": ("NAME", "tcp, udp, sctp, icmp, icmpv6 or a number"),
}


def add_parsers(commands: Any, common: argparse.ArgumentParser) -> None:
    text = "flows that the datapath follows (conntrack)"
    ct = commands.add_parser("ct", help=text, description=text)
    actions = ct.add_subparsers(dest="action", required=True, metavar="ACTION")
    filters = argparse.ArgumentParser(add_help=False)
    for name, (what, words) in FILTERS.items():
        filters.add_argument(f"--{name}", default="", metavar=what, help=words)
    text = "flows, their translation and what is left of them; -o json gives a line each"
    actions.add_parser("list", help=text, description=text, parents=[common, filters])
    text = (
        "forget flows: the next packet of each is judged, and sent to a backend, like the first of "
        "a new one. Connections go on where policy lets their next packet open a flow"
    )
    cut = actions.add_parser(
        "flush", help="forget flows", description=text, parents=[common, filters]
    )
    cut.add_argument("--all", action="store_true", help="all flows; else a filter is needed")
    cut.add_argument("--dry-run", action="store_true", help="only list them")


def run(arguments: argparse.Namespace, where: Source) -> int:
    given = {name: getattr(arguments, name) for name in FILTERS if getattr(arguments, name)}
    for name in ("pod", "service"):
        if name in given and "/" not in given[name]:
            raise CliError(f"--{name} {given[name]}", "Write it as namespace/name.")
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    if arguments.action == "flush":
        if not given and not arguments.all:
            raise CliError("flush of everything", "Give a filter, or --all if you mean it.")
        if not arguments.dry_run:
            return _flush(arguments, where, given, words)
    question = Question(f"/v1/ct?{urlencode(given)}", ("ct", "list", *words))
    return _list(arguments, where, question)


def _list(arguments: argparse.Namespace, where: Source, question: Question) -> int:
    one_at_a_time = threading.Lock()
    stream = None if arguments.output == "json" else Stream(HEADER, print)
    count = 0

    def show(node: str, flow: dict[str, Any]) -> None:
        nonlocal count
        with one_at_a_time:
            count += 1
            if stream is None:
                print(json.dumps({"node": node, **flow}))
            else:
                stream.row(_cells(node, flow))

    errors = where.stream(question, show)
    if stream is not None:
        stream.close()
        if arguments.action == "flush":
            print(f"{count} flows would be forgotten")
    for node, error in errors.items():
        print(f"{node}: {error}", file=sys.stderr)
    return int(bool(errors))


def _cells(node: str, flow: dict[str, Any]) -> list[str]:
    left = flow["seconds_left"]
    return [
        node,
        flow["protocol"],
        party(flow["source"]),
        party(flow["destination"]),
        flow["direction"],
        flow["state"],
        f"{flow['translation']} {flow['translated']}".strip() or "-",
        flow["service"] or "-",
        str(flow["generation"]) if flow["judged"] else "-",
        f"{left} s" if left >= 0 else "-",
    ]


def _flush(
    arguments: argparse.Namespace, where: Source, given: dict[str, str], words: list[str]
) -> int:
    everything = {"all": "1"} if arguments.all else {}
    question = Question(
        f"/v1/ct/flush?{urlencode(given | everything)}",
        ("ct", "flush", *words, *(["--all"] if arguments.all else [])),
        method="POST",
    )
    answers = where.ask(question)
    if arguments.output == "json":
        print(json.dumps([a.shown() for a in answers]))
    else:
        print(flush(answers))
    return int(any(answer.error for answer in answers))
