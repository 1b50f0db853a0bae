# SPDX-License-Identifier: Apache-2.0
"""What the conformance command reads out of ginkgo."""

import json
from pathlib import Path

import pytest

from e2e.conformance.report import Spec, read_output, read_report, write_list

DELIMITER = "-" * 30
SERIAL = f"""\
{DELIMITER}
[sig-network] DNS should resolve [Conformance] [sig-network, Conformance]
k8s.io/kubernetes/test/e2e/network/dns.go:58
  STEP: Creating a pod
• [1.500 seconds]
{DELIMITER}
SSSSSS
{DELIMITER}
[sig-network] Services should fail [sig-network, Slow]
• [FAILED] [2.000 seconds]
"""
PARALLEL = f"""\
SSS
{DELIMITER}
• [1.500 seconds]
[sig-network] DNS should resolve [Conformance] [sig-network, Conformance]
k8s.io/kubernetes/test/e2e/network/dns.go:58
{DELIMITER}
• [FAILED] [2.000 seconds]
[sig-network] Services should fail [sig-network, Slow]
"""


@pytest.mark.parametrize("output", [SERIAL, PARALLEL], ids=["one process", "several processes"])
def test_each_spec_of_the_output_has_name_state_and_time(output: str) -> None:
    assert list(read_output(output.splitlines())) == [
        Spec("[sig-network] DNS should resolve [Conformance]", "passed", 1.5),
        Spec("[sig-network] Services should fail", "failed", 2.0),
    ]


def test_report_lists_what_ran_and_broken_set_up(tmp_path: Path) -> None:
    def entry(kind: str, text: str, state: str, message: str = "") -> dict[str, object]:
        return {
            "LeafNodeType": kind,
            "LeafNodeText": text,
            "ContainerHierarchyTexts": ["[sig-network] DNS"] if kind == "It" else None,
            "State": state,
            "RunTime": 1_500_000_000,
            "Failure": {"Message": message},
        }

    entries = [
        entry("SynchronizedBeforeSuite", "", "passed"),
        entry("It", "resolves", "passed"),
        entry("It", "is left out", "skipped"),
        entry("It", "times out", "timedout", "too slow"),
        entry("SynchronizedAfterSuite", "", "failed", "not clean"),
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps([{"SpecReports": entries}, {"SpecReports": None}]))
    assert read_report(path) == [
        Spec("[sig-network] DNS resolves", "passed", 1.5),
        Spec("[sig-network] DNS times out", "timedout", 1.5, "too slow"),
        Spec("SynchronizedAfterSuite", "failed", 0.0, "not clean"),
    ]


def test_a_list_is_by_name_and_says_how_many_passed(tmp_path: Path) -> None:
    specs = [Spec("b", "passed", 1.0), Spec("a", "failed", 2.0, "no answer")]
    write_list(specs, tmp_path / "list.txt", "others: CNI=weir")
    lines = (tmp_path / "list.txt").read_text().splitlines()
    assert lines == ["others: CNI=weir", "1 of 2 passed", "", "failed   a", "passed   b"]
