# SPDX-License-Identifier: Apache-2.0
"""The errors of this package, split by who must act, and the CNI codes that tell it.

`Code.TRY_AGAIN` is only for what can clear by itself. The one place that turns an error
into an answer is `weir.cni.service`.
"""

from __future__ import annotations

from enum import IntEnum


class Code(IntEnum):
    """Error codes of the CNI specification 1.1; those from 100 are ours."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    NOT_AVAILABLE_LIMITED = 51
    NO_ADDRESS = 100
    WIRING = 101
    DIFFERS = 102
    REFUSED = 103
    INTERNAL = 199


class CniError(Exception):
    """Something the runtime is told: a CNI code, one sentence, and details."""

    code: Code = Code.INTERNAL

    def __init__(self, message: str, *, details: str = "", code: Code | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        if code is not None:
            self.code = code

    def __str__(self) -> str:
        return f"{self.message}: {self.details}" if self.details else self.message


class NotReady(CniError):
    """Not yet: it clears by itself. `limited`: pods that are there suffer too."""

    code = Code.TRY_AGAIN

    def __init__(self, message: str, *, details: str = "", limited: bool = False) -> None:
        super().__init__(message, details=details)
        self.limited = limited


class Refused(CniError):
    """The host of the endpoints cannot take it: a map is full, a program was rejected."""

    code = Code.REFUSED


class PoolExhausted(CniError):
    """Every address of a family is in use."""

    code = Code.NO_ADDRESS


class JournalError(CniError):
    """The journal could not be read or written; nothing was handed out."""

    code = Code.IO_FAILURE


class WiringError(CniError):
    """The kernel refused a link, address, route or namespace."""

    code = Code.WIRING
