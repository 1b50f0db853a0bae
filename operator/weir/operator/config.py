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
    listen: where agents connect (gRPC over TLS).
    health_listen: /healthz, /readyz and /metrics; local by default, as it is without TLS.
    metrics_listen: /metrics alone, for a Prometheus; empty: nowhere but at health_listen.
    batch_milliseconds: shortest time between two revisions; bursts within it become one.
    load_balancer_class: of the Services of type LoadBalancer that get addresses from pools.
    classless_load_balancers: those without a class do too.
    """

    namespace: str
    pod_name: str
    api_server: str = ""
    kubeconfig: str = ""
    kubelet_kubeconfig: Path = Path("/host/kubelet.conf")
    listen: str = "[::]:9890"
    health_listen: str = "127.0.0.1:9881"
    metrics_listen: str = ""
    batch_milliseconds: int = 5
    load_balancer_class: str = "weir.dev/load-balancer"
    classless_load_balancers: bool = True
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
            listen=self._listen("listen", "[::]:9890"),
            health_listen=self._listen("healthListen", "127.0.0.1:9881"),
            metrics_listen=self._listen("metricsListen", ""),
            batch_milliseconds=self._number("batchMilliseconds", 5, 0, 1000),
            load_balancer_class=self._text("loadBalancerClass", "weir.dev/load-balancer"),
            classless_load_balancers=self._flag("classlessLoadBalancers", True),
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

    def _flag(self, name: str, default: bool) -> bool:
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._bad.append(f"{name}: {value!r} is neither true nor false")
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

    def _listen(self, name: str, default: str) -> str:
        value = self._text(name, default)
        if value:
            try:
                split_listen(value)
            except ValueError:
                self._bad.append(f"{name}: {value!r} is not host:port")
        return value


def split_listen(value: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[host]:port". ValueError."""
    host, colon, port = value.rpartition(":")
    number = int(port)
    if not colon or not host or not 0 <= number <= 65535:
        raise ValueError(value)
    return host.removeprefix("[").removesuffix("]"), number
