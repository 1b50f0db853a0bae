# SPDX-License-Identifier: Apache-2.0
"""The agent's settings: read once at start, all bad values reported together.

The file is the chart's ConfigMap (charts/weir/values.yaml documents the keys); who and where
the pod is comes from the environment.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import yaml

from weir.agent import maglev
from weir.agent.errors import ConfigError
from weir.agent.frontends import ALL_ADDRESSES, NodePortRule
from weir.api.address import Addr, Cidr, parse, parse_cidr
from weir.datapath.links import XDP_MODES
from weir.datapath.settings import Sizes

T = TypeVar("T")

ROUTINGS = ("vxlan", "native")
ALGORITHMS = ("random", "maglev")
MODES = ("snat", "dsr")
PRIMARY = "primary"
XDP_SETTINGS = tuple(XDP_MODES)
LEVELS = ("debug", "info", "warning", "error")
MTU_RANGE = range(1280, 65536)
MAGLEV_TABLE_SIZE = 4093
MAGLEV_RANGE = range(251, 131072)


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things are, seen from the agent. In its container, the host's are below /host."""

    pins: Path = Path("/sys/fs/bpf/weir")
    cgroup: Path = Path("/host/sys/fs/cgroup")
    sysctls: Path = Path("/host/proc/sys")
    state: Path = Path("/var/lib/weir")
    run: Path = Path("/run/weir")
    token: Path = Path("/var/run/secrets/weir/token")
    service_account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")
    cni_bin: Path = Path("/host/opt/cni/bin")
    cni_conf: Path = Path("/host/etc/cni/net.d")
    shim: Path = Path("/opt/weir/libexec/weir")


@dataclass(frozen=True, slots=True)
class Config:
    """mtu: bytes, 0 follows the uplink. uplinks: empty finds them. resync_seconds: between full
    comparisons with the kernel. operators: host:port of operators, for tests and clusters whose
    API is not to be asked; empty asks the API server. unmanaged: wire containers that are no
    pods (cnitool), outside every policy. maglev_table_size: 0 chooses backends at random.
    dsr: backends on other nodes answer clients outside the cluster themselves.
    policy_audit: nothing is dropped for a policy, only reported.
    metrics_address: besides the loopback, on which health is always answered. proxy_health_port:
    where /healthz is answered as kube-proxy does, 0: nowhere."""

    node: str
    namespace: str
    host_ip: Addr | None = None
    tunnel: bool = True
    mtu: int = 0
    uplinks: tuple[str, ...] = ()
    xdp: str = "off"
    xdp_services: bool = True
    masquerade: bool = True
    no_masquerade: tuple[Cidr, ...] = ()
    api_server: str = ""
    kubelet_kubeconfig: Path = Path("/etc/kubernetes/kubelet.conf")
    cni_conf_name: str = "05-weir.conflist"
    sizes: Sizes = field(default_factory=Sizes)
    node_ports: NodePortRule = ALL_ADDRESSES
    maglev_table_size: int = 0
    dsr: bool = False
    policy_audit: bool = False
    metrics_address: str = "127.0.0.1"
    metrics_port: int = 9880
    proxy_health_port: int = 0
    resync_seconds: float = 300.0
    log_level: int = logging.INFO
    operators: tuple[str, ...] = ()
    unmanaged: bool = False
    install_cni: bool = True
    paths: Paths = Paths()


