# SPDX-License-Identifier: Apache-2.0
"""Where answers come from: the agent's socket on this node, or every node through kubectl.

From outside, `kubectl exec` runs this same command next to each agent, so there is one API and
no port to open; kubectl brings credentials, contexts and plugins as the user has them.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weir.cli.errors import CliError

SOCKET = Path("/run/weir/agent.sock")
SELECTOR = "app.kubernetes.io/name=weir-agent"
AT_ONCE = 16
TIMEOUT_SECONDS = 20
LIST_SECONDS = 30
OBJECTS_SECONDS = 120
NO_SUCH_KIND = "doesn't have a resource type"
REACH = "Check that kubectl reaches the cluster (KUBECONFIG, --kubeconfig, --context)."


@dataclass(frozen=True, slots=True)
class Question:
    """The same in two languages: the agent's API, and this command next to another agent."""

    path: str
    words: tuple[str, ...]
    method: str = "GET"


@dataclass(frozen=True, slots=True)
class Answer:
    """One node's: the decoded JSON, or what went wrong."""

    node: str
    data: Any = None
    error: str = ""

    def shown(self) -> dict[str, Any]:
        """For `-o json`."""
        error = {"error": self.error} if self.error else {}
        return {"node": self.node, "data": self.data, **error}


Show = Callable[[str, dict[str, Any]], None]
"""Takes a node's name and one line of its answer."""


class Source(Protocol):
    def ask(self, question: Question) -> list[Answer]:
        """The same question to every node."""

    def stream(self, question: Question, show: Show) -> dict[str, str]:
        """The lines of every node's answer as they come. Returns what went wrong, by node."""

    def follow(self, everything: bool, show: Show) -> None:
        """Events of every node until interrupted."""


STATUS = Question("/v1/status", ("status",))


class Local:
    """The agent of this node."""

    def __init__(self, path: Path = SOCKET) -> None:
        self._path = path

    def ask(self, question: Question) -> list[Answer]:
        status = json.loads(self._get(STATUS.path, TIMEOUT_SECONDS).read())
        node = str(status["node"])
        if question == STATUS:
            return [Answer(node, status)]
        answer = self._get(question.path, TIMEOUT_SECONDS, question.method)
        return [Answer(node, json.loads(answer.read()))]

    def stream(self, question: Question, show: Show) -> dict[str, str]:
        node = str(json.loads(self._get(STATUS.path, TIMEOUT_SECONDS).read())["node"])
        response = self._get(question.path, TIMEOUT_SECONDS, question.method)
        line: dict[str, Any] | None = None
        try:
            while text := response.readline():
                line = json.loads(text)
                if line:
                    show(node, line)
        except (
            TimeoutError,
            ConnectionResetError,
            http.client.HTTPException,
            json.JSONDecodeError,
        ):
            line = None
        # An empty object comes last.
        return {} if line == {} else {node: "the agent broke off: its log says why"}

    def follow(self, everything: bool, show: Show) -> None:
        response = self._get(f"/v1/events{'?all=1' if everything else ''}", None)
        for event in _lines(response):
            show("", event)

    def _get(
        self, path: str, timeout: float | None, method: str = "GET"
    ) -> http.client.HTTPResponse:
        connection = _UnixConnection(self._path, timeout)
        try:
            connection.request(method, path, headers={"Connection": "close"})
            response = connection.getresponse()
        except PermissionError as error:
            connection.close()
            raise CliError(f"{self._path}: {error.strerror}", "Run it as root.") from error
        except OSError as error:
            connection.close()
            raise CliError(
                f"{self._path}: {error.strerror or error}",
                "The agent does not run here. On a node, see `crictl ps --name agent` and its log; "
                "elsewhere set KUBECONFIG, so that agents are asked through kubectl.",
            ) from error
        if response.status in {400, 503}:
            said = response.read().decode(errors="replace")
            raise CliError(said, "The command with --help says what it takes.")
        if response.status != 200:
            raise CliError(
                f"the agent answers {response.status} to {path}",
                "The command and the agent are probably of different versions: use the agent's, "
                "`kubectl exec … -- weir`.",
            )
        return response


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


