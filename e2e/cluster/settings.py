# SPDX-License-Identifier: Apache-2.0
"""What kind of cluster is wanted, and the addresses that follow from it. No I/O but JSON files."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from e2e.cluster.errors import ClusterError

CONTROL_PLANE = "control-plane"
API_PORT = 6443
CLUSTER_DOMAIN = "cluster.local"
MAX_NODES = 20
_Choice = TypeVar("_Choice", bound=StrEnum)
_FIRST_NODE_ADDRESS = 10  # node1 is .11 and ::11


class Routing(StrEnum):
    """How Weir carries packets between nodes; the other CNI choices ignore it."""

    VXLAN = "vxlan"
    NATIVE = "native"


class IpFamily(StrEnum):
    """The address families of pods, Services, nodes and the underlay."""

    DUAL = "dual"
    IPV4 = "ipv4"
    IPV6 = "ipv6"


class Cni(StrEnum):
    """`bridge` is the baseline to measure against; `none` leaves the nodes NotReady."""

    WEIR = "weir"
    BRIDGE = "bridge"
    NONE = "none"


class KubeProxy(StrEnum):
    """The mode of the real kube-proxy, or none."""

    NONE = "none"
    IPTABLES = "iptables"
    NFTABLES = "nftables"


class NetPol(StrEnum):
    """Who enforces NetworkPolicy for a CNI choice that does not do so itself."""

    NONE = "none"
    KUBE_ROUTER = "kube-router"


@dataclass(frozen=True, slots=True)
class Network:
    """The addresses of one family."""

    family: IpFamily
    underlay_prefix: str
    underlay_bits: int
    gateway: str
    pod_cidr: str
    service_cidr: str
    dns: str
    api_service: str
    default: str

    def node(self, index: int) -> str:
        """The underlay address of the node with this number, from 1."""
        return f"{self.underlay_prefix}{_FIRST_NODE_ADDRESS + index}"


# Each node gets a /24 and a /64 of the pod ranges, the controller-manager's defaults.
IPV4 = Network(
    family=IpFamily.IPV4,
    underlay_prefix="172.30.0.",
    underlay_bits=24,
    gateway="172.30.0.1",
    pod_cidr="10.244.0.0/16",
    service_cidr="10.96.0.0/16",
    dns="10.96.0.10",
    api_service="10.96.0.1",
    default="0.0.0.0/0",
)
IPV6 = Network(
    family=IpFamily.IPV6,
    underlay_prefix="fd30::",
    underlay_bits=64,
    gateway="fd30::1",
    pod_cidr="fd44::/56",
    service_cidr="fd96::/112",
    dns="fd96::a",
    api_service="fd96::1",
    default="::/0",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """One cluster, as the variables of `make cluster` describe it."""

    nodes: int = 2
    routing: Routing = Routing.VXLAN
    ip_family: IpFamily = IpFamily.DUAL
    cni: Cni = Cni.WEIR
    kube_proxy: KubeProxy = KubeProxy.NONE
    netpol: NetPol = NetPol.NONE

    @property
    def networks(self) -> tuple[Network, ...]:
        """The families in use, the primary one first."""
        both = (IPV4, IPV6)
        return tuple(n for n in both if self.ip_family in (IpFamily.DUAL, n.family))

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node{index}" for index in range(1, self.nodes + 1))

    def node_addresses(self, name: str) -> tuple[str, ...]:
        index = self.node_names.index(name) + 1
        return tuple(network.node(index) for network in self.networks)

    @property
    def api_host(self) -> str:
        """The control plane's address on the underlay, as it stands in a URL."""
        gateway = self.networks[0].gateway
        return f"[{gateway}]" if ":" in gateway else gateway

    def pod_cidrs(self) -> str:
        return ",".join(network.pod_cidr for network in self.networks)

    def service_cidrs(self) -> str:
        return ",".join(network.service_cidr for network in self.networks)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    def describe(self) -> str:
        return (
            f"NODES={self.nodes} ROUTING={self.routing} IPFAMILY={self.ip_family}"
            f" CNI={self.cni} KUBE_PROXY={self.kube_proxy} NETPOL={self.netpol}"
        )


def parse_settings(values: Mapping[str, str]) -> Settings:
    """Settings from make's variables; an empty or absent one is the default.

    All bad values are reported together.
    """
    default = Settings()
    problems: list[str] = []
    nodes = values.get("NODES") or str(default.nodes)
    if not nodes.isdecimal() or not 1 <= int(nodes) <= MAX_NODES:
        problems.append(f"NODES={nodes} is not a number from 1 to {MAX_NODES}")
        nodes = "1"
    settings = Settings(
        nodes=int(nodes),
        routing=_choice(values, "ROUTING", default.routing, problems),
        ip_family=_choice(values, "IPFAMILY", default.ip_family, problems),
        cni=_choice(values, "CNI", default.cni, problems),
        kube_proxy=_choice(values, "KUBE_PROXY", default.kube_proxy, problems),
        netpol=_choice(values, "NETPOL", default.netpol, problems),
    )
    if settings.netpol is not NetPol.NONE and settings.cni is not Cni.BRIDGE:
        problems.append(f"NETPOL={settings.netpol} goes with CNI=bridge only")
    if problems:
        raise ClusterError("; ".join(problems), "see `make help`")
    return settings


def load_settings(path: Path) -> Settings:
    """The settings that `Settings.save` wrote."""
    stored = json.loads(path.read_text())
    return Settings(
        nodes=int(stored["nodes"]),
        routing=Routing(stored["routing"]),
        ip_family=IpFamily(stored["ip_family"]),
        cni=Cni(stored["cni"]),
        kube_proxy=KubeProxy(stored["kube_proxy"]),
        netpol=NetPol(stored.get("netpol", NetPol.NONE)),
    )


def _choice(values: Mapping[str, str], name: str, default: _Choice, problems: list[str]) -> _Choice:
    given = values.get(name) or default.value
    try:
        return type(default)(given)
    except ValueError:
        allowed = ", ".join(member.value for member in type(default))
        problems.append(f"{name}={given} is not one of {allowed}")
        return default
