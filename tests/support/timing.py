# SPDX-License-Identifier: Apache-2.0
"""How patient tests are: emulated guests of the kernel ring are many times slower."""

from __future__ import annotations

import os

SCALE = float(os.environ.get("WEIR_TIME_SCALE", "1"))
