# SPDX-License-Identifier: Apache-2.0
"""What runs as PID 1 of a node's namespaces: its file system, its network, containerd, kubelet.

A node has a root file system of its own: the machine's /usr and /dev, a copy of its /etc, and
folders below build/cluster for the rest. So hostPath volumes work unchanged and nothing that pods
write reaches the machine.
"""

import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

from e2e.cluster import nodeconfig
from e2e.cluster.namespaces import NODE_PATH
from e2e.cluster.paths import PKI, Place
from e2e.cluster.settings import KubeProxy, NetPol, Settings
from e2e.cluster.shell import sysctl, tool
from e2e.cluster.supervisor import Component, supervise

UPLINK = "eth0"
_LOGS = Path("/var/log/cluster")
_RUN = Path("/run/cluster")
# kubelet sets these for the whole machine, unless it finds the values that it wants.
_KUBELET_SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
_FOLDERS = (
    *("dev", "proc", "sys", "run", "tmp", "mnt", "media", "srv", "home", "root", "usr", "etc"),
    *("var/lib/containerd", "var/lib/kubelet", "var/lib/cni", "var/log/pods"),
    *("var/log/containers", "var/log/cluster", "var/tmp", "var/cache"),
    *("opt/cni/bin", "opt/kube/bin", "etc/cni/net.d", "etc/kubernetes/pki", "old-root"),
)


def run(name: str, settings: Settings, binaries: Path) -> NoReturn:
    """Set up the namespaces that this process is PID 1 of, and supervise the node."""
    socket.sethostname(name)
    _fill_root(Place(name).root, name, settings)
    _enter_root(Place(name), binaries)
    _mount_kernel_file_systems()
    _hide_machine_sysctls()
    # kubelet and runc want shared propagation; it ends at this mount namespace.
    tool("mount", "--make-rshared", "/")
    _set_up_network(name, settings)
    supervise(_components(name, settings), _LOGS, _RUN)


def _fill_root(root: Path, name: str, settings: Settings) -> None:
    shutil.copytree("/etc", root / "etc", symlinks=True, dirs_exist_ok=True, ignore=_not_for_a_node)
    for folder in _FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    for link in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if Path("/", link).is_symlink():  # a merged /usr
            (root / link).symlink_to(Path("/", link).readlink())
    (root / "var/run").symlink_to("/run")
    etc = root / "etc"
    (etc / "resolv.conf").unlink(missing_ok=True)
    (etc / "resolv.conf").write_text("")
    (etc / "hostname").write_text(f"{name}\n")
    hosts = ["127.0.0.1 localhost", "::1 localhost"]
    hosts += [f"{address} {name}" for address in settings.node_addresses(name)]
    (etc / "hosts").write_text("\n".join(hosts) + "\n")
    # A node has its own name only; two machines with one id confuse whatever asks for it.
    (etc / "machine-id").write_text(f"{settings.node_names.index(name) + 1:032x}\n")
    kubernetes = etc / "kubernetes"
    shutil.copy(PKI / f"{name}.conf", kubernetes / "kubelet.conf")
    for source, target in (
        ("ca.crt", "ca.crt"),
        (f"{name}-serving.crt", "kubelet.crt"),
        (f"{name}-serving.key", "kubelet.key"),
    ):
        shutil.copy(PKI / source, kubernetes / "pki" / target)
    if settings.kube_proxy is not KubeProxy.NONE:
        shutil.copy(PKI / "kube-proxy.conf", kubernetes / "kube-proxy.conf")
    if settings.netpol is NetPol.KUBE_ROUTER:
        shutil.copy(PKI / "kube-router.conf", root / nodeconfig.KUBE_ROUTER.lstrip("/"))
    nodeconfig.write(etc, name, settings)


def _not_for_a_node(folder: str, entries: list[str]) -> set[str]:
    """Leave out what belongs to the machine: its CNI and Kubernetes configuration, its secrets."""
    if folder == "/etc":
        return {"cni", "kubernetes", "containerd", "ssh", "shadow", "shadow-", "mtab"} & {*entries}
    return set()


