# SPDX-License-Identifier: Apache-2.0
"""The operator's settings: one frozen dataclass, from the mounted file and the downward API.

All bad values are reported together, by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

LOG_LEVELS = ("debug", "info", "warning", "error")


class ConfigError(Exception):
    """The settings cannot be used; the text lists every reason."""


@dataclass(frozen=True, slots=True)
class Config:
    """Names in the file are in camelCase, as in the chart's values.

    namespace, pod_name: where this replica runs, and its identity for the Lease.
    api_server: "https://host:port"; empty: from `kubelet_kubeconfig`.
    kubeconfig: a kubeconfig file, for running outside of a cluster; empty: a pod's credentials.
    port: where agents connect (gRPC over TLS), on every address.
    metrics_port: /healthz, /readyz and /metrics, on `metrics_address`: local by default, as it
    is without TLS.
    batch_milliseconds: shortest time between two revisions; bursts within it become one.
    """

    namespace: str
    pod_name: str
    api_server: str = ""
    kubeconfig: str = ""
    kubelet_kubeconfig: Path = Path("/host/kubelet.conf")
    port: int = 9890
    metrics_port: int = 9881
    metrics_address: str = "127.0.0.1"
    batch_milliseconds: int = 5
    log_level: str = "info"


def load(path: Path | None, environment: Mapping[str, str]) -> Config:
    """Settings from a YAML or JSON file and the environment."""
    content: object = {}
    if path is not None:
        try:
            content = yaml.safe_load(path.read_text()) or {}
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a map of settings")
    return _Reader(content, environment).read()


class _Reader:
    """Takes values out one by one; what is bad, or left over, goes on the list."""

    def __init__(self, content: dict[object, object], environment: Mapping[str, str]) -> None:
        self._left = {str(key): value for key, value in content.items()}
        self._environment = environment
        self._bad: list[str] = []

    def read(self) -> Config:
        config = Config(
            namespace=self._required("POD_NAMESPACE"),
            pod_name=self._required("POD_NAME"),
            api_server=self._url("apiServer"),
            kubeconfig=self._text("kubeconfig", self._environment.get("KUBECONFIG", "")),
            kubelet_kubeconfig=Path(self._text("kubeletKubeconfig", "/host/kubelet.conf")),
            port=self._number("port", 9890, 0, 65535),
            metrics_port=self._number("metricsPort", 9881, 0, 65535),
            metrics_address=self._text("metricsAddress", "127.0.0.1"),
            batch_milliseconds=self._number("batchMilliseconds", 5, 0, 1000),
            log_level=self._one_of("logLevel", "info", LOG_LEVELS),
        )
        self._bad += [f"{name}: no such setting" for name in self._left]
        if self._bad:
            raise ConfigError("bad settings: " + "; ".join(self._bad))
        return config

    def _required(self, name: str) -> str:
        value = self._environment.get(name, "")
        if not value:
            self._bad.append(f"{name}: must be set in the environment")
        return value

    def _text(self, name: str, default: str) -> str:
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, str):
            self._bad.append(f"{name}: {value!r} is not text")
            return default
        return value

    def _number(self, name: str, default: int, low: int, high: int) -> int:
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self._bad.append(f"{name}: {value!r} is not a number from {low} to {high}")
            return default
        return value

    def _one_of(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        value = self._text(name, default)
        if value not in choices:
            self._bad.append(f"{name}: {value!r} is none of {', '.join(choices)}")
        return value

    def _url(self, name: str) -> str:
        value = self._text(name, "")
        if value and not value.startswith(("https://", "http://")):
            self._bad.append(f"{name}: {value!r} does not begin with https://")
        return value
