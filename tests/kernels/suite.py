# SPDX-License-Identifier: Apache-2.0
"""What runs inside a guest, one step after the other: `python -m kernels.suite OUT STEP...`.

Emulation makes Python about twenty times slower, so tests that wait read the factor from
WEIR_TIME_SCALE, and pytest's own time limit is raised by it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TIME_SCALE = 10
PYTEST_TIMEOUT_S = 120 * TIME_SCALE
# pytest's "no test was collected": a ring that is empty has not passed.
NOTHING_COLLECTED = 5


def pytest_command(out: Path, step: str, *arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "pytest", *arguments, "-p", "no:cacheprovider", "--tb=short",
        f"--timeout={PYTEST_TIMEOUT_S}", f"--junitxml={out / step}.xml", "-q",
    ]  # fmt: skip


def steps(out: Path) -> dict[str, list[str]]:
    return {
        "load": [sys.executable, "-m", "kernels.load_all", str(out / "load.json")],
        # What a packet costs in nanoseconds says nothing under emulation; the oracle's thousands of
        # packets are about the compiler and take minutes there.
        "bpf": pytest_command(
            out,
            "bpf",
            "tests/bpf",
            "--ignore=tests/bpf/test_cost.py",
            "--ignore=tests/bpf/test_oracle.py",
        ),
        "node": pytest_command(out, "node", "tests/node", "-m", "core"),
        "sctp": pytest_command(out, "sctp", "tests/kernels/sctp"),
    }


def main(out: Path, wanted: list[str]) -> int:
    os.environ["WEIR_TIME_SCALE"] = str(TIME_SCALE)
    known = steps(out)
    failed = 0
    for step in wanted:
        print(f"--- {step}", flush=True)
        start = time.monotonic()
        status = subprocess.run(known[step], stdin=subprocess.DEVNULL, check=False).returncode
        if status == NOTHING_COLLECTED:
            print(f"{step}: no test found", flush=True)
        failed += status != 0
        print(f"--- {step}: exit {status} after {time.monotonic() - start:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
