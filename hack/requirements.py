# SPDX-License-Identifier: Apache-2.0
"""Print what pyproject.toml requires to build the wheel (`build`) or to run it (`runtime`)."""

import sys
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text())
    wanted = {
        "build": project["build-system"]["requires"],
        "runtime": project["project"]["dependencies"],
    }
    sys.stdout.write("\n".join(wanted[sys.argv[1]]) + "\n")


if __name__ == "__main__":
    main()
