# SPDX-License-Identifier: Apache-2.0
"""The configuration files of a node's components, as text. JSON where they take YAML."""

import json
from pathlib import Path

from e2e.cluster.binaries import RUNC_WRAPPER
from e2e.cluster.settings import CLUSTER_DOMAIN, Cni, IpFamily, KubeProxy, Settings

BINARIES = "/opt/kube/bin"
CONTAINERD = "/etc/containerd/config.toml"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
KUBELET = "/etc/kubernetes/kubelet.json"
KUBE_PROXY = "/etc/kubernetes/kube-proxy.json"
KUBE_ROUTER = "/etc/kubernetes/kube-router.conf"
WEIR_TAINT = "node.weir.dev/agent-not-ready"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10.2"

# restrict_oom_score_adj: a root without CAP_SYS_RESOURCE cannot go below its own score.
_CONTAINERD_CONFIG = f"""\
version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      BinaryName = "{BINARIES}/{RUNC_WRAPPER}"
      SystemdCgroup = false
"""


def write(etc: Path, name: str, settings: Settings) -> None:
    """Write a node's configuration files below its /etc."""
    root = etc.parent
    files = {CONTAINERD: _CONTAINERD_CONFIG, KUBELET: _kubelet(settings)}
    if settings.kube_proxy is not KubeProxy.NONE:
        files[KUBE_PROXY] = _kube_proxy(name, settings)
    for path, text in files.items():
        target = root / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


def _kubelet(settings: Settings) -> str:
    pki = "/etc/kubernetes/pki"
    config: dict[str, object] = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{pki}/kubelet.crt",
        "tlsPrivateKeyFile": f"{pki}/kubelet.key",
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [network.dns for network in settings.networks],
        "resolvConf": "/etc/resolv.conf",
        # Its default is in /usr, which is the machine's.
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        "maxPods": 110,
        "serializeImagePulls": False,
        # The images cannot be pulled again: never collect them.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
        },
    }
    if settings.cni is Cni.WEIR:
        # As on a cluster whose nodes must not get pods before their network is there; the operator
        # takes it off.
        config["registerWithTaints"] = [{"key": WEIR_TAINT, "effect": "NoSchedule"}]
    return json.dumps(config, indent=2) + "\n"


def _kube_proxy(name: str, settings: Settings) -> str:
    config = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": settings.kube_proxy.value,
        "clientConnection": {"kubeconfig": "/etc/kubernetes/kube-proxy.conf"},
        "clusterCIDR": settings.pod_cidrs(),
        "hostnameOverride": name,
        # The machine's conntrack table is not ours to size.
        "conntrack": {"maxPerCore": 0, "min": 0},
    }
    return json.dumps(config, indent=2) + "\n"


def kube_router_flags(name: str, settings: Settings) -> tuple[str, ...]:
    """Its firewall alone: pods and Services are wired by others."""
    families = {network.family for network in settings.networks}
    return (
        "--run-firewall=true",
        "--run-router=false",
        "--run-service-proxy=false",
        f"--kubeconfig={KUBE_ROUTER}",
        f"--hostname-override={name}",
        f"--service-cluster-ip-range={settings.service_cidrs()}",
        f"--enable-ipv4={str(IpFamily.IPV4 in families).lower()}",
        f"--enable-ipv6={str(IpFamily.IPV6 in families).lower()}",
    )
