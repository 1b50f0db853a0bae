# SPDX-License-Identifier: Apache-2.0
"""The one error that the commands of this package show to people."""


class ClusterError(Exception):
    """What went wrong, with which object, and what the user can do about it."""

    def __init__(self, what: str, do: str = "") -> None:
        super().__init__(f"{what}\n  -> {do}" if do else what)
