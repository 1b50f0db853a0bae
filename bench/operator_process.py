# SPDX-License-Identifier: Apache-2.0
"""The real operator as a process, fed by a fake API server that this process has a thread for.

    fake API server ──list, watch──► operator ──gRPC, TLS──► whoever connects

All of the operator runs, kopf's watches and the leader's included: its memory is a leader's. Run as
`python -m bench.operator_process SERVER LISTEN` it is that process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar

from support.apiserver import FakeApi, Json

from bench.errors import BenchError
from weir.operator import kinds
from weir.operator.app import App
from weir.operator.auth import AUDIENCE, NODE_NAME
from weir.operator.config import Config
from weir.operator.kubeconfig import Access
from weir.operator.reflector import Kind
from weir.operator.tls import CONFIG_MAP

NAMESPACE = "weir"
PORT = 9890
START_S = 180.0
BOOKMARK_S = 5.0
KINDS = [value for value in vars(kinds).values() if isinstance(value, Kind)]
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"
# What kopf asks about the kinds that it watches.
DISCOVERY = {
    "/api/v1": [("nodes", "Node", False), ("services", "Service", True)],
    "/apis/networking.k8s.io/v1": [("networkpolicies", "NetworkPolicy", True)],
}
T = TypeVar("T")


class ApiThread:
    """A fake API server in a thread and loop of its own, in the network namespace `where`."""

    def __init__(self, where: AbstractContextManager[object]) -> None:
        self.fake = FakeApi()
        for kind in KINDS:
            self.fake.collection(kind.path)
        self.server = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        with where:
            self._thread.start()  # a thread begins in its maker's namespaces
        if not ready.wait(10):
            raise BenchError("the fake API server did not start")

    def _run(self, ready: threading.Event) -> None:
        async def serve() -> None:
            async with self.fake.serve() as self.server:
                ready.set()
                while not self._stop.is_set():
                    # As a real one does now and then: a silent watch is taken for a dead one.
                    for kind in KINDS:
                        self.fake.bookmark(kind.path)
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stop.wait(), BOOKMARK_S)

        self._loop.run_until_complete(serve())

    def call(self, job: Callable[[], T]) -> T:
        """Runs it in the server's thread."""
        done: Future[T] = Future()
        self._loop.call_soon_threadsafe(lambda: done.set_result(job()))
        return done.result(60)

    def put(self, path: str, content: Json) -> None:
        self.call(lambda: self.fake.put(path, content))

    def fill(self, path: str, contents: Iterable[Json]) -> None:
        """What is there when the operator starts: nobody is told."""

        def job() -> None:
            for content in contents:
                self.fake.put(path, content)
            self.fake.collection(path).events.clear()

        self.call(job)

    def admit(self, node: str) -> None:
        """Whatever token comes is the agent's of that node."""
        user: Json = {"username": f"system:serviceaccount:{NAMESPACE}:weir-agent"}
        user["extra"] = {NODE_NAME: [node]}
        status = {"authenticated": True, "audiences": [AUDIENCE], "user": user}
        self.fake.answers[REVIEWS] = {"status": status}
        for path, found in DISCOVERY.items():
            resources: list[Json] = [
                {"name": name, "kind": kind, "singularName": "", "namespaced": namespaced,
                 "verbs": ["list", "watch", "get"]}
                for name, kind, namespaced in found
            ]  # fmt: skip
            self.fake.stored[path] = {"resources": resources}
        versions = [path.removeprefix("/apis/") for path in DISCOVERY if path.startswith("/apis/")]
        groups: list[Json] = []
        for name in versions:
            group, version = name.split("/")
            known: Json = {"groupVersion": name, "version": version}
            groups.append({"name": group, "versions": [known], "preferredVersion": known})
        self.fake.stored["/api"] = {"versions": ["v1"]}
        self.fake.stored["/apis"] = {"groups": groups}

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


class OperatorProcess:
    """`start` returns when it serves agents, at 127.0.0.1 and PORT of the namespace."""

    def __init__(self, api: ApiThread, folder: Path) -> None:
        self._api = api
        self._log = folder / "operator.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BenchError("the operator is not running")
        return self._process.pid

    def start(self, where: AbstractContextManager[object]) -> None:
        command = [sys.executable, "-m", "bench.operator_process", self._api.server,
                   f"127.0.0.1:{PORT}"]  # fmt: skip
        with where, self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while "serving agents" not in self.log or "compiled" not in self.log:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the operator does not serve: {self.log[-2000:]}")
            time.sleep(0.1)

    @property
    def ca(self) -> bytes:
        path = f"/api/v1/namespaces/{NAMESPACE}/configmaps/{CONFIG_MAP}"
        data: dict[str, Any] = self._api.fake.stored[path]["data"]
        return str(data["ca.crt"]).encode()

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
            self._process = None


def main(server: str, listen: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    config = Config(NAMESPACE, f"operator-{os.getpid()}", listen=listen,
                    health_listen="127.0.0.1:0")  # fmt: skip
    asyncio.run(App(config, Access((server,))).run())


if __name__ == "__main__":
    main(*sys.argv[1:])
