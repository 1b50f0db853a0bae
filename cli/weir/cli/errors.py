# SPDX-License-Identifier: Apache-2.0
"""What the command says when it cannot answer: always with what to do about it."""

from __future__ import annotations


class CliError(Exception):
    """Ends the command; `advice` tells the user what to do."""

    def __init__(self, problem: str, advice: str) -> None:
        self.problem = problem
        self.advice = advice
        super().__init__(f"{problem}\n{advice}")
