# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between us and the kernel, split by who must act on it."""

from __future__ import annotations

import os
import platform

# The kernel's internal "not supported", which errno and strerror do not know.
ENOTSUPP = 524
LOG_LINES = 25
LOG_WIDTH = 200


def error_text(number: int) -> str:
    return "not supported by this kernel (524)" if number == ENOTSUPP else os.strerror(number)


class DatapathError(Exception):
    """An operation on a kernel object failed. `errno` is 0 if no call into the kernel failed."""

    def __init__(self, operation: str, subject: str, errno: int = 0, hint: str = "") -> None:
        self.operation = operation
        self.object = subject
        self.errno = errno
        self.hint = hint
        said = [error_text(errno)] if errno else []
        super().__init__(f"{operation} {subject}: {'; '.join([*said, hint] if hint else said)}")


class TableFull(DatapathError):
    """A map has no room: the cluster outgrew its configured size."""

    def __init__(self, table: str, max_entries: int, errno: int) -> None:
        super().__init__("update", table, errno, f"the table is full at {max_entries} entries")
        self.table = table
        self.max_entries = max_entries


class NotMounted(DatapathError):
    """A file system that the datapath lives in is missing: the host's set-up must change."""


class NotPermitted(DatapathError):
    """The kernel refuses: a capability is missing, or lockdown is on."""


class DeviceGone(DatapathError):
    """The network device does not exist (any more)."""


class LayoutChanged(DatapathError):
    """A pinned map has another layout than the objects, and no migration is known."""


class LayoutMismatch(DatapathError):
    """The objects and this Python code do not belong together: a broken build."""


class VerifierRejected(DatapathError):
    """The kernel refused a program. `log` is the part of its log that tells why."""

    def __init__(self, program: str, errno: int, log: str) -> None:
        self.program = program
        self.kernel = platform.release()
        self.log = cut_log(log)
        super().__init__("load", program, errno, f"kernel {self.kernel} says:\n{self.log}")


def cut_log(log: str, lines: int = LOG_LINES) -> str:
    """The last lines of a verifier log before its closing statistics."""
    useful = [line for line in log.splitlines() if line.strip()]
    useful = [line for line in useful if not line.startswith("processed ")]
    end = next((i for i, line in enumerate(useful) if "END PROG LOAD LOG" in line), len(useful))
    return "\n".join(line[:LOG_WIDTH] for line in useful[max(0, end - lines) : end])
