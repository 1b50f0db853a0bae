# SPDX-License-Identifier: Apache-2.0
"""Entry point: `python -m kernels [SERIES,...|all] [--steps load,bpf,node,sctp]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernels import packages, report, vm
from kernels.errors import KernelRunError

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "kernels"
JUNIT = ROOT / "build" / "junit"
STEPS = ("load", "bpf", "node", "sctp")


def series_list(text: str) -> list[str]:
    if text == "all":
        return list(packages.ALL_SERIES)
    return [part for part in text.replace(",", " ").split() if part] or list(
        packages.DEFAULT_SERIES
    )


def run_kernel(
    series: str, steps: list[str], timeout_s: float, budget: dict[str, int]
) -> report.Outcome:
    """Boot one kernel and read what it left. Never raises for what the guest did."""
    try:
        kernel = packages.get(series)
    except KernelRunError as error:
        return report.Outcome(series, failures=[str(error)])
    print(f"=== kernel {kernel.release}", flush=True)
    out = OUT / kernel.release
    start = time.monotonic()
    command = ["/usr/bin/env", f"PYTHONPATH={ROOT / 'tests'}", "PYTHONSAFEPATH=1"]
    command += ["PYTHONDONTWRITEBYTECODE=1", sys.executable, "-m", "kernels.suite", "/out", *steps]
    died = ""
    try:
        vm.run(kernel, command, out, ROOT, timeout_s)
    except KernelRunError as error:
        died = str(error)
    outcome = report.read(kernel.release, out, steps, budget)
    if died:
        outcome.failures.append(died)
    seconds = time.monotonic() - start
    counts = f"{outcome.passed} passed, {len(outcome.failures)} failed"
    print(f"=== kernel {kernel.release}: {counts} in {seconds:.0f} s", flush=True)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernels", description=__doc__)
    parser.add_argument("series", nargs="?", default="", help="for example 6.1,6.12, or all")
    parser.add_argument("--steps", default=",".join(STEPS), help="of load, bpf, node, sctp")
    parser.add_argument("--timeout", type=float, default=2700.0, help="seconds a kernel")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    steps = arguments.steps.split(",")
    if unknown := set(steps) - set(STEPS):
        parser.error(f"unknown steps: {', '.join(sorted(unknown))}")

    budget = report.read_budget()
    report.clear_junit(JUNIT)
    # A guest uses one CPU, whatever it has itself.
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as guests:
        outcomes = list(
            guests.map(
                lambda series: run_kernel(series, steps, arguments.timeout, budget),
                series_list(arguments.series),
            )
        )
    print(f"\n{report.table(outcomes, budget)}\n")
    for outcome in outcomes:
        report.write_junit(outcome, JUNIT)
        for failure in outcome.failures:
            print(f"FAILED {outcome.release}: {failure}")
    failed = sum(len(outcome.failures) for outcome in outcomes)
    print(f"{sum(outcome.passed for outcome in outcomes)} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
