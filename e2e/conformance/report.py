# SPDX-License-Identifier: Apache-2.0
"""What ginkgo says about specs: its output while it runs, and its JSON report at the end.

The report is the authority for the result. The output is only read to show each spec as it ends;
there, a spec is a block behind a delimiter. With one process its name is the first line and its
state comes at the end; with several, the state comes first and then the name.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_DELIMITER = re.compile(r"^-{20,}$")
_END = re.compile(r"^[•S] (?:\[(?P<state>[A-Z! -]+)\] )?\[(?P<seconds>[\d.]+) seconds\]")
_LABELS = re.compile(r" \[[\w-]+(, [^\]]+)+\]$")  # a list behind the name, not part of it
_NANOSECONDS = 1e9
PASSED = "passed"
SKIPPED = "skipped"
_PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Spec:
    """A spec that ran: the state is ginkgo's, like passed, failed, panicked, timedout."""

    name: str
    state: str
    seconds: float
    message: str = ""

    def line(self) -> str:
        """The spec as one line for people."""
        return f"{self.state:8} {self.seconds:7.1f} s  {self.name}"


def read_output(lines: Iterable[str]) -> Iterator[Spec]:
    """The specs in ginkgo's verbose output, each as soon as its lines are there."""
    name: str | None = None
    ended: re.Match[str] | None = None
    fresh = False  # right behind a delimiter
    for line in lines:
        text = line.strip()
        if _DELIMITER.match(text):
            name, ended, fresh = None, None, True
            continue
        if match := _END.match(text):
            ended = match
        elif fresh or (ended and not name):
            name = text
        fresh = False
        if name and ended:
            state = (ended["state"] or PASSED).strip("!").lower()
            yield Spec(_LABELS.sub("", name), state, float(ended["seconds"]))
            name, ended = None, None


def read_report(path: Path) -> list[Spec]:
    """The specs that were chosen, as ginkgo's JSON report lists them.

    Those that the filters left out and those that skipped themselves, as they do where a cluster
    lacks a feature, are not among them.
    """
    specs: list[Spec] = []
    for suite in json.loads(path.read_text()):
        for entry in suite["SpecReports"] or []:
            failure = entry.get("Failure", {}).get("Message", "")
            state = entry["State"]
            if entry["LeafNodeType"] != "It":  # set-up nodes count only when they break
                if state in (PASSED, SKIPPED):
                    continue
                specs.append(Spec(entry["LeafNodeType"], state, 0.0, failure))
                continue
            if state in (SKIPPED, _PENDING):
                continue
            texts = [*(entry.get("ContainerHierarchyTexts") or []), entry["LeafNodeText"]]
            seconds = entry["RunTime"] / _NANOSECONDS
            specs.append(Spec(" ".join(texts), state, round(seconds, 3), failure))
    return specs


def write_list(specs: list[Spec], path: Path, title: str) -> None:
    """All specs by name with their results, so that two clusters' lists can be compared."""
    passed = sum(spec.state == PASSED for spec in specs)
    lines = [f"{spec.state:8} {spec.name}" for spec in sorted(specs, key=lambda spec: spec.name)]
    path.write_text("\n".join([title, f"{passed} of {len(specs)} passed", "", *lines]) + "\n")