@dataclass(frozen=True, slots=True)
class Kubectl:
    """All agents of a cluster, or those of some nodes."""

    namespace: str
    nodes: tuple[str, ...] = ()
    kubeconfig: str = ""
    context: str = ""
    binary: str = "kubectl"

    def ask(self, question: Question) -> list[Answer]:
        pods = self._pods()

        def one(item: tuple[str, str]) -> Answer:
            node, pod = item
            command = self._exec(pod, *question.words, "-o", "json")
            done = self._run(command, TIMEOUT_SECONDS)
            if done.returncode:
                return Answer(
                    node, error=_last_line(done.stderr) or f"kubectl exec: {done.returncode}"
                )
            answers = json.loads(done.stdout)
            return Answer(node, answers[0]["data"])

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(one, pods.items()))

    def stream(self, question: Question, show: Show) -> dict[str, str]:
        def one(item: tuple[str, str]) -> tuple[str, str]:
            node, pod = item
            command = self._command(self._exec(pod, *question.words, "-o", "json"))
            with tempfile.TemporaryFile("w+") as errors:
                with subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True
                ) as process:
                    _relay(process, node, show)
                errors.seek(0)
                said = _last_line(errors.read())
            failed = f"kubectl exec: {process.returncode}" if process.returncode else ""
            return node, (said or failed) if failed else ""

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return {node: error for node, error in pool.map(one, self._pods().items()) if error}

    def follow(self, everything: bool, show: Show) -> None:
        options = ["--all"] if everything else ["--drops"]
        running: list[subprocess.Popen[str]] = []
        threads = []
        for node, pod in self._pods().items():
            process = subprocess.Popen(
                self._command(self._exec(pod, "monitor", "-o", "json", *options)),
                stdout=subprocess.PIPE,
                text=True,
            )
            running.append(process)
            thread = threading.Thread(target=_relay, args=(process, node, show), daemon=True)
            thread.start()
            threads.append(thread)
        try:
            for thread in threads:
                thread.join()
        finally:
            for process in running:
                process.terminate()
                process.wait()

    def get(self, resource: str, *, optional: bool = False) -> str:
        """All objects of a kind in all namespaces, as JSON. optional: a cluster that does not have
        the kind has none of it."""
        done = self._run(["get", resource, "--all-namespaces", "-o", "json"], OBJECTS_SECONDS)
        if done.returncode and optional and NO_SUCH_KIND in done.stderr:
            return '{"metadata": {}, "items": []}'
        if done.returncode:
            raise CliError(f"kubectl get {resource}: {_last_line(done.stderr)}", REACH)
        return done.stdout

    def default_namespace(self) -> str:
        """What kubectl takes for objects that name none."""
        words = ["config", "view", "--minify", "-o", "jsonpath={..namespace}"]
        done = self._run(words, LIST_SECONDS)
        return done.stdout.strip() or "default"

    def _pods(self) -> dict[str, str]:
        """Running agents' pod names by node."""
        command = ["get", "pods", "-n", self.namespace, "-l", SELECTOR, "-o", "json"]
        done = self._run(command, LIST_SECONDS)
        if done.returncode:
            raise CliError(f"kubectl: {_last_line(done.stderr)}", REACH)
        items = json.loads(done.stdout)["items"]
        pods = {
            item["spec"]["nodeName"]: item["metadata"]["name"]
            for item in items
            if item["spec"].get("nodeName") and item["status"].get("phase") == "Running"
        }
        if not pods:
            raise CliError(
                f"no running agent in namespace {self.namespace}",
                "Name Weir's namespace with -n, or see `kubectl get pods -A -l "
                f"{SELECTOR}` for why none runs.",
            )
        unknown = sorted(set(self.nodes) - pods.keys())
        if unknown:
            raise CliError(
                f"no running agent on {', '.join(unknown)}",
                f"Nodes with one: {', '.join(sorted(pods))}.",
            )
        return {node: pods[node] for node in sorted(pods) if not self.nodes or node in self.nodes}

    @staticmethod
    def _exec_prefix() -> list[str]:
        return ["-c", "agent", "--", "weir"]

    def _exec(self, pod: str, *words: str) -> list[str]:
        return ["exec", "-n", self.namespace, pod, *self._exec_prefix(), *words]

    def _command(self, words: Sequence[str]) -> list[str]:
        if shutil.which(self.binary) is None:
            raise CliError(
                f"{self.binary} is not installed, and there is no agent on this machine",
                "Install kubectl, or run `weir` on a node as root.",
            )
        options = [f"--kubeconfig={self.kubeconfig}"] if self.kubeconfig else []
        options += [f"--context={self.context}"] if self.context else []
        return [self.binary, *options, *words]

    def _run(self, words: Sequence[str], seconds: float) -> subprocess.CompletedProcess[str]:
        command = self._command(words)
        try:
            return subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            message = f"no answer in {seconds:g} s"
            return subprocess.CompletedProcess(command, 1, "", message)


def _relay(process: subprocess.Popen[str], node: str, show: Show) -> None:
    for line in process.stdout or ():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # cut off: how the process ends says why
            continue
        if event:
            show(node, event)


def _lines(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    while line := response.readline():
        event = json.loads(line)
        if event:
            yield event


def _last_line(text: str) -> str:
    """What went wrong: our own words if the command ran, else what kubectl says last."""
    lines = [line for line in text.splitlines() if line and not line.startswith("command term")]
    ours = [line for line in lines if line.startswith("weir: ")]
    if ours:
        return ours[-1].removeprefix("weir: ")
    return lines[-1] if lines else ""
