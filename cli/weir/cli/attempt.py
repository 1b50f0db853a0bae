# SPDX-License-Identifier: Apache-2.0
"""`weir policy try`: what policies of a file would change for the flows seen lately.

Flows come from all agents: what conntrack follows, and what policies denied in the last hour. The
heavy imports are behind this module, which `weir.cli.policy` imports when it is asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from weir.agent.judge import Flow
from weir.agent.verdict import PROTOCOLS
from weir.api.address import Addr, parse, text
from weir.cli import cluster, denials, forecast
from weir.cli.errors import CliError
from weir.cli.forecast import Changed, Cluster
from weir.cli.render import table
from weir.cli.source import Kubectl, Question, Source

NUMBERS = {name: number for number, name in PROTOCOLS.items()}
ICMP = (1, 58)
# What was denied longer ago is of little use: its addresses may be other pods' by now.
DENIED_WITHIN_SECONDS = 3600


def run(arguments: argparse.Namespace, where: Source, kubectl: Kubectl) -> int:
    if not arguments.file and not arguments.delete:
        raise CliError("nothing to try", "Give policies by -f FILE, or --delete one.")
    given, troubles, others = cluster.read_files(arguments.file, kubectl.default_namespace())
    for other in others:
        print(f"{other}: no policy that Weir knows, left out", file=sys.stderr)
    for trouble in troubles:
        print(trouble.text(), file=sys.stderr)
    objects = cluster.read_cluster(kubectl)
    wanted = {**objects.policies, **given}
    for words in arguments.delete:
        deleted = cluster.parse_deletion(words)
        if deleted not in wanted:
            raise CliError(f"--delete {words}: there is none", "See `kubectl get`.")
        del wanted[deleted]
    old, new = Cluster(objects), Cluster(dataclasses.replace(objects, policies=wanted))
    seen, errors = flows(where)
    for node, error in errors.items():
        print(f"{node}: {error}: its flows are missing", file=sys.stderr)
    changed = forecast.compare(old, new, seen)
    if arguments.output == "json":
        print(json.dumps(shown(changed, new, seen, troubles, errors)))
    else:
        print(rendered(changed, new, seen))
    if troubles or errors:
        return 1
    return 2 if changed else 0


def flows(where: Source) -> tuple[Counter[Flow], dict[str, str]]:
    """Distinct ones with how often they were seen; what went wrong, by node."""
    now = time.time()
    seen: Counter[Flow] = Counter()
    one_at_a_time = threading.Lock()

    def follow(_node: str, item: dict[str, Any]) -> None:
        # A Service's own entry is of the client and the VIP: policy judges the one to the backend.
        if item["judged"]:
            with one_at_a_time:
                seen[_flow(item)] += 1

    errors = where.stream(Question("/v1/ct?", ("ct", "list")), follow)
    for answer in where.ask(denials.QUESTION):
        if answer.error:
            errors.setdefault(answer.node, answer.error)
        for item in answer.data or ():
            if now - item["last_seen"] <= DENIED_WITHIN_SECONDS:
                seen[_flow(item)] += 1
    return seen, errors


def _flow(item: dict[str, Any]) -> Flow:
    name = item["protocol"]
    protocol = NUMBERS[name] if name in NUMBERS else int(name)
    port = 0 if protocol in ICMP else int(item["destination"]["port"])
    return Flow(
        parse(item["source"]["address"]), parse(item["destination"]["address"]), protocol, port
    )


def shown(
    changed: Sequence[Changed],
    new: Cluster,
    seen: Counter[Flow],
    troubles: Sequence[cluster.Trouble],
    errors: dict[str, str],
) -> dict[str, Any]:
    """For `-o json`."""

    def end(addr: Addr) -> dict[str, str]:
        return {"address": text(addr), "name": new.name(addr)}

    def one(item: Changed) -> dict[str, Any]:
        flow = item.flow
        return {
            "source": end(flow.source),
            "destination": {**end(flow.destination), "port": flow.port},
            "protocol": PROTOCOLS.get(flow.protocol, str(flow.protocol)),
            "seen": seen[flow],
            "direction": item.after.direction,
            "audited": item.after.audited,
            "because": item.after.because,
            "before": item.before.because,
        }

    return {
        "flows": len(seen),
        "newly_denied": [one(item) for item in changed if not item.allowed],
        "newly_allowed": [one(item) for item in changed if item.allowed],
        "problems": [dataclasses.asdict(trouble) for trouble in troubles],
        "errors": errors,
    }


def rendered(changed: Sequence[Changed], new: Cluster, seen: Counter[Flow]) -> str:
    denied = sum(not item.allowed for item in changed)
    same = len(seen) - len(changed)
    counts = (
        f"{len(seen)} flows seen lately: {denied} newly denied, {len(changed) - denied} newly "
        f"allowed, {same} as before"
    )
    if not changed:
        return counts
    rows = [
        [
            _newly(item),
            new.name(item.flow.source),
            _target(item.flow, new),
            item.after.direction,
            item.after.because,
            item.before.because,
        ]
        for item in sorted(changed, key=lambda item: (item.allowed, _target(item.flow, new)))
    ]
    return "\n".join([table(["NEWLY", "FROM", "TO", "DIRECTION", "AS", "BEFORE"], rows), counts])


def _newly(item: Changed) -> str:
    if item.allowed:
        return "allowed"
    return "denied (audit)" if item.after.audited else "DENIED"


def _target(flow: Flow, new: Cluster) -> str:
    name = new.name(flow.destination)
    protocol = PROTOCOLS.get(flow.protocol, str(flow.protocol))
    if flow.protocol in ICMP:
        return f"{name} {protocol}"
    return f"{f'[{name}]' if ':' in name else name}:{flow.port}/{protocol}"
