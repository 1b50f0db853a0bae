# SPDX-License-Identifier: Apache-2.0
"""What can go wrong before a test has run; the text says what to do about it."""

from __future__ import annotations


class KernelRunError(Exception):
    """A kernel could not be fetched, unpacked or booted."""


class GuestDiedError(KernelRunError):
    """The guest ended without an exit status: a panic, or it never reached the command."""

    def __init__(self, release: str, started: bool, console: str) -> None:
        self.started = started
        when = "while it ran the command" if started else "before it ran the command"
        super().__init__(f"kernel {release}: guest died {when}; the console's end:\n{console}")


class GuestTimeoutError(KernelRunError):
    """The command did not end in time."""

    def __init__(self, release: str, seconds: float) -> None:
        super().__init__(f"kernel {release}: no end after {seconds:.0f} s")
