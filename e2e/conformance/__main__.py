# SPDX-License-Identifier: Apache-2.0
"""Run the suite and report: a line per spec as it ends, `N of M passed`, and results.json.

LIST names a selection below; FOCUS and SKIP choose freely. A selection's results are kept as a
text, build/conformance/LIST-CLUSTER.txt, to be read beside another cluster's.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.conformance import target
from e2e.conformance.pool import pool
from e2e.conformance.report import PASSED, Spec, read_output, read_report, write_list
from e2e.conformance.target import OUTPUT

_UNQUIET = r"\[Disruptive\]|\[Slow\]|\[Serial\]"
_LOAD_BALANCER = "load-balancer"
_SELECTIONS = {  # name -> focus, skip
    "conformance": (r"\[sig-network\].*\[Conformance\]", r"\[Disruptive\]|\[Feature"),
    "others": (r"\[sig-network\]", rf"{_UNQUIET}|\[Feature|\[Conformance\]"),
    "dual-stack": (r"\[sig-network\].*\[Feature:IPv6DualStack\]", r"\[Disruptive\]|\[Serial\]"),
    _LOAD_BALANCER: (r"\[sig-network\] LoadBalancers", r"\[Disruptive\]|\[Serial\]"),
}
_PROCESSES = "4"
_TIMEOUT = "2h"


def main() -> int:
    """Code 0 if at least one spec ran and all passed."""
    try:
        specs = _run()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    failed = [spec for spec in specs if spec.state != PASSED]
    for spec in failed:
        print(f"\n{spec.name}\n  {spec.state}: {spec.message}")
    passed = len(specs) - len(failed)
    print(f"log: {OUTPUT}/log.txt")
    print(f"{passed} of {len(specs)} passed")
    return 0 if passed == len(specs) > 0 else 1


def _run() -> list[Spec]:
    where = target.find()
    folder = binaries.binary_folder()
    binaries.build((*binaries.CONFORMANCE, "kubectl"), folder)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report = OUTPUT / "report.json"
    for old in (report, OUTPUT / "results.json"):
        old.unlink(missing_ok=True)
    nodes = len(where.kubectl("get", "nodes", "--output=name").split())
    selection, focus, skip = _selection()
    command = _command(folder, where.config, nodes, focus, skip)
    specs_seen = 0
    with (
        pool(where) if selection == _LOAD_BALANCER else nullcontext(),
        (OUTPUT / "log.txt").open("w") as log,
        where.start(command) as process,
    ):
        assert process.stdout
        try:
            for spec in read_output(_kept(process.stdout, log)):
                specs_seen += 1
                print(f"{specs_seen:4}  {spec.line()}", flush=True)
        except BaseException:
            process.terminate()  # ginkgo ends its processes and they their namespaces
            raise
    if not report.exists():
        raise ClusterError("the suite did not finish", f"see {OUTPUT}/log.txt")
    specs = read_report(report)
    results = [asdict(spec) for spec in specs]
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if selection:
        stack, about = where.describe()
        write_list(specs, OUTPUT / f"{selection}-{stack}.txt", f"{selection}: {about}")
    return specs


def _selection() -> tuple[str, str, str]:
    """Its name, empty for one of FOCUS and SKIP, with what it takes and what it leaves out."""
    name = os.environ.get("LIST") or ""
    given = os.environ.get("FOCUS"), os.environ.get("SKIP")
    if name not in {"", *_SELECTIONS}:
        raise ClusterError(f"LIST={name} is not one of {', '.join(_SELECTIONS)}")
    if name and any(given):
        raise ClusterError("LIST and FOCUS or SKIP exclude each other")
    if not name and not any(given):
        name = "conformance"
    focus, skip = _SELECTIONS[name or "conformance"]
    return name, given[0] or focus, given[1] or skip


def _kept(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    for line in lines:
        log.write(line)
        yield line


def _command(folder: Path, kubeconfig: Path, nodes: int, focus: str, skip: str) -> list[str]:
    return [
        str(folder / "ginkgo"),
        f"--procs={os.environ.get('PROCS') or _PROCESSES}",
        "--no-color",
        "-v",
        f"--timeout={_TIMEOUT}",
        f"--focus={focus}",
        f"--skip={skip}",
        "--json-report=report.json",
        f"--output-dir={OUTPUT}",
        str(folder / "e2e.test"),
        "--",
        f"--kubeconfig={kubeconfig}",
        "--provider=skeleton",
        f"--num-nodes={nodes}",  # without it specs that want two nodes skip themselves
    ]


if __name__ == "__main__":
    sys.exit(main())
