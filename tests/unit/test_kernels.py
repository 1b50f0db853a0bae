# SPDX-License-Identifier: Apache-2.0
"""The kernel runner's judgement: what it may not let pass, and which package is the newest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kernels import packages, report
from kernels.__main__ import series_list

BUDGET = {"from_pod": 1000}


def loads(path: Path, *rows: dict[str, object]) -> Path:
    path.write_text(json.dumps(list(rows)))
    return path


def row(**changes: object) -> dict[str, object]:
    return {"program": "from_pod", "settings": "on", "instructions": 900, "error": ""} | changes


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param({"instructions": 1001}, "1001 instructions, budget 1000", id="over budget"),
        pytest.param({"error": "too large"}, "too large", id="refused"),
        pytest.param({"program": "new"}, "not in budget.json", id="no budget"),
    ],
)
def test_a_load_fails(tmp_path: Path, change: dict[str, object], why: str) -> None:
    outcome = report.Outcome("6.1")
    outcome.merge_loads(loads(tmp_path / "load.json", row(), row(**change)), BUDGET)
    assert outcome.passed == 1
    assert len(outcome.failures) == 1
    assert why in outcome.failures[0]


def test_a_kernel_that_does_not_count_instructions_passes(tmp_path: Path) -> None:
    outcome = report.Outcome("5.10")
    outcome.merge_loads(loads(tmp_path / "load.json", row(instructions=0)), BUDGET)
    assert (outcome.passed, outcome.failures) == (1, [])
    assert "loaded" in report.table([outcome], BUDGET)


def test_nothing_is_no_success(tmp_path: Path) -> None:
    outcome = report.read("6.1", tmp_path, ["load", "bpf"], BUDGET)
    assert outcome.failures == ["load: no report", "bpf: no report"]
    loads(tmp_path / "load.json")
    (tmp_path / "bpf.xml").write_text("<testsuites><testsuite tests='0'/></testsuites>")
    outcome = report.read("6.1", tmp_path, ["load", "bpf"], BUDGET)
    assert outcome.failures == ["load: no program in any object", "bpf: ran no test"]


def test_a_skipped_test_is_a_failure(tmp_path: Path) -> None:
    cases = "<testcase classname='a' name='b'/>" + "".join(
        f"<testcase classname='a' name='{tag}'><{tag} message='why'/></testcase>"
        for tag in ("failure", "error", "skipped")
    )
    (tmp_path / "bpf.xml").write_text(f"<testsuite>{cases}</testsuite>")
    outcome = report.read("6.1", tmp_path, ["bpf"], BUDGET)
    assert outcome.passed == 1
    assert [text.split(" a::")[0] for text in outcome.failures] == [
        "bpf: failure", "bpf: error", "bpf: skipped",
    ]  # fmt: skip


def test_the_table_has_a_column_a_kernel(tmp_path: Path) -> None:
    outcomes = []
    for release, count in (("6.1.0-50-amd64", 900), ("6.12.107+deb13-amd64", 950)):
        outcome = report.Outcome(release)
        outcome.merge_loads(loads(tmp_path / "load.json", row(instructions=count)), BUDGET)
        outcomes.append(outcome)
    lines = report.table(outcomes, BUDGET).splitlines()
    assert lines[1].split() == ["program", "set", "6.1.0-50", "6.12.107+deb13", "budget"]
    assert lines[2].split() == ["from_pod", "on", "900", "950", "1000"]


@pytest.mark.parametrize(
    ("series", "release", "matches"),
    [
        ("6.1", "6.1.0-50-amd64", True),
        ("6.1", "6.12.107+deb13-amd64", False),
        ("6.12", "6.12.107+deb13-amd64", True),
        ("6.12", "6.12.107+deb13-cloud-amd64", False),
        ("6.12", "6.12.107+deb13-rt-amd64", False),
        ("7", "7.2.13+deb14-amd64", True),
        ("6.1", "6.1.0-50-amd64-unsigned", False),
    ],
)
def test_releases_of_a_series(series: str, release: str, matches: bool) -> None:
    assert bool(packages.pattern(series).fullmatch(release)) is matches


def test_the_newest_release_is_the_one_with_the_larger_numbers() -> None:
    found = ["6.12.107+deb13-amd64", "6.12.94+deb13-amd64"]
    assert max(found, key=packages.release_order) == "6.12.107+deb13-amd64"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["6.1", "6.12"]),
        ("all", ["5.10", "6.1", "6.12", "7"]),
        ("6.1,5.10", ["6.1", "5.10"]),
        ("7.2", ["7.2"]),
    ],
)
def test_the_list_of_series(text: str, expected: list[str]) -> None:
    assert series_list(text) == expected
