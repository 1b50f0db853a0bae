# SPDX-License-Identifier: Apache-2.0
"""The kernel that runs the tests."""

from __future__ import annotations

import os

KERNEL = tuple(map(int, os.uname().release.split(".")[:2]))
# The first whose test run of XDP takes the interface by which a packet came.
XDP_INGRESS_KERNEL = (5, 15)
