# SPDX-License-Identifier: Apache-2.0
"""Errors of the benchmarks."""

from __future__ import annotations


class BenchError(Exception):
    """A benchmark could not be set up, or what it measured did not work."""
