# SPDX-License-Identifier: Apache-2.0
"""Writes charts/weir/README.md from README.md.in and the `# --` lines of values.yaml.

`--check` only tells whether it is current. Every value must have its line, or stand below a value
that has one; the line belongs to the key that follows it.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parents[1] / "charts" / "weir"
README = CHART / "README.md"
KEY = re.compile(r"( *)([A-Za-z]\w*):")


class ChartReadmeError(Exception):
    """values.yaml cannot be turned into a table."""


@dataclass(frozen=True, slots=True)
class Row:
    path: str
    default: str
    meaning: str


def rows(text: str) -> list[Row]:
    """The documented values, in the order of the file."""
    found: list[Row] = []
    parents: list[tuple[int, str]] = []
    meaning: list[str] = []
    documented: int | None = None  # indent of a documented key: what is below belongs to it
    for line in text.splitlines():
        comment = line.strip()
        if comment.startswith("# --"):
            meaning = [comment.removeprefix("# --").strip()]
        elif comment.startswith("#"):
            if meaning:
                meaning.append(comment.removeprefix("#").strip())
        elif match := KEY.match(line):
            indent = len(match[1])
            if documented is not None and indent > documented:
                continue
            documented = None
            parents = [*(p for p in parents if p[0] < indent), (indent, match[2])]
            path = ".".join(name for _, name in parents)
            if meaning:
                found.append(Row(path, default(text, path), " ".join(meaning)))
                documented = indent
            elif not isinstance(value(text, path), dict):
                raise ChartReadmeError(f"values.yaml: {path} has no `# --` line")
            meaning = []
        elif not comment:
            meaning = []
    return found


def value(text: str, path: str) -> object:
    node: object = yaml.safe_load(text)
    for name in path.split("."):
        if not isinstance(node, dict):
            raise ChartReadmeError(f"values.yaml: nothing at {path}")
        node = node[name]
    return node


def default(text: str, path: str) -> str:
    return json.dumps(value(text, path))


def render() -> str:
    lines = ["| value | default | meaning |", "|---|---|---|"]
    lines.extend(
        f"| `{row.path}` | `{row.default}` | {row.meaning.replace('|', '&#124;')} |"
        for row in rows((CHART / "values.yaml").read_text())
    )
    return (CHART / "README.md.in").read_text() + "\n".join(lines) + "\n"


def main() -> None:
    text = render()
    if "--check" in sys.argv[1:]:
        if not README.exists() or README.read_text() != text:
            raise ChartReadmeError("charts/weir/README.md is old: run hack/chart_readme.py")
    else:
        README.write_text(text)


if __name__ == "__main__":
    try:
        main()
    except ChartReadmeError as error:
        sys.exit(f"chart: {error}")
