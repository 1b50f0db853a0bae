# SPDX-License-Identifier: Apache-2.0
"""`python -m weir.operator`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from weir.operator.app import App, access
from weir.operator.config import ConfigError, load
from weir.operator.kubeconfig import KubeconfigError


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weir.operator",
        description="Weir's cluster side: watches the API server, compiles Services and "
        "policies, and streams them to the agents.",
        epilog="POD_NAMESPACE and POD_NAME must be in the environment. KUBECONFIG, if set, "
        "is used instead of the pod's own credentials.",
    )
    parser.add_argument("--config", type=Path, help="settings, YAML or JSON (default: none)")
    arguments = parser.parse_args()
    try:
        config = load(arguments.config, os.environ)
        logging.basicConfig(
            level=config.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        )
        # It tells of every handler that it ran.
        logging.getLogger("kopf").setLevel(logging.WARNING)
        app = App(config, access(config))
    except (ConfigError, KubeconfigError) as error:
        print(f"weir-operator: {error}", file=sys.stderr)  # noqa: T201 - before logging is up
        return 2
    asyncio.run(app.run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
