# SPDX-License-Identifier: Apache-2.0
"""What a Go test program says about its tests, while it runs: `-test.v=test2json`.

There each line of the framework begins with a mark, and a test's end is told when it ends, not
with its parent. Lines between belong to the test that was named last. A test with others below it
counts only if it failed by itself, in its set-up.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from e2e.cluster.without_sctp import LEFT_OUT, PROBED
from e2e.conformance.report import PASSED, SKIPPED, Spec

LEFT = "left out"
_NOW = re.compile(r"^=== (?:RUN|NAME|CONT) +(?P<name>\S+)")
_END = re.compile(r"^ *--- (?P<state>PASS|FAIL|SKIP): (?P<name>\S+) \((?P<seconds>[\d.]+)s\)")
_STATES = {"PASS": PASSED, "FAIL": "failed", "SKIP": SKIPPED}
_MARK = "\x16"
_KEPT_LINES = 40  # of a failed test's log


@dataclass(slots=True)
class Report:
    """Reads the output; `probes_left_out` are those of tests that made others."""

    probes_left_out: int = 0
    _logs: dict[str, list[str]] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)

    def read(self, lines: Iterable[str]) -> Iterator[Spec]:
        """Each test as it ends."""
        now = ""
        for line in lines:
            text = line.rstrip("\n").lstrip(_MARK)
            if match := _NOW.match(text):
                now = match["name"]
                self._logs.setdefault(now, [])
            elif match := _END.match(text):
                spec = self._ended(match["name"], _STATES[match["state"]], float(match["seconds"]))
                if spec:
                    yield spec
            elif now in self._logs:
                self._logs[now].append(text.strip())

    def _ended(self, name: str, state: str, seconds: float) -> Spec | None:
        below = f"{name}/"
        log = self._logs.get(name, [])
        if state == "failed":
            told = any(other.startswith(below) for other in self._failed)
            self._failed.add(name)
            if told:
                return None
        elif any(other.startswith(below) for other in self._logs):
            return None
        left, made = (sum(mark in line for line in log) for mark in (LEFT_OUT, PROBED))
        if left and not made and state == PASSED:
            state = LEFT
        else:
            self.probes_left_out += left
        message = "\n  ".join(log[-_KEPT_LINES:]) if state == "failed" else ""
        return Spec(_readable(name), state, seconds, message)


def _readable(name: str) -> str:
    """Without the program's own test at the top."""
    return name.partition("/")[2].replace("_", " ") or name
