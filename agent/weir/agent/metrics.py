# SPDX-License-Identifier: Apache-2.0
"""Prometheus' text format, written by hand: a client library would weigh more than this page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from weir.agent.aging import Fill
from weir.agent.flows import Flows
from weir.agent.reconciler import Reconciler
from weir.agent.stream import StreamState
from weir.agent.views import tables
from weir.datapath.records import Direction, DropReason, Metric, MetricKey

Sample = tuple[Mapping[str, str], float]


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    kind: str
    text: str
    samples: list[Sample]


def render(families: Iterable[Family]) -> str:
    lines = []
    for family in families:
        lines.append(f"# HELP {family.name} {family.text}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for labels, value in family.samples:
            inner = ",".join(f'{key}="{_escape(item)}"' for key, item in labels.items())
            number = int(value) if value == int(value) else value
            lines.append(
                f"{family.name}{{{inner}}} {number}" if inner else f"{family.name} {number}"
            )
    return "\n".join(lines) + "\n"


def datapath_families(counted: Iterable[tuple[MetricKey, Metric]]) -> list[Family]:
    packets: list[Sample] = []
    byte_counts: list[Sample] = []
    audited: list[Sample] = []
    for key, metric in counted:
        if key.reason == DropReason.AUDIT:
            audited.append(({"direction": _direction(key.direction)}, metric.packets))
            continue
        labels = {"reason": _reason(key.reason), "direction": _direction(key.direction)}
        packets.append((labels, metric.packets))
        byte_counts.append((labels, metric.bytes))
    what = "by drop reason (none: forwarded) and direction, seen from the pod."
    return [
        Family("weir_packets_total", "counter", f"Packets {what}", packets),
        Family("weir_bytes_total", "counter", f"Bytes {what}", byte_counts),
        Family(
            "weir_policy_audited_total",
            "counter",
            "Flows that a policy denies and audit mode let through, whenever judged, by direction.",
            audited,
        ),
    ]


def agent_families(reconciler: Reconciler, stream: StreamState, ready: bool) -> list[Family]:
    seen = tables(reconciler)
    stats = reconciler.statistics

    def single(name: str, kind: str, text: str, value: float) -> Family:
        return Family(name, kind, text, [({}, value)])

    return [
        Family(
            "weir_map_rows",
            "gauge",
            "Desired rows of a map.",
            [({"map": table.name}, table.rows) for table in seen],
        ),
        Family(
            "weir_map_capacity",
            "gauge",
            "Rows that a map can hold.",
            [({"map": table.name}, table.max_entries) for table in seen],
        ),
        Family(
            "weir_map_rejected_rows",
            "gauge",
            "Rows that a full map did not take; their objects fail closed.",
            [({"map": table.name}, table.rejected) for table in seen],
        ),
        single("weir_reconcile_rounds_total", "counter", "Reconcile rounds.", stats.rounds),
        single(
            "weir_reconcile_seconds_total",
            "counter",
            "Seconds spent in reconcile rounds.",
            stats.total_seconds,
        ),
        single(
            "weir_reconcile_last_seconds",
            "gauge",
            "Duration of the last reconcile round in seconds.",
            stats.last_seconds,
        ),
        single(
            "weir_reconcile_failures_total",
            "counter",
            "Reconcile steps that the kernel refused.",
            stats.failures,
        ),
        single("weir_rows_written_total", "counter", "Rows written to maps.", stats.rows_written),
        single("weir_rows_deleted_total", "counter", "Rows deleted from maps.", stats.rows_deleted),
        single(
            "weir_rows_repaired_total",
            "counter",
            "Rows in which the kernel differed for no reason of ours.",
            stats.repaired,
        ),
        single(
            "weir_operator_connected",
            "gauge",
            "1 with a stream from an operator.",
            stream.connected,
        ),
        single(
            "weir_operator_connects_total",
            "counter",
            "Streams opened to operators.",
            stream.connects,
        ),
        single(
            "weir_endpoints",
            "gauge",
            "Pods wired on this node.",
            len(reconciler.projection.placement.local),
        ),
        single("weir_ready", "gauge", "1 when pods can be wired.", ready),
    ]


def flow_families(flows: Flows) -> list[Family]:
    """As of the last aging walk: a table's entries cannot be counted without reading it."""
    fills, sweeps = flows.aging.fills, flows.sweeper.statistics

    def each(name: str, kind: str, text: str, value: Callable[[Fill], float]) -> Family:
        return Family(
            name, kind, text, [({"map": name}, value(fill)) for name, fill in fills.items()]
        )

    return [
        each(
            "weir_flow_map_entries",
            "gauge",
            "Entries in use of a map that evicts the least recently used, counted while aging.",
            lambda fill: fill.entries,
        ),
        each(
            "weir_flow_map_capacity",
            "gauge",
            "Entries that such a map can hold.",
            lambda fill: fill.max_entries,
        ),
        each(
            "weir_flow_map_pressure",
            "gauge",
            "Its entries in use as part of its capacity, 0 to 1.",
            lambda fill: fill.ratio,
        ),
        each(
            "weir_flow_map_expired_total",
            "counter",
            "Expired entries that aging deleted.",
            lambda fill: fill.expired,
        ),
        Family(
            "weir_flows_swept_total",
            "counter",
            "Entries deleted as the Service or backend that they lead to has gone.",
            [
                ({"map": "ct"}, sweeps.flows),
                ({"map": "sock_nat"}, sweeps.sockets),
                ({"map": "affinity"}, sweeps.clients),
            ],
        ),
        Family(
            "weir_sockets_destroyed_total",
            "counter",
            "Connected UDP sockets ended as their backend has gone.",
            [({}, sweeps.destroyed)],
        ),
        Family(
            "weir_sweep_last_seconds",
            "gauge",
            "Duration of the last sweep after changed Services in seconds.",
            [({}, sweeps.last_seconds)],
        ),
        Family(
            "weir_aging_last_seconds",
            "gauge",
            "Duration of the last aging round in seconds, its pauses included.",
            [({}, flows.aging.last_seconds)],
        ),
    ]


def _reason(number: int) -> str:
    try:
        return DropReason(number).name.lower()
    except ValueError:
        return str(number)


def _direction(number: int) -> str:
    try:
        return Direction(number).name.lower()
    except ValueError:
        return str(number)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
