# SPDX-License-Identifier: Apache-2.0
"""What runs as PID 1 of the control plane's namespaces: the underlay bridge, etcd and the API.

The bridge of the underlay is in here and not on the machine, whose network stays as it is. The
nodes' default route ends here too, so this is also the place outside of the cluster from which
tests reach nodes and see masqueraded traffic.
"""

import os
import socket
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

from e2e.cluster.paths import ETCD, PKI, REPOSITORY, Place
from e2e.cluster.settings import API_PORT, CONTROL_PLANE, Settings
from e2e.cluster.shell import sysctl, tool
from e2e.cluster.supervisor import Component, supervise

BRIDGE = "underlay"
_ETCD_URL = "http://127.0.0.1:2379"
_PEER_URL = "http://127.0.0.1:2380"


def run(settings: Settings, binaries: Path, listener: int) -> NoReturn:
    """Set up the namespaces that this process is PID 1 of, and supervise the control plane."""
    os.set_inheritable(listener, False)
    socket.sethostname(CONTROL_PLANE)
    tool("mount", "-t", "sysfs", "sysfs", "/sys")
    _make_underlay(settings)
    ETCD.mkdir(parents=True, exist_ok=True)
    place = Place(CONTROL_PLANE)
    supervise(_components(settings, binaries, listener), place.log, place.run)


def _make_underlay(settings: Settings) -> None:
    tool("ip", "link", "set", "lo", "up")
    tool("ip", "link", "add", BRIDGE, "type", "bridge")
    tool("ip", "link", "set", BRIDGE, "up")
    for network in settings.networks:
        nodad = ["nodad"] if ":" in network.gateway else []
        address = f"{network.gateway}/{network.underlay_bits}"
        tool("ip", "address", "add", address, "dev", BRIDGE, *nodad)
        # Some components look for a default route to find their address.
        family = "-6" if ":" in network.gateway else "-4"
        tool("ip", family, "route", "add", "default", "dev", BRIDGE)
    sysctl("net/ipv4/ip_forward", "1")
    sysctl("net/ipv6/conf/all/forwarding", "1")


def _components(settings: Settings, binaries: Path, listener: int) -> list[Component]:
    environment = {"PATH": os.environ["PATH"], "HOME": "/root"}
    python = {**environment, "PYTHONPATH": str(REPOSITORY)}
    loopback = "127.0.0.1" if ":" not in settings.networks[0].gateway else "::1"
    forwarder = (sys.executable, "-m", "e2e.cluster.forwarder", loopback, str(API_PORT))

    def component(name: str, *flags: str, wait: bool = True) -> Component:
        command = (str(binaries / name), *flags)
        if wait:  # before its bootstrap roles exist a controller-manager would exit
            return Component(name, command, environment, _api_is_ready)
        return Component(name, command, environment)

    return [
        component("etcd", *_etcd_flags(), wait=False),
        component("kube-apiserver", *_api_flags(settings), wait=False),
        Component("forwarder", forwarder, python, inherit=listener),
        component("kube-controller-manager", *_controller_flags(settings)),
        component("kube-scheduler", *_kubeconfig_flags("kube-scheduler")),
    ]


def _etcd_flags() -> tuple[str, ...]:
    return (
        f"--name={CONTROL_PLANE}",
        f"--data-dir={ETCD}",
        "--unsafe-no-fsync",  # survives a killed process, which is all that tests do
        f"--listen-client-urls={_ETCD_URL}",
        f"--advertise-client-urls={_ETCD_URL}",
        f"--listen-peer-urls={_PEER_URL}",
        f"--initial-advertise-peer-urls={_PEER_URL}",
        f"--initial-cluster={CONTROL_PLANE}={_PEER_URL}",
        "--log-level=warn",
    )


def _api_flags(settings: Settings) -> tuple[str, ...]:
    gateway = settings.networks[0].gateway
    return (
        f"--etcd-servers={_ETCD_URL}",
        f"--advertise-address={gateway}",
        f"--bind-address={'::' if ':' in gateway else '0.0.0.0'}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={settings.service_cidrs()}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        f"--client-ca-file={PKI}/ca.crt",
        f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key",
        f"--kubelet-client-certificate={PKI}/apiserver-kubelet.crt",
        f"--kubelet-client-key={PKI}/apiserver-kubelet.key",
        f"--kubelet-certificate-authority={PKI}/ca.crt",
        "--kubelet-preferred-address-types=InternalIP",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={PKI}/sa.pub",
        f"--service-account-signing-key-file={PKI}/sa.key",
        f"--requestheader-client-ca-file={PKI}/ca.crt",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        f"--proxy-client-cert-file={PKI}/front-proxy.crt",
        f"--proxy-client-key-file={PKI}/front-proxy.key",
        "--enable-aggregator-routing=true",
    )


def _controller_flags(settings: Settings) -> tuple[str, ...]:
    return (
        *_kubeconfig_flags("kube-controller-manager"),
        "--allocate-node-cidrs=true",
        f"--cluster-cidr={settings.pod_cidrs()}",
        f"--service-cluster-ip-range={settings.service_cidrs()}",
        "--use-service-account-credentials",
        f"--root-ca-file={PKI}/ca.crt",
        f"--service-account-private-key-file={PKI}/sa.key",
        f"--cluster-signing-cert-file={PKI}/ca.crt",
        f"--cluster-signing-key-file={PKI}/ca.key",
        # Its default is in the machine's /usr.
        f"--flex-volume-plugin-dir={Place(CONTROL_PLANE).run}/volume-plugins",
    )


def _kubeconfig_flags(name: str) -> tuple[str, ...]:
    config = f"{PKI}/{name}.conf"
    flags = ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
    return (*(f"--{flag}={config}" for flag in flags), "--leader-elect=false")


def _api_is_ready() -> bool:
    context = ssl.create_default_context(cafile=str(PKI / "ca.crt"))
    url = f"https://localhost:{API_PORT}/readyz"
    try:
        with urllib.request.urlopen(url, timeout=1, context=context) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
