# SPDX-License-Identifier: Apache-2.0
"""`weir policy`: arguments, and `why`, which joins what the nodes of both ends say.

Every agent is asked the same question and answers for the ends that are pods of its node. What an
answer must cover follows from the ends as any of them names them, so that an end whose agent is
silent is noticed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from weir.cli import denials, why
from weir.cli.errors import CliError
from weir.cli.source import Answer, Kubectl, Question, Source

PROTOCOLS = ("tcp", "udp", "sctp")
WHY = """\
Says whether FROM may open a flow to TO, and why: what the policies say, at both ends, and what the
maps of the nodes concerned will do. FROM and TO are namespace/pod or an IP address. A Service's
address is none that policies see: name one of its pods.
"""
WHY_EXIT = """\
exit code: 0 if all ends answered and the maps do what the policies say, whatever that is; 2 if they
differ; 1 if an end has no agent that answers, or something else went wrong.
"""

TRY = """\
Shows which of the flows seen lately (what conntrack follows, and what policies denied in the last
hour) would fare otherwise with these NetworkPolicies and ClusterNetworkPolicies applied. Nothing is
applied.
"""
TRY_EXIT = """\
exit code: 0 if nothing would change; 2 if something would; 1 if a policy has a problem, a node does
not answer, or something else went wrong, whatever would change.
"""


@dataclass(frozen=True, slots=True)
class Asked:
    source: str
    destination: str
    protocol: str
    port: str

    def question(self) -> Question:
        query = {"from": self.source, "to": self.destination, "protocol": self.protocol}
        what = f"{self.port}/{self.protocol}" if self.port else self.protocol
        return Question(
            f"/v1/policy/why?{urlencode(query | ({'port': self.port} if self.port else {}))}",
            ("policy", "why", self.source, self.destination, what, "--this-node"),
        )


def add_parsers(commands: Any, common: argparse.ArgumentParser) -> None:
    text = "what policies decide, and why"
    policy = commands.add_parser("policy", help=text, description=text)
    actions = policy.add_subparsers(dest="action", required=True, metavar="ACTION")
    one = actions.add_parser(
        "why",
        help="whether a flow is allowed, by which rule, and what would have to change",
        description=WHY,
        epilog=WHY_EXIT,
        parents=[common],
    )
    one.add_argument("source", metavar="FROM", help="namespace/pod or an address")
    one.add_argument("destination", metavar="TO", help="namespace/pod or an address")
    one.add_argument(
        "what", metavar="PORT/PROTO", help=f"PROTO one of {', '.join(PROTOCOLS)}; or icmp"
    )
    one.add_argument("--this-node", action="store_true", help=argparse.SUPPRESS)

    attempt = actions.add_parser(
        "try",
        help="what policies of a file would change for the flows seen lately",
        description=TRY,
        epilog=TRY_EXIT,
        parents=[common],
    )
    attempt.add_argument(
        "-f", "--file", action="append", default=[], metavar="FILE", help="YAML or JSON; - is stdin"
    )
    attempt.add_argument(
        "--delete",
        action="append",
        default=[],
        metavar="KIND/[NAMESPACE/]NAME",
        help="without this policy (repeatable)",
    )
    text = "what policies denied lately, newest first, and what audit mode let through"
    actions.add_parser("denials", help=text, description=text, parents=[common])


def run(arguments: argparse.Namespace, where: Source) -> int:
    if arguments.action == "denials":
        return denials.run(arguments, where)
    if arguments.action == "try":
        from weir.cli import attempt  # noqa: PLC0415  operator and agent, which others do without

        kubectl = Kubectl(arguments.namespace, (), arguments.kubeconfig, arguments.context)
        return attempt.run(arguments, where, kubectl)
    return _why(arguments, where)


def parse_asked(source: str, destination: str, what: str) -> Asked:
    for end in (source, destination):
        namespace, slash, name = end.partition("/")
        if not (namespace and name if slash else "." in end or ":" in end):
            raise CliError(f"{end!r} is no end of a flow", "Write namespace/pod or an address.")
    port, slash, protocol = what.lower().partition("/")
    if port == "icmp" and not slash:
        return Asked(source, destination, "icmp", "")
    if protocol not in PROTOCOLS or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise CliError(
            f"{what!r} is no port and protocol", "Write 80/tcp, 53/udp, 3868/sctp or icmp."
        )
    return Asked(source, destination, protocol, port)


def _why(arguments: argparse.Namespace, where: Source) -> int:
    asked = parse_asked(arguments.source, arguments.destination, arguments.what)
    answers = where.ask(asked.question())
    if arguments.this_node:  # of another command, which joins what all say
        print(json.dumps([answer.shown() for answer in answers]))
        return int(any(answer.error for answer in answers))
    joined = join(answers)
    if arguments.output == "json":
        print(json.dumps(joined))
    else:
        print(why.text(joined, asked.port, asked.protocol))
    if joined["differ"]:
        return 2
    return int(bool(joined["missing"]))


def join(answers: Sequence[Answer]) -> dict[str, Any]:
    """One answer of all. allowed: by policy, None where an end is missing that could deny; audited:
    if not, it is let through all the same."""
    told = [answer for answer in answers if answer.data is not None]
    if not told:
        errors = "; ".join(f"{answer.node}: {answer.error}" for answer in answers)
        raise CliError(f"no agent answers: {errors}", "See `weir status`.")
    source, destination = (_end(told, name) for name in ("source", "destination"))
    directions = [
        {"node": answer.node, **direction}
        for answer in told
        for direction in answer.data["directions"]
    ]
    missing = list(_missing(answers, source, destination, directions))
    verdicts = [direction["model"]["allowed"] for direction in directions]
    allowed: bool | None = None
    if not all(verdicts):
        allowed = False
    elif not missing:
        allowed = True
    denied = [direction["model"] for direction in directions if not direction["model"]["allowed"]]
    return {
        "source": source,
        "destination": destination,
        "allowed": allowed,
        "audited": bool(denied) and all(model["audited"] for model in denied),
        "differ": not all(direction["agree"] for direction in directions),
        "directions": directions,
        "missing": missing,
    }


def _end(told: Sequence[Answer], name: str) -> dict[str, Any]:
    """As whoever knows most of it names it: a node knows its own pods first."""
    ends = [dict(answer.data[name]) for answer in told]
    return max(ends, key=lambda end: (len(end["addresses"]), bool(end["pod"]), bool(end["node"])))


def _missing(
    answers: Sequence[Answer],
    source: dict[str, Any],
    destination: dict[str, Any],
    directions: Sequence[dict[str, Any]],
) -> Iterator[str]:
    silent = {answer.node: answer.error for answer in answers if answer.error}
    asked = {answer.node for answer in answers}
    for end in (source, destination):
        if not end["addresses"]:
            yield (
                f"{end['given']}: no agent knows an address of it. Is it a pod that runs, with "
                "addresses of its own? Of one in the host's network give its node's address"
            )
    if not source["addresses"] or not destination["addresses"]:
        return
    if not set(map(_family, source["addresses"])) & set(map(_family, destination["addresses"])):
        yield "the two ends have no address of the same family"
        return
    for name, end, direction in (
        ("FROM", source, "egress"),
        ("TO", destination, "ingress"),
    ):
        if not end["is_pod"] or any(found["direction"] == direction for found in directions):
            continue
        node, who = end["node"], end["pod"] or end["given"]
        why_not = f"{node or 'its node'} has no pod of that address"
        if node in silent:
            why_not = f"the agent of {node} does not answer: {silent[node]}"
        elif node and node not in asked:
            why_not = f"the agent of {node} was not asked"
        yield f"{name}'s {direction} ({who}) is not answered: {why_not}"


def _family(address: str) -> int:
    return 6 if ":" in address else 4
