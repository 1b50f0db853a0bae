# SPDX-License-Identifier: Apache-2.0
"""Make `e2e` importable for the tests of the local cluster's pure parts."""

import sys
from pathlib import Path

# Last in the path: the checkout's `operator` must not come before the standard library's.
sys.path.append(str(Path(__file__).resolve().parents[3]))
