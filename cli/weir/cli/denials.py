# SPDX-License-Identifier: Apache-2.0
"""`weir policy denials`: what policies denied lately on all nodes, newest first."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from weir.cli.render import party, table
from weir.cli.source import Question, Source

QUESTION = Question("/v1/policy/denials", ("policy", "denials"))
HEADER = ["LAST SEEN", "NODE", "PACKETS", "VERDICT", "FROM", "TO", "DIRECTION", "BY"]


def run(arguments: argparse.Namespace, where: Source) -> int:
    answers = where.ask(QUESTION)
    if arguments.output == "json":
        print(json.dumps([answer.shown() for answer in answers]))
    else:
        found = [(answer.node, item) for answer in answers for item in answer.data or ()]
        found.sort(key=lambda pair: -pair[1]["last_seen"])
        print(table(HEADER, [_cells(node, item) for node, item in found]))
        for answer in answers:
            if answer.error:
                print(f"{answer.node}: {answer.error}", file=sys.stderr)
    return int(any(answer.error for answer in answers))


def _cells(node: str, item: dict[str, Any]) -> list[str]:
    return [
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(item["last_seen"])),
        node,
        str(item["packets"]),
        "audited" if item["audited"] else item["reason"],
        party(item["source"], with_port=False),
        f"{party(item['destination'])}/{item['protocol']}",
        item["direction"],
        item["rule"] or ", ".join(item["policies"]) or "-",
    ]
