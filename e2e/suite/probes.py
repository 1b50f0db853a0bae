# SPDX-License-Identifier: Apache-2.0
"""The suite's end of a probe pod: requests over one `kubectl exec`, many at a time.

The stream ends when the API server is killed. It is opened anew at the next request; flows in the
pod go on meanwhile.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import threading
from dataclasses import dataclass, field
from typing import Any

from e2e.suite.kubectl import Unavailable, command

_numbers = itertools.count(1)


class ProbeError(Unavailable):
    """The pod did not do what it was asked for."""


@dataclass(slots=True)
class _Channel:
    process: subprocess.Popen[str]
    replies: dict[int, dict[str, Any]] = field(default_factory=dict)
    changed: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            reply = json.loads(line)
            with self.changed:
                self.replies[reply["id"]] = reply
                self.changed.notify_all()
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@dataclass(frozen=True, slots=True)
class Flow:
    """Traffic that goes on in the pod until `stop`."""

    probe: Probe
    name: str
    host: str
    port: int

    def read(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.probe.call("read", flow=self.name)
        return stats

    def stop(self) -> dict[str, Any]:
        """The final figures; asking again gives them again."""
        stats: dict[str, Any] = self.probe.call("stop", timeout=20, flow=self.name)
        return stats


class Probe:
    """One pod: where it is, and what it can be asked to do."""

    def __init__(
        self, namespace: str, name: str, node: str, addresses: tuple[str, ...] = ()
    ) -> None:
        self.namespace, self.name, self.node = namespace, name, node
        self.addresses = addresses
        self._channel: _Channel | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"{self.namespace}/{self.name}@{self.node}"

    def address(self, family: int) -> str:
        return next(a for a in self.addresses if (":" in a) == (family == 6))

    def _relay(self) -> list[str]:
        """The command whose input and output are the probe's."""
        arguments = ["exec", "--stdin", f"--namespace={self.namespace}", self.name, "--"]
        return command(*arguments, "python3", "/probe/probe.py", "relay")

    def _open(self) -> _Channel:
        with self._lock:
            if self._channel is not None and self._channel.closed:
                self._channel.end()
                self._channel = None
            if self._channel is None:
                process = subprocess.Popen(
                    self._relay(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                    bufsize=1,
                )
                self._channel = _Channel(process)
            return self._channel

    def call(self, do: str, timeout: float = 15, **arguments: Any) -> Any:
        channel = self._open()
        number = next(_numbers)
        assert channel.process.stdin is not None
        try:
            channel.process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
            channel.process.stdin.flush()
        except OSError as error:
            raise ProbeError(f"{self}: {do}: exec stream broke: {error}") from error
        with channel.changed:
            done = channel.changed.wait_for(
                lambda: number in channel.replies or channel.closed, timeout
            )
            reply = channel.replies.pop(number, None)
        if reply is None:
            why = "the exec stream ended" if done else f"no reply in {timeout} s"
            raise ProbeError(f"{self}: {do}: {why}")
        if "error" in reply:
            raise ProbeError(f"{self}: {do}: {reply['error']}")
        return reply["result"]

    def ask(self, protocol: str, host: str, port: int, timeout: float = 0.5) -> dict[str, Any]:
        """One question: {"name", "peer"} of who answers, or {"error"}."""
        (answer,) = self.call("reach", targets=[[protocol, host, port]], timeout_s=timeout)
        found: dict[str, Any] = answer
        return found

    def flow(self, kind: str, host: str, port: int, interval: float = 0.01) -> Flow:
        name = f"{kind}-{next(_numbers)}"
        self.call("start", flow=name, kind=kind, host=host, port=port, interval=interval)
        return Flow(self, name, host, port)

    def close(self) -> None:
        if self._channel is not None:
            self._channel.end()
