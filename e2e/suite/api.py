# SPDX-License-Identifier: Apache-2.0
"""The API server without a new process for each request: through one `kubectl proxy`.

For tests that write thousands of objects; whatever the kubeconfig says about credentials, kubectl
does. The proxy listens on a socket in a folder that only we can enter.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from e2e.suite.kubectl import KubectlError, Manifest, command, eventually

_PATHS = {
    "Namespace": "/api/v1/namespaces",
    "Pod": "/api/v1/namespaces/{}/pods",
    "NetworkPolicy": "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies",
    "ClusterNetworkPolicy": "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
}
_TRIES = 10


class Refused(KubectlError):
    """The API server's answer is an error."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Api:
    """Requests from any thread; each has a connection of its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._local = threading.local()
        self._all: list[_Connection] = []

    def request(
        self, method: str, path: str, body: Manifest | None = None, kind: str = "application/json"
    ) -> Manifest:
        connection: _Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = _Connection(self._path)
            self._all.append(connection)
        try:
            connection.request(
                method, path, json.dumps(body) if body else None, {"Content-Type": kind}
            )
            answer = connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise KubectlError(f"{method} {path}: {error!r}") from error
        if answer.status >= 300:
            raise Refused(f"{method} {path}: {answer.status} {text.decode()[:500]}", answer.status)
        found: Manifest = json.loads(text)
        return found

    def put(self, manifest: Manifest) -> Manifest:
        """Create it, or replace it whole, so that defaults are anew; the object as it is then."""
        for _ in range(_TRIES):
            try:
                version = self.get(manifest)["metadata"]["resourceVersion"]
            except Refused as error:
                if error.status != 404:
                    raise
                return self.request("POST", path_of(manifest).rpartition("/")[0], manifest)
            meta = {**manifest["metadata"], "resourceVersion": version}
            try:
                return self.request("PUT", path_of(manifest), {**manifest, "metadata": meta})
            except Refused as error:
                if error.status != 409:  # its status is written meanwhile
                    raise
        raise KubectlError(f"{path_of(manifest)} changes all the time")

    def merge(self, manifest: Manifest, patch: Manifest) -> Manifest:
        """A merge patch of an object, of which only kind, name and namespace are looked at."""
        return self.request("PATCH", path_of(manifest), patch, "application/merge-patch+json")

    def delete(self, manifest: Manifest) -> None:
        """At once, without a grace period; what is not there is deleted."""
        try:
            self.request("DELETE", path_of(manifest) + "?gracePeriodSeconds=0")
        except Refused as error:
            if error.status != 404:
                raise

    def get(self, manifest: Manifest) -> Manifest:
        return self.request("GET", path_of(manifest))

    def list(self, kind: str, namespace: str = "", selector: str = "") -> list[Manifest]:
        query = f"?labelSelector={selector}" if selector else ""
        items: list[Manifest] = self.request("GET", _PATHS[kind].format(namespace) + query)["items"]
        return items

    def close(self) -> None:
        for connection in self._all:
            connection.close()


def path_of(manifest: Manifest) -> str:
    meta = manifest["metadata"]
    return f"{_PATHS[manifest['kind']].format(meta.get('namespace'))}/{meta['name']}"


@contextmanager
def api() -> Iterator[Api]:
    with tempfile.TemporaryDirectory(prefix="weir-e2e-") as folder:
        path = Path(folder) / "api.sock"
        process = subprocess.Popen(
            command("proxy", f"--unix-socket={path}"), stdout=subprocess.DEVNULL
        )
        made = Api(str(path))
        try:
            eventually(path.exists, bool, 10, "kubectl proxy at its socket")
            yield made
        finally:
            made.close()
            process.terminate()
            process.wait()
