# SPDX-License-Identifier: Apache-2.0
"""Where the API server is, and with what to talk to it.

Inside a cluster: the `apiServer` setting, else `server:` in the kubelet's own kubeconfig (its
credentials are not used), else the environment that Kubernetes gives every pod, which needs a
working Service and so comes last. Credentials are the pod's ServiceAccount. Outside: KUBECONFIG.
"""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class KubeconfigError(Exception):
    """The file, or what it says, cannot be used."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach the API server. `servers` are tried in turn; `token_file` is read again, and
    comes before `token`."""

    servers: tuple[str, ...]
    ca: str = ""  # PEM
    token_file: Path | None = None
    token: str = ""
    cert: str = ""  # PEM, client
    key: str = field(default="", repr=False)

    def ssl_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca or None)
        if self.cert:
            # The ssl module takes client certificates from files alone.
            with tempfile.TemporaryDirectory() as folder:
                pair = Path(folder) / "pair.pem"
                pair.touch(mode=0o600)
                pair.write_text(self.cert + "\n" + self.key)
                context.load_cert_chain(pair)
        return context

    def current_token(self) -> str:
        """Blocks on the file. Tokens rotate, so this is asked for again and again."""
        if self.token_file is None:
            return self.token
        try:
            return self.token_file.read_text().strip()
        except OSError as error:
            raise KubeconfigError(f"token {self.token_file}: {error.strerror}") from error


def in_cluster(
    api_server: str,
    kubelet_kubeconfig: Path,
    service_account: Path = SERVICE_ACCOUNT,
    environment: Mapping[str, str] = os.environ,
) -> Access:
    """Access for a pod. KubeconfigError if no address is known or the CA is missing."""
    servers: list[str] = []
    if api_server:
        servers.append(api_server)
    elif kubelet_kubeconfig.exists():
        servers.append(_cluster(_load(kubelet_kubeconfig), kubelet_kubeconfig)["server"])
    host = environment.get("KUBERNETES_SERVICE_HOST")
    if host:
        host = f"[{host}]" if ":" in host else host
        servers.append(f"https://{host}:{environment.get('KUBERNETES_SERVICE_PORT', '443')}")
    if not servers:
        raise KubeconfigError(
            f"no API server address: set apiServer, or mount the kubelet's {kubelet_kubeconfig}"
        )
    try:
        ca = (service_account / "ca.crt").read_text()
    except OSError as error:
        raise KubeconfigError(f"{service_account / 'ca.crt'}: {error.strerror}") from error
    unique = tuple(dict.fromkeys(server.rstrip("/") for server in servers))
    return Access(unique, ca, service_account / "token")


def from_file(path: Path) -> Access:
    """Access by the current context of a kubeconfig file, as kubectl would read it."""
    # Imported here: a pod does without its 40 MB, and the image without the package.
    try:
        from kubernetes import client, config  # noqa: PLC0415
    except ImportError as error:
        raise KubeconfigError(f"{path}: install weir[outside] to use a kubeconfig") from error
    loaded = client.Configuration()
    try:
        config.load_kube_config(  # type: ignore[no-untyped-call]
            str(path), client_configuration=loaded
        )
        return Access(
            servers=(str(loaded.host).rstrip("/"),),
            ca=_content(loaded.ssl_ca_cert),
            token_file=_token_file(path),
            token=str(loaded.api_key.get("BearerToken", "")).removeprefix("Bearer ").strip(),
            cert=_content(loaded.cert_file),
            key=_content(loaded.key_file),
        )
    except (config.ConfigException, OSError, ValueError) as error:
        raise KubeconfigError(f"{path}: {error}") from error


def _token_file(path: Path) -> Path | None:
    """Read again and again, as the library reads it only once. None too for a list of files."""
    if not path.is_file():
        return None
    content = _load(path)
    user = _context(content, path).get("user")
    if not user:
        return None
    name = _named(content, "users", "user", user, path).get("tokenFile")
    return path.parent / str(name) if name else None


def _content(file: str | None) -> str:
    return Path(file).read_text() if file else ""


# A kubeconfig is a few nested maps read once at start; they end here.
_Map = dict[str, Any]


def _load(path: Path) -> _Map:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise KubeconfigError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise KubeconfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise KubeconfigError(f"{path}: not a kubeconfig")
    return content


def _context(content: _Map, path: Path) -> _Map:
    current = content.get("current-context")
    if not current and len(content.get("contexts") or []) == 1:
        current = content["contexts"][0].get("name")
    return _named(content, "contexts", "context", current, path)


def _cluster(content: _Map, path: Path) -> _Map:
    cluster = _named(content, "clusters", "cluster", _context(content, path).get("cluster"), path)
    if not cluster.get("server"):
        raise KubeconfigError(f"{path}: the cluster has no server")
    return cluster


def _named(content: _Map, plural: str, singular: str, name: object, path: Path) -> _Map:
    for entry in content.get(plural) or []:
        if isinstance(entry, dict) and entry.get("name") == name:
            found = entry.get(singular)
            if isinstance(found, dict):
                return found
    raise KubeconfigError(f"{path}: no {singular} named {name!r}")
