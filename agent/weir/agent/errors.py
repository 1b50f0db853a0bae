# SPDX-License-Identifier: Apache-2.0
"""The agent's exceptions, split by who must act."""

from __future__ import annotations


class AgentError(Exception):
    """Base of what the agent raises on purpose."""


class ConfigError(AgentError):
    """The configuration is wrong: the user must change it. Lists every bad value."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{source}: " + "; ".join(problems))


class BadResource(AgentError):
    """A resource from the operator cannot be used. It is skipped, the rest goes on."""

    def __init__(self, name: str, reason: str) -> None:
        self.resource = name
        self.reason = reason
        super().__init__(f"resource {name!r}: {reason}")


class NodeError(AgentError):
    """A fact about the node is missing or a device cannot be made; retried."""

    def __init__(self, operation: str, subject: str, reason: str) -> None:
        self.operation = operation
        self.subject = subject
        super().__init__(f"{operation} {subject}: {reason}")


class NoServer(AgentError):
    """No operator could be found or reached; retried with backoff."""


class Rejected(AgentError):
    """Rows of an object did not fit into a map; the object fails closed until they do."""

    def __init__(self, subject: str, tables: tuple[str, ...]) -> None:
        self.tables = tables
        super().__init__(f"{subject}: no room in {', '.join(tables)}")