def _enter_root(place: Place, binaries: Path) -> None:
    root = place.root
    tool("mount", "--bind", str(root), str(root))
    tool("mount", "--bind", "-o", "ro", "/usr", str(root / "usr"))
    tool("mount", "--rbind", "/dev", str(root / "dev"))
    tool("mount", "--bind", "-o", "ro", str(binaries), str(root / "opt/kube/bin"))
    tool("mount", "-t", "proc", "proc", str(root / "proc"))
    tool("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(root / "run"))
    for folder in ("run/cluster", "run/netns", "run/lock", "run/containerd"):
        (root / folder).mkdir()
    tool("mount", "--bind", str(place.run), str(root / "run/cluster"))
    tool("mount", "--bind", str(place.log), str(root / "var/log/cluster"))
    if not Path(sys.base_prefix).is_relative_to("/usr"):
        # This very process goes on in there and imports as it needs.
        python = root / sys.base_prefix.lstrip("/")
        python.mkdir(parents=True, exist_ok=True)
        tool("mount", "--bind", "-o", "ro", sys.base_prefix, str(python))
    os.chdir(root)
    tool("pivot_root", ".", "old-root")
    os.chroot(".")
    os.chdir("/")
    tool("umount", "--lazy", "/old-root")
    Path("/old-root").rmdir()


def _mount_kernel_file_systems() -> None:
    tool("mount", "-t", "sysfs", "sysfs", "/sys")
    # Rooted at this node's cgroup; no controllers on any machine, so all nodes are alike.
    tool("mount", "-t", "cgroup2", "cgroup2", "/sys/fs/cgroup")
    tool("mount", "-t", "bpf", "bpf", "/sys/fs/bpf")


def _hide_machine_sysctls() -> None:
    folder = Path("/run/sysctl")
    folder.mkdir()
    for name, value in _KUBELET_SYSCTLS.items():
        target = Path("/proc/sys", name)
        if target.exists():
            cover = folder / name.replace("/", ".")
            cover.write_text(f"{value}\n")
            tool("mount", "--bind", str(cover), str(target))


def _set_up_network(name: str, settings: Settings) -> None:
    tool("ip", "link", "set", "lo", "up")
    while not Path("/sys/class/net", UPLINK).exists():  # the machine's side puts it here
        time.sleep(0.02)
    for network, address in zip(settings.networks, settings.node_addresses(name), strict=True):
        nodad = ["nodad"] if ":" in address else []
        prefix = f"{address}/{network.underlay_bits}"
        tool("ip", "address", "add", prefix, "dev", UPLINK, *nodad)
    tool("ip", "link", "set", UPLINK, "up")
    for network in settings.networks:
        family = "-6" if ":" in network.gateway else "-4"
        tool("ip", family, "route", "add", "default", "via", network.gateway, "dev", UPLINK)
    sysctl("net/ipv4/ip_forward", "1")
    sysctl("net/ipv6/conf/all/forwarding", "1")
    for scope in ("all", "default"):
        sysctl(f"net/ipv4/conf/{scope}/rp_filter", "0")
    if settings.netpol is NetPol.KUBE_ROUTER:
        # Else iptables sees nothing of what the bridge forwards between two pods of the node.
        for tables in ("iptables", "ip6tables"):
            sysctl(f"net/bridge/bridge-nf-call-{tables}", "1")


def _components(name: str, settings: Settings) -> list[Component]:
    environment = {"PATH": NODE_PATH, "HOME": "/root"}
    addresses = ",".join(settings.node_addresses(name))
    containerd = (f"{nodeconfig.BINARIES}/containerd", "--config", nodeconfig.CONTAINERD)
    kubelet = (
        f"{nodeconfig.BINARIES}/kubelet",
        f"--config={nodeconfig.KUBELET}",
        "--kubeconfig=/etc/kubernetes/kubelet.conf",
        f"--node-ip={addresses}",
        f"--hostname-override={name}",
    )
    components = [
        Component("containerd", containerd, environment),
        Component("kubelet", kubelet, environment, Path(nodeconfig.CONTAINERD_SOCKET).exists),
    ]
    if settings.kube_proxy is not KubeProxy.NONE:
        proxy = (f"{nodeconfig.BINARIES}/kube-proxy", f"--config={nodeconfig.KUBE_PROXY}")
        components.append(Component("kube-proxy", proxy, environment))
    if settings.netpol is NetPol.KUBE_ROUTER:  # it ends, and is started again, until it is a node
        flags = nodeconfig.kube_router_flags(name, settings)
        router = (f"{nodeconfig.BINARIES}/kube-router", *flags)
        components.append(Component("kube-router", router, environment))
    return components
