# SPDX-License-Identifier: Apache-2.0
"""Arguments of the `weir` command. Imports are few, so that it answers at once."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weir.cli import flows, policy, render
from weir.cli.errors import CliError
from weir.cli.source import SOCKET, Answer, Kubectl, Local, Question, Source

NAMESPACE = "kube-system"
QUESTIONS: dict[str, tuple[str, Callable[[Sequence[Answer]], str]]] = {
    "status": ("state of the agents, and what is wrong with them", render.status),
    "endpoints": ("pods wired by Weir, and the policies that isolate them", render.endpoints),
    "services": ("Service addresses and their backends", render.services),
    "policies": ("NetworkPolicies, and the pods they isolate", render.policies),
}


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("-o", "--output", choices=["table", "json"], default="table")
    common.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="NAME",
        help="ask this node only (repeatable)",
    )
    common.add_argument(
        "-n", "--namespace", default=NAMESPACE, help=f"Weir's namespace (default {NAMESPACE})"
    )
    common.add_argument("--kubeconfig", default="", metavar="FILE")
    common.add_argument("--context", default="", metavar="NAME", help="kubeconfig context")
    common.add_argument("--socket", type=Path, default=SOCKET, help=argparse.SUPPRESS)
    main_parser = argparse.ArgumentParser(
        prog="weir",
        description="Shows what Weir does. On a node it asks the agent there (as root), elsewhere "
        "all agents through kubectl.",
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, _) in QUESTIONS.items():
        commands.add_parser(name, help=text, description=text, parents=[common])
    text = "packets as they are dropped, and why"
    monitor = commands.add_parser("monitor", help=text, description=text, parents=[common])
    which = monitor.add_mutually_exclusive_group()
    which.add_argument(
        "--drops",
        action="store_true",
        help="dropped packets, and what audit mode let through (the default)",
    )
    which.add_argument("--all", action="store_true", help="new flows that are allowed, too")
    monitor.add_argument("--pod", default="", metavar="NAMESPACE/NAME", help="only from or to it")
    flows.add_parsers(commands, common)
    policy.add_parsers(commands, common)
    return main_parser


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    try:
        return run(arguments, source(arguments))
    except CliError as error:
        print(f"weir: {error.problem}\n{error.advice}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 130


def source(arguments: argparse.Namespace) -> Source:
    from_outside = arguments.node or arguments.kubeconfig or arguments.context
    if not from_outside and (arguments.socket.exists() or arguments.socket != SOCKET):
        return Local(arguments.socket)
    return Kubectl(
        arguments.namespace, tuple(arguments.node), arguments.kubeconfig, arguments.context
    )


def run(arguments: argparse.Namespace, where: Source) -> int:
    if arguments.command == "monitor":
        return _monitor(arguments, where)
    if arguments.command == "ct":
        return flows.run(arguments, where)
    if arguments.command == "policy":
        return policy.run(arguments, where)
    name = arguments.command
    answers = where.ask(Question(f"/v1/{name}", (name,)))
    if arguments.output == "json":
        print(json.dumps([answer.shown() for answer in answers]))
    else:
        print(QUESTIONS[arguments.command][1](answers))
    return int(any(answer.error for answer in answers))


def _monitor(arguments: argparse.Namespace, where: Source) -> int:
    if arguments.pod and "/" not in arguments.pod:
        raise CliError(f"--pod {arguments.pod}", "Write it as namespace/name.")
    one_at_a_time = threading.Lock()

    def show(node: str, event: dict[str, Any]) -> None:
        if arguments.pod and not render.concerns(event, arguments.pod):
            return
        if arguments.output == "json":
            line = json.dumps({"node": node, **event} if node else event)
        else:
            line = render.event(node, event)
        with one_at_a_time:
            print(line, flush=True)

    where.follow(arguments.all, show)
    return 0


if __name__ == "__main__":
    sys.exit(main())
