# SPDX-License-Identifier: Apache-2.0
"""`make cluster`: from nothing, or from what is left of a crash, to a cluster that works.

Everything hangs off one PID 1 for the control plane and one for each node; `down` and the kernel
need to know no more than that.
"""

import socket
from pathlib import Path

from e2e.cluster import addons, binaries, deploy, down, host, images, kubernetes, pki, store
from e2e.cluster.control_plane import BRIDGE
from e2e.cluster.errors import ClusterError
from e2e.cluster.namespaces import spawn
from e2e.cluster.node import UPLINK
from e2e.cluster.paths import COMPLETE, KUBECONFIG, LOGS, REPOSITORY, SETTINGS, STATE, Place
from e2e.cluster.progress import Progress, wait_for
from e2e.cluster.settings import (
    CONTROL_PLANE,
    Cni,
    KubeProxy,
    NetPol,
    Settings,
    load_settings,
)
from e2e.cluster.shell import tool

_PREFERRED_PORT = 16443
_NAMESPACE_S = 10.0
_API_S = 60.0
_NODES_S = 60.0
_READY_S = 120.0


def up(settings: Settings) -> None:
    """Bring a cluster up; one that is up already with these settings gets Weir rolled out anew."""
    with_router = settings.netpol is NetPol.KUBE_ROUTER
    host.check(("iptables", "ipset") if with_router else ())
    progress = Progress()
    if settings.cni is Cni.WEIR:
        deploy.build_image()
        progress.step("Weir's image is current")
    if is_up():
        running = load_settings(SETTINGS)
        if running != settings:
            raise ClusterError(
                f"another cluster is up: {running.describe()}", "run `make cluster-down` first"
            )
        progress.step("the cluster is up already")
    else:
        folder = binaries.binary_folder()
        wanted = binaries.CLUSTER + (binaries.KUBE_ROUTER if with_router else ())
        binaries.build(wanted, folder)
        archives = images.build(folder)
        _refuse_foreign_cluster()
        down.down(keep_logs=False)
        try:
            filled = store.prepare(archives, folder)
            if settings.cni is Cni.WEIR:
                tag = deploy.reference().rpartition(":")[2]
                filled = store.extend(filled, deploy.IMAGE_ARCHIVE, tag, folder)
            _start(settings, folder, filled, progress)
        except KeyboardInterrupt:
            print("\ninterrupted: taking down what is up", flush=True)
            down.down()
            raise
    if settings.cni is Cni.WEIR:
        deploy.deploy(settings, progress)
    if settings.cni is not Cni.NONE:
        _wait_until_usable(settings, progress)
    _say_how_to_use(settings)


def is_up() -> bool:
    """Whether the whole cluster of this checkout runs; one half up or half dead does not count."""
    if not COMPLETE.exists():
        return False
    names = (CONTROL_PLANE, *load_settings(SETTINGS).node_names)
    return all(host.init_process(name) is not None for name in names)


def _refuse_foreign_cluster() -> None:
    pid = host.init_process(CONTROL_PLANE)
    if pid is None:
        return
    variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
    owner = next((v.partition("=")[2] for v in variables if v.startswith("PYTHONPATH=")), "?")
    if owner != str(REPOSITORY) and Path(owner).exists():
        raise ClusterError(
            f"a cluster of another checkout is up: {owner}",
            f"run `make -C {owner} cluster-down`: there is one cluster a machine",
        )


def _start(settings: Settings, folder: Path, filled: Path, progress: Progress) -> None:
    progress.step(f"starting: {settings.describe()}")
    STATE.mkdir(parents=True, exist_ok=True)
    host.cluster_cgroup().mkdir(exist_ok=True)
    settings.save(SETTINGS)
    listener = _listen()
    pki.create(settings, listener.getsockname()[1])
    with listener:
        arguments = ["init-control-plane", str(folder), str(listener.fileno())]
        control_plane = spawn(Place(CONTROL_PLANE), arguments, (listener.fileno(),))
    for name in settings.node_names:
        root = Place(name).root
        store.copy(filled, root / "var/lib/containerd")
        spawn(Place(name), ["init-node", str(folder), name])
    enter = [f"--target={control_plane}", "--net", "--"]
    wait_for(
        "the underlay bridge",
        lambda: BRIDGE in tool("nsenter", *enter, "ip", "-brief", "link"),
        _NAMESPACE_S,
        LOGS / CONTROL_PLANE / "init.log",
    )
    for name in settings.node_names:
        pid = host.init_process(name)
        link = ["ip", "link", "add", name, "type", "veth", "peer", "name", UPLINK]
        tool("nsenter", *enter, *link, "netns", str(pid))
        tool("nsenter", *enter, "ip", "link", "set", name, "master", BRIDGE, "up")
    progress.step("namespaces and underlay")
    wait_for("the API server is ready", kubernetes.api_is_ready, _API_S, LOGS / CONTROL_PLANE)
    progress.step("API server ready")
    addons.install_coredns(settings)
    wait_for("all nodes have registered and have addresses", lambda: _registered(settings),
             _NODES_S, f"{LOGS}/node*/kubelet.log")  # fmt: skip
    nodes = kubernetes.nodes()
    for index, node in enumerate(nodes):
        zone = f"topology.kubernetes.io/zone=zone{index + 1}"
        kubernetes.kubectl("label", "node", node.name, zone)
        # containerd's CRI runs this plugin itself, whichever CNI is installed.
        addons.copy_plugins(Place(node.name).root, ("loopback",))
    addons.route_pods_from_control_plane(settings, nodes)
    if settings.cni is Cni.BRIDGE:
        addons.install_bridge(settings, nodes)
    COMPLETE.touch()
    progress.step("nodes registered")


def _listen() -> socket.socket:
    """The forwarder's socket, made here in the machine's network namespace."""
    for port in (_PREFERRED_PORT, 0):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            listener.close()
            continue
        listener.listen(128)
        return listener
    raise ClusterError("no free port on 127.0.0.1")


def _registered(settings: Settings) -> bool:
    found = kubernetes.nodes()
    return len(found) == settings.nodes and all(
        len(node.pod_cidrs) == len(settings.networks) for node in found
    )


def _wait_until_usable(settings: Settings, progress: Progress) -> None:
    wait_for(
        "all nodes are Ready",
        lambda: all(node.ready for node in kubernetes.nodes()),
        _READY_S,
        f"{LOGS}/node*/*.log",
    )
    progress.step("nodes Ready")
    if settings.cni is not Cni.WEIR and settings.kube_proxy is KubeProxy.NONE:
        progress.step("CoreDNS stays away: nothing carries the API server's Service")
        return
    wait_for(
        "CoreDNS is available",
        lambda: kubernetes.is_available("kube-system", "coredns"),
        _READY_S,
        "`kubectl -n kube-system describe pods`",
    )
    progress.step("CoreDNS ready")


def _say_how_to_use(settings: Settings) -> None:
    kubectl = binaries.binary_folder() / "kubectl"
    weir = settings.cni is Cni.WEIR
    print(
        f"\nkubeconfig: {KUBECONFIG}\n"
        f"  export KUBECONFIG={KUBECONFIG} PATH=$PATH:{kubectl.parent}\n"
        "  kubectl get nodes,pods -A -o wide\n"
        + ("  kubectl apply -f examples/\n  .venv/bin/weir status\n" if weir else "")
        + "down again: make cluster-down",
        flush=True,
    )
