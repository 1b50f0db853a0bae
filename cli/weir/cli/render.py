# SPDX-License-Identifier: Apache-2.0
"""Answers as text for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from weir.cli.source import Answer

SHOWN = 3


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


class Stream:
    """A table whose rows come one by one: the first ones settle the columns' widths."""

    SETTLE = 500

    def __init__(self, header: Sequence[str], show: Callable[[str], None]) -> None:
        self._first: list[Sequence[str]] | None = [header]
        self._widths: list[int] = []
        self._show = show

    def row(self, cells: Sequence[str]) -> None:
        if self._first is None:
            self._show(self._line(cells))
            return
        self._first.append(cells)
        if len(self._first) > self.SETTLE:
            self.close()

    def close(self) -> None:
        """Shows what waits for its widths."""
        first, self._first = self._first or [], None
        if first:
            columns = range(len(first[0]))
            self._widths = [max(len(row[column]) for row in first) for column in columns]
        for row in first:
            self._show(self._line(row))

    def _line(self, cells: Sequence[str]) -> str:
        padded = (cell.ljust(width) for cell, width in zip(cells, self._widths, strict=True))
        return "  ".join(padded).rstrip()


def status(answers: Sequence[Answer]) -> str:
    rows = []
    notes = []
    for answer in answers:
        if answer.error:
            rows.append([answer.node, "unknown", "", "", "", "", ""])
            notes.append(f"{answer.node}: {answer.error}")
            continue
        data = answer.data
        operator = data["operator"] if data["operator_connected"] else "none"
        rows.append(
            [
                answer.node,
                "ready" if data["ready"] else "not ready",
                operator,
                str(data["endpoints"]),
                ",".join(data["pod_cidrs"]),
                f"{data['routing']}/{data['pod_mtu']}",
                data["version"],
            ]
        )
        notes += [f"{answer.node}: {note}" for note in _notes(data)]
    header = ["NODE", "STATE", "OPERATOR", "PODS", "POD CIDRS", "ROUTING/MTU", "VERSION"]
    return "\n".join([table(header, rows), *notes])


def _notes(data: dict[str, Any]) -> Iterable[str]:
    if data["why_not"]:
        yield data["why_not"]
    if data.get("audit"):
        yield "audit mode (policy.audit): what policies deny is reported and let through"
    if not data["operator_connected"]:
        yield f"no operator: {data['operator_error']}; the last known state stays in force"
    for group, error in data["errors"].items():
        yield f"cannot write {group}: {error}"
    for name, mode in data.get("xdp", {}).items():
        if mode == "refused":
            yield f"{name} does not take XDP as configured (see the agent's log): tc does its work"
    for name, owners in data["rejected"].items():
        more = f" and {len(owners) - SHOWN} more" if len(owners) > SHOWN else ""
        yield f"map {name} is full, left out: {', '.join(owners[:SHOWN])}{more}"
    for name, reason in data["bad_resources"].items():
        yield f"{name} is not used: {reason}"
    for row in data["tables"]:
        if row["rows"] > 0.9 * row["max_entries"]:
            yield f"map {row['name']} has {row['rows']} of {row['max_entries']} rows"
    yield from data.get("flow_warnings", ())
    if announced := data.get("announced"):
        more = f" and {len(announced) - SHOWN} more" if len(announced) > SHOWN else ""
        yield f"announces {', '.join(announced[:SHOWN])}{more}"


def endpoints(answers: Sequence[Answer]) -> str:
    rows = [
        [
            answer.node,
            item["pod"] + (" (audit)" if item.get("audit") else ""),
            ",".join(item["addresses"]),
            ",".join(item["ingress"]) or "-",
            ",".join(item["egress"]) or "-",
            item["device"],
        ]
        for answer in answers
        for item in answer.data or ()
    ]
    header = ["NODE", "POD", "ADDRESSES", "INGRESS POLICIES", "EGRESS POLICIES", "DEVICE"]
    return _with_errors(table(header, rows), answers)


