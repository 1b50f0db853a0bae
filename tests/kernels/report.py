# SPDX-License-Identifier: Apache-2.0
"""What the guests left behind, as counts, a table and JUnit files.

A step passes only by what it left: a guest that stopped half-way through leaves no report,
and that is a failure, as is a skipped test, an object set that is empty, a program over its
budget, and a program that has none.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUDGET = Path(__file__).parent / "budget.json"


@dataclass(frozen=True, slots=True)
class Load:
    """One program loaded with one set of settings. `error` is empty when it was accepted."""

    program: str
    settings: str
    instructions: int
    error: str = ""


@dataclass(slots=True)
class Outcome:
    """What one kernel did."""

    release: str
    loads: list[Load] = field(default_factory=list)
    passed: int = 0
    failures: list[str] = field(default_factory=list)

    def merge_pytest(self, name: str, path: Path) -> None:
        if not path.exists():
            self.failures.append(f"{name}: no report")
            return
        cases = list(ET.parse(path).getroot().iter("testcase"))
        if not cases:
            self.failures.append(f"{name}: ran no test")
        for case in cases:
            bad = next((c for c in case if c.tag in {"failure", "error", "skipped"}), None)
            if bad is None:
                self.passed += 1
            else:
                where = f"{case.get('classname')}::{case.get('name')}"
                why = (bad.get("message") or "").splitlines()[:1]
                self.failures.append(f"{name}: {bad.tag} {where}: {''.join(why)}")

    def merge_loads(self, path: Path, budget: Mapping[str, int]) -> None:
        if not path.exists():
            self.failures.append("load: no report")
            return
        self.loads = [Load(**row) for row in json.loads(path.read_text())]
        if not self.loads:
            self.failures.append("load: no program in any object")
        for load in self.loads:
            what = f"load: {load.program} with settings {load.settings}"
            if load.error:
                self.failures.append(f"{what}: {load.error}")
            elif load.program not in budget:
                self.failures.append(f"{what}: not in {BUDGET.name}")
            elif load.instructions > budget[load.program]:
                over = f"{load.instructions} instructions, budget {budget[load.program]}"
                self.failures.append(f"{what}: {over}")
            else:
                self.passed += 1


def read_budget() -> dict[str, int]:
    """Program -> verified instructions that it may cost on any kernel."""
    rows: dict[str, int] = json.loads(BUDGET.read_text())
    return rows


def read(release: str, out: Path, wanted: Sequence[str], budget: Mapping[str, int]) -> Outcome:
    outcome = Outcome(release)
    if "load" in wanted:
        outcome.merge_loads(out / "load.json", budget)
    for step in wanted:
        if step != "load":
            outcome.merge_pytest(step, out / f"{step}.xml")
    return outcome


def count(load: Load) -> str:
    """Kernels before 5.16 do not tell it."""
    return str(load.instructions) if load.instructions else "loaded"


def table(outcomes: Sequence[Outcome], budget: Mapping[str, int]) -> str:
    """Verified instructions: a line a program and settings, a column a kernel."""
    rows = sorted({(load.program, load.settings) for o in outcomes for load in o.loads})
    if not rows:
        return ""
    found = {(o.release, x.program, x.settings): x for o in outcomes for x in o.loads}
    columns = [o.release.removesuffix("-amd64") for o in outcomes]
    width = max(len(name) for name in [*columns, "refused"])
    lines = ["verified instructions of each program, with all settings on, off, and native"]
    heads = "  ".join(f"{name:>{width}}" for name in columns)
    lines.append(f"{'program':<20} {'set':<6} {heads}  {'budget':>8}")
    for program, settings in rows:
        cells = []
        for outcome in outcomes:
            load = found.get((outcome.release, program, settings))
            text = "-" if load is None else "refused" if load.error else count(load)
            cells.append(f"{text:>{width}}")
        limit = budget.get(program, "none")
        lines.append(f"{program:<20} {settings:<6} {'  '.join(cells)}  {limit:>8}")
    return "\n".join(lines)


def write_junit(outcome: Outcome, folder: Path) -> None:
    """One JUnit file a kernel, for CI's sum."""
    suite = ET.Element(
        "testsuite", name=outcome.release, tests=str(outcome.passed + len(outcome.failures)),
        failures=str(len(outcome.failures)),
    )  # fmt: skip
    for text in outcome.failures:
        case = ET.SubElement(suite, "testcase", classname=outcome.release, name=text)
        ET.SubElement(case, "failure", message=text)
    folder.mkdir(parents=True, exist_ok=True)
    ET.ElementTree(suite).write(folder / f"kernel-{outcome.release}.xml", encoding="unicode")


def clear_junit(folder: Path) -> None:
    for old in folder.glob("kernel-*.xml"):
        old.unlink()