def load(path: Path, environment: Mapping[str, str]) -> Config:
    """Raises ConfigError with everything that is wrong."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(str(path), [f"cannot be read: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["is not a mapping"])
    return parse_config(str(path), values, environment)


def parse_config(
    source: str, values: Mapping[str, object], environment: Mapping[str, str]
) -> Config:
    reader = _Reader(values)
    maps = _Reader(reader.take("maps", dict, {}), "maps.")
    xdp = _Reader(reader.take("xdp", dict, {}), "xdp.")
    balancer = _Reader(reader.take("loadBalancer", dict, {}), "loadBalancer.")
    policy = _Reader(reader.take("policy", dict, {}), "policy.")
    paths = _Reader(reader.take("paths", dict, {}), "paths.")
    level = reader.choice("logLevel", LEVELS, "info")
    host_ip = environment.get("HOST_IP", "")
    config = Config(
        node=environment.get("NODE_NAME", ""),
        namespace=environment.get("POD_NAMESPACE", ""),
        host_ip=reader.convert("HOST_IP", host_ip, parse) if host_ip else None,
        tunnel=reader.choice("routing", ROUTINGS, "vxlan") == "vxlan",
        mtu=reader.number("mtu", 0, lambda n: n == 0 or n in MTU_RANGE, "0 or 1280 to 65535"),
        uplinks=tuple(reader.strings("uplinks", str)),
        xdp=xdp.choice("mode", XDP_SETTINGS, "off"),
        xdp_services=xdp.take("services", bool, True),
        masquerade=reader.take("masquerade", bool, True),
        no_masquerade=tuple(reader.strings("masqueradeExcludeCIDRs", parse_cidr)),
        api_server=reader.url("apiServer"),
        kubelet_kubeconfig=Path(reader.take("kubeletKubeconfig", str, "/host/kubelet.conf")),
        cni_conf_name=reader.take("cniConfName", str, "05-weir.conflist"),
        sizes=Sizes(
            services=maps.entries("services"),
            backends=maps.entries("backends"),
            addresses=maps.entries("addresses"),
            endpoints=maps.entries("endpoints"),
            prefixes=maps.entries("prefixes"),
            routes=maps.entries("routes"),
            policy=maps.entries("policy"),
            ct=maps.entries("conntrack"),
            snat=maps.entries("snat"),
            sock_nat=maps.entries("sockNat"),
            blocked=maps.entries("blocked"),
            maglev=maps.entries("maglev"),
            affinity=maps.entries("affinity"),
            source_ranges=maps.entries("sourceRanges"),
            # A namespace each, and a pod has at most two addresses.
            netns_addresses=maps.entries("endpoints"),
        ),
        node_ports=_node_ports(reader),
        maglev_table_size=_maglev_table_size(balancer),
        dsr=balancer.choice("mode", MODES, "snat") == "dsr",
        policy_audit=policy.take("audit", bool, False),
        metrics_address=reader.address("metricsAddress", "127.0.0.1"),
        metrics_port=reader.number(
            "metricsPort", 9880, lambda n: 0 <= n < 65536, "a port, or 0 for none"
        ),
        proxy_health_port=reader.number(
            "proxyHealthPort", 0, lambda n: 0 <= n < 65536, "a port, or 0 for none"
        ),
        resync_seconds=reader.number("resyncSeconds", 300, lambda n: n > 0, "at least 1"),
        log_level=getattr(logging, level.upper(), logging.INFO),
        operators=tuple(reader.strings("operators", str)),
        unmanaged=reader.take("unmanaged", bool, False),
        install_cni=reader.take("installCNI", bool, True),
        paths=Paths(
            **{
                name: Path(paths.take(name, str, str(getattr(Paths(), name))))
                for name in Paths.__slots__
            }
        ),
    )
    readers = (reader, maps, xdp, balancer, policy, paths)
    problems = [problem for part in readers for problem in part.finish()]
    problems += [
        f"environment variable {name} is not set"
        for name, value in (("NODE_NAME", config.node), ("POD_NAMESPACE", config.namespace))
        if not value
    ]
    if problems:
        raise ConfigError(source, problems)
    return config


def _node_ports(reader: _Reader) -> NodePortRule:
    def one(value: str) -> Cidr | None:
        return None if value == PRIMARY else parse_cidr(value)

    given = reader.strings("nodePortAddresses", lambda value: (one(value),))
    cidrs = tuple(cidr for (cidr,) in given if cidr is not None)
    if cidrs and len(cidrs) != len(given):
        reader.problem("nodePortAddresses", f"{PRIMARY} stands alone, without CIDRs")
    return NodePortRule(cidrs, primary=bool(given) and not cidrs)


def _maglev_table_size(reader: _Reader) -> int:
    size = reader.number(
        "maglevTableSize",
        MAGLEV_TABLE_SIZE,
        lambda n: n in MAGLEV_RANGE and maglev.is_prime(n),
        f"a prime between {MAGLEV_RANGE.start} and {MAGLEV_RANGE.stop - 1}",
    )
    return size if reader.choice("algorithm", ALGORITHMS, "random") == "maglev" else 0


class _Reader:
    """Takes typed values out of a mapping and remembers what was wrong."""

    def __init__(self, values: Mapping[str, object], prefix: str = "") -> None:
        self._left = dict(values)
        self._prefix = prefix
        self._problems: list[str] = []

    def take(self, key: str, wanted: type[T], default: T) -> T:
        value = self._left.pop(key, default)
        if type(value) is not wanted:  # bool is no number
            self.problem(key, f"{value!r} is not a {wanted.__name__}")
            return default
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        value = self.take(key, str, default)
        if value not in choices:
            self.problem(key, f"{value!r} is none of {', '.join(choices)}")
        return value

    def number(self, key: str, default: int, fits: Callable[[int], bool], wanted: str) -> int:
        value = self.take(key, int, default)
        if not fits(value):
            self.problem(key, f"{value} is not {wanted}")
        return value

    def entries(self, key: str) -> int | None:
        value = self.number(key, 0, lambda n: 0 <= n <= 1 << 24, "between 1 and 16777216")
        return value or None

    def strings(self, key: str, parse_one: Callable[[str], T]) -> list[T]:
        result = []
        values: list[object] = self.take(key, list, [])
        for value in values:
            if not isinstance(value, str) or not value:
                self.problem(key, f"{value!r} is not a text")
                continue
            parsed = self.convert(key, value, parse_one)
            if parsed is not None:
                result.append(parsed)
        return result

    def convert(self, key: str, value: str, parse_one: Callable[[str], T]) -> T | None:
        try:
            return parse_one(value)
        except ValueError as error:
            self.problem(key, str(error))
            return None

    def address(self, key: str, default: str) -> str:
        value = self.take(key, str, default)
        self.convert(key, value, parse)
        return value

    def url(self, key: str) -> str:
        value = self.take(key, str, "")
        if value and not _is_server(value):
            self.problem(key, f"{value!r} is not https://host:port")
        return value.rstrip("/")

    def finish(self) -> list[str]:
        return self._problems + [f"{self._prefix}{key}: is not known" for key in self._left]

    def problem(self, key: str, text: str) -> None:
        self._problems.append(f"{self._prefix}{key}: {text}")


def _is_server(value: str) -> bool:
    try:
        parts = urlsplit(value)
        if parts.port == 0 or parts.scheme not in {"https", "http"} or not parts.hostname:
            return False
        if ":" in parts.hostname:
            ipaddress.ip_address(parts.hostname)
    except ValueError:
        return False
    return True
