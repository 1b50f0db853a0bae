# SPDX-License-Identifier: Apache-2.0
"""What a cluster gets beside its CNI plugin: CoreDNS; and the baseline CNI to measure against."""

import ipaddress
import json
import shutil
import string
from pathlib import Path

from e2e.cluster import kubernetes, namespaces
from e2e.cluster.images import COREDNS_IMAGE
from e2e.cluster.node import UPLINK
from e2e.cluster.paths import Place
from e2e.cluster.settings import CLUSTER_DOMAIN, CONTROL_PLANE, Settings
from e2e.cluster.shell import tool

PLUGINS = Path("/usr/lib/cni")
_COREDNS = Path(__file__).with_name("coredns.yaml")


def install_coredns(settings: Settings) -> None:
    """Create CoreDNS under the address that the kubelets give to pods."""
    addresses = [network.dns for network in settings.networks]
    manifest = string.Template(_COREDNS.read_text()).safe_substitute(
        image=COREDNS_IMAGE,
        domain=CLUSTER_DOMAIN,
        address=addresses[0],
        addresses=json.dumps(addresses),
    )
    kubernetes.kubectl("apply", "--filename=-", text=manifest)


def copy_plugins(root: Path, names: tuple[str, ...]) -> None:
    """Put reference CNI plugins into a node."""
    for name in names:
        shutil.copy(PLUGINS / name, root / "opt/cni/bin" / name)


def route_pods_from_control_plane(settings: Settings, nodes: list[kubernetes.Node]) -> None:
    """Let the API server reach pods, as one on a node could: each range via its node."""
    for node in nodes:
        _route(CONTROL_PLANE, settings, node)


def install_bridge(settings: Settings, nodes: list[kubernetes.Node]) -> None:
    """The baseline: Debian's bridge and host-local plugins, routes between nodes, masquerade."""
    for node in nodes:
        root = Place(node.name).root
        copy_plugins(root, ("bridge", "host-local", "portmap"))
        for other in nodes:
            if other != node:
                _route(node.name, settings, other)
        tool(*namespaces.entered(node.name, ["nft", "-f", "-"]), text=_masquerade(settings))
        target = root / "etc/cni/net.d/10-bridge.conflist"
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(_bridge_config(settings, node), indent=2) + "\n")
        partial.rename(target)


def _bridge_config(settings: Settings, node: kubernetes.Node) -> dict[str, object]:
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": cidr}] for cidr in node.pod_cidrs],
        "routes": [{"dst": network.default} for network in settings.networks],
    }
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "hairpinMode": True,
        "ipam": ipam,
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "baseline", "plugins": [bridge, portmap]}


def _masquerade(settings: Settings) -> str:
    """Pods leave the cluster by their node's address. The bridge plugin's own masquerade would
    also hide pods from pods of other nodes."""
    lines = ["table inet baseline {", "chain postrouting {"]
    lines.append("type nat hook postrouting priority srcnat;")
    for network in settings.networks:
        kind = "ip6" if ":" in network.pod_cidr else "ip"
        pods = network.pod_cidr
        lines.append(f"{kind} saddr {pods} {kind} daddr != {pods} oifname {UPLINK} masquerade")
    return "\n".join([*lines, "}", "}", ""])


def _route(place: str, settings: Settings, node: kubernetes.Node) -> None:
    addresses = {":" in address: address for address in settings.node_addresses(node.name)}
    for cidr in node.pod_cidrs:
        six = ipaddress.ip_network(cidr).version == 6
        route = ["ip", "-6" if six else "-4", "route", "replace", cidr, "via", addresses[six]]
        tool(*namespaces.entered(place, route, only_network=True))
