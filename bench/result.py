# SPDX-License-Identifier: Apache-2.0
"""A figure next to its peer's, and how they are printed and kept.

Machines drift by a fifth from minute to minute, so two figures are compared only when they were
taken in turns: the ratio is the median over pairs of neighbouring turns, not the ratio of medians.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. `ratio` is value / peer_value, `runs` the pairs it was taken from.

    Without a peer (`peer` is empty) peer_value and ratio are None.
    """

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    runs: int


@dataclass(frozen=True, slots=True)
class Rates:
    """A rate of each turn with that many Services, and of `direct`, which took turns with it."""

    name: str
    services: int
    values: list[float]
    direct: list[float]

    @property
    def text(self) -> str:
        return f"{self.name}, {self.services} services"


def alone(name: str, unit: str, values: Sequence[float]) -> Result:
    return Result(name, median(values), unit, "", None, None, len(values))


def against(
    name: str, unit: str, peer: str, values: Sequence[float], peer_values: Sequence[float]
) -> Result:
    """Compares turn by turn."""
    ratios = [mine / other for mine, other in zip(values, peer_values, strict=True)]
    return Result(
        name, median(values), unit, peer, median(peer_values), median(ratios), len(ratios)
    )


def number(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(results: Sequence[Result]) -> str:
    heads = ("benchmark", "value", "unit", "peer", "peer's", "ratio", "runs")
    rows = [
        (
            r.name,
            number(r.value),
            r.unit,
            r.peer,
            number(r.peer_value),
            "" if r.ratio is None else f"{r.ratio:.2f}",
            str(r.runs),
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    left = {0, 2, 3}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [heads, *rows]
    ]
    return "\n".join(lines)


def write(results: Sequence[Result], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")


def read(path: Path) -> list[Result]:
    return [Result(**row) for row in json.loads(path.read_text())]