def services(answers: Sequence[Answer]) -> str:
    rows = []
    for answer in answers:
        for item in answer.data or ():
            address = item["address"]
            host = f"[{address}]" if ":" in address else address
            rows.append(
                [
                    answer.node,
                    item["service"],
                    item["kind"],
                    f"{host}:{item['port']}/{item['protocol']}",
                    item["scope"],
                    item["policy"],
                    _choice(item),
                    _backends(item),
                ]
            )
    header = ["NODE", "SERVICE", "KIND", "ADDRESS", "CLIENTS", "POLICY", "CHOICE", "BACKENDS"]
    return _with_errors(table(header, rows), answers)


def _choice(item: dict[str, Any]) -> str:
    words = ["maglev" if item["maglev"] else "random"]
    if item["affinity_seconds"]:
        words.append(f"affinity {item['affinity_seconds']} s")
    if item["source_ranges"]:
        words.append("only from " + " ".join(item["source_ranges"]))
    return ", ".join(words)


def _backends(item: dict[str, Any]) -> str:
    if item["taken_by"]:
        return f"none: {item['taken_by']} has this address and port"
    shown = _some(item["backends"])
    drained = [backend for backend in item["draining"] if backend not in item["backends"]]
    if drained:
        shown += f" draining: {_some(drained)}"
    if item["backends"]:
        return shown
    return f"none: {'dropped' if item['policy'] == 'Local' else 'refused'}{shown}"


def _some(backends: list[str]) -> str:
    more = f" +{len(backends) - SHOWN}" if len(backends) > SHOWN else ""
    return ", ".join(backends[:SHOWN]) + more


def policies(answers: Sequence[Answer]) -> str:
    rows = [
        [
            answer.node,
            item["policy"],
            f"{item['tier']} {item['priority']}" if item.get("tier") else "-",
            "+".join(word for word in ("ingress", "egress") if item[word]),
            str(item["rules"]),
            item["subject"],
            ",".join(item["pods"]) or "-",
        ]
        for answer in answers
        for item in answer.data or ()
    ]
    header = ["NODE", "POLICY", "TIER", "DIRECTIONS", "RULES", "SUBJECT", "PODS HERE"]
    return _with_errors(table(header, rows), answers)


def flush(answers: Sequence[Answer]) -> str:
    rows = [[answer.node, str(answer.data["flows"])] for answer in answers if answer.data]
    return _with_errors(table(["NODE", "FLOWS FORGOTTEN"], rows), answers)


def event(node: str, item: dict[str, Any]) -> str:
    """One line: time, verdict, reason, who to whom, direction, who decided. AUDIT: what would have
    been dropped for the reason."""
    clock = time.strftime("%H:%M:%S", time.localtime(item["time"]))
    clock += f".{int(item['time'] * 1000) % 1000:03d}"
    words = [clock, *([node] if node else []), item["verdict"].upper()]
    if item["reason"]:
        words.append(item["reason"])
    ends = f"{party(item['source'], with_port=False)} -> {party(item['destination'])}"
    words += [f"{ends}/{item['protocol']}", item["direction"]]
    if item["policies"]:
        words.append(f"by {', '.join(item['policies'])}")
    if item.get("rule"):
        words.append(f"({item['rule'].partition(' of ')[0]})")
    if item["near_miss"]:
        words.append(f"({item['near_miss']})")
    return " ".join(words)


def concerns(item: dict[str, Any], pod: str) -> bool:
    return pod in {item["source"]["pod"], item["destination"]["pod"]}


def party(one: dict[str, Any], *, with_port: bool = True) -> str:
    name = str(one["pod"] or one["address"])
    if with_port:
        return f"{f'[{name}]' if ':' in name else name}:{one['port']}"
    return name


def _with_errors(text: str, answers: Sequence[Answer]) -> str:
    return "\n".join([text, *(f"{a.node}: {a.error}" for a in answers if a.error)])
