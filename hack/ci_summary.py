# SPDX-License-Identifier: Apache-2.0
"""Add up the JUnit files of a CI run: one line a suite, then `N passed, N failed`.

A skipped test is a failure here: CI's machine can do all that the rings ask for.
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Result:
    """One suite's counts; errors count as failures."""

    name: str
    passed: int
    failed: int
    skipped: int


def read(path: Path) -> Result:
    """ValueError names a file that is no JUnit report or ran nothing."""
    try:
        root = ET.parse(path).getroot()
    except ET.ParseError as error:
        raise ValueError(f"{path}: not a JUnit report: {error}") from error
    suites = list(root.iter("testsuite"))
    total = sum(int(suite.get("tests", 0)) for suite in suites)
    failed = sum(int(s.get("failures", 0)) + int(s.get("errors", 0)) for s in suites)
    skipped = sum(int(suite.get("skipped", 0)) for suite in suites)
    if total == 0:
        raise ValueError(f"{path}: ran no test")
    return Result(path.stem, total - failed - skipped, failed, skipped)


def main(paths: list[str]) -> int:
    if not paths:
        print("no JUnit report to add up", file=sys.stderr)
        return 1
    try:
        results = [read(Path(path)) for path in paths]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for result in results:
        print(
            f"{result.name:<16} {result.passed} passed, {result.failed} failed,"
            f" {result.skipped} skipped"
        )
    failed = sum(result.failed + result.skipped for result in results)
    print(f"{sum(result.passed for result in results)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
