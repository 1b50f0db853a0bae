# SPDX-License-Identifier: Apache-2.0
"""What every program of the agent begins with: its configuration, told to people if it is bad."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from weir.agent import logs
from weir.agent.config import Config, load
from weir.agent.errors import ConfigError

BAD_CONFIG = 2
"""The exit code then."""


def configured(path: Path) -> Config | None:
    """Sets up logging too. None: what is wrong is on the standard error."""
    try:
        config = load(path, os.environ)
    except ConfigError as error:
        sys.stderr.write(f"weir-agent: {error}\n")
        return None
    logs.set_up(config.log_level)
    return config
