# SPDX-License-Identifier: Apache-2.0
"""The documentation names what is there: files, modules, functions, drop reasons, metrics."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest

from weir.datapath.records import DropReason
from weir.operator import status

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPERATIONS = ROOT / "docs" / "operations.md"
# Where the paths of a page may begin.
FOLDERS = (ROOT, ROOT / "datapath" / "bpf")
NO_EVENT = {
    DropReason.NONE,
    DropReason.UNSUPPORTED_L2,
    DropReason.NOT_UNICAST,
    DropReason.AUDIT,
}


@cache
def sources() -> str:
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "*.c", "*.h"], cwd=ROOT, check=True, capture_output=True
    )
    names = listed.stdout.decode().split()
    return "\n".join((ROOT / n).read_text() for n in names if not n.startswith("tests/"))


def spans(page: Path) -> list[str]:
    """What a page writes as code in its sentences."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"[\w.]+(/[\w.-]+)+\.(py|c|h|md|proto|json|mk)", span):
            assert any((folder / span).exists() for folder in FOLDERS), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_exist(page: Path) -> None:
    for span in spans(page):
        if match := re.fullmatch(r"(?:\w+ in )?weir\.(\w+)\.(\w+)", span):
            part, module = match.groups()
            assert (ROOT / part / "weir" / part / f"{module}.py").exists(), span


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_exist(page: Path) -> None:
    for span in spans(page):
        if match := re.fullmatch(r"(?:([A-Z]\w+)\.)?(\w+)\(\)", span):
            owner, name = match.groups()
            if name in {"like_this", "connect", "setns"}:  # no functions of ours
                continue
            assert re.search(rf"^(?:.*def |.*\b){name}\(", sources(), re.MULTILINE), span
            assert not owner or re.search(rf"^class {owner}\b", sources(), re.MULTILINE), span


def test_every_drop_reason_is_explained() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.*?) \|", OPERATIONS.read_text(), re.MULTILINE)
    words = {int(number): (metric, event) for number, metric, event in rows}
    assert words.keys() == {int(reason) for reason in DropReason}
    for reason in DropReason:
        name = reason.name.lower()
        metric, event = words[reason]
        assert metric == name
        assert (event == f"`{name.replace('_', '-')}`") is (reason not in NO_EVENT)


def test_every_metric_is_named() -> None:
    page = OPERATIONS.read_text()
    agent = (ROOT / "agent/weir/agent/metrics.py").read_text()
    families = {*re.findall(r'"(weir_\w+)"', agent), *status.HELP}
    assert len(families) > 20
    assert not {name for name in families if name not in page}
    named = set(re.findall(r"\b(weir_[a-z_]+)\b", page))
    assert not named - families
