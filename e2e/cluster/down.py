# SPDX-License-Identifier: Apache-2.0
"""`make cluster-down`, from any state, and the check that nothing is left."""

import os
import re
import shutil
from pathlib import Path

from e2e.cluster import host
from e2e.cluster.paths import COMPLETE, ETCD, KUBECONFIG, LOGS, NODES, PKI, RUN, SETTINGS, STATE
from e2e.cluster.shell import tool

_FILES = (COMPLETE, SETTINGS, KUBECONFIG)
_FOLDERS = (NODES, ETCD, PKI, RUN)
_LINKS = re.compile(r"^\d+: (underlay|node\d+|cni0|weir[\w.-]*)[@:]", re.MULTILINE)
_NFT_TABLES = re.compile(r"^table \w+ ((?:kube-proxy|baseline|weir)\b.*)$", re.MULTILINE)
_PINS = Path("/sys/fs/bpf/weir")


def down(keep_logs: bool = True) -> None:
    """Remove every trace of the cluster but its logs and the images of the next one.

    Killing all in the cgroup ends the namespaces, and those take their mounts, links and pins
    with them.
    """
    host.remove_cgroup(host.cluster_cgroup())
    for target in sorted(_mounts(), reverse=True):  # only if made outside of a node's namespaces
        tool("umount", "--lazy", target)
    for folder in _FOLDERS if keep_logs else (*_FOLDERS, LOGS):
        if folder.exists():
            shutil.rmtree(folder)
    for file in _FILES:
        file.unlink(missing_ok=True)


def leftovers() -> list[str]:
    """What of a cluster is still on the machine, one line each; nothing after `down`."""
    found: list[str] = []
    cgroup = host.cluster_cgroup()
    if cgroup.exists():
        found.append(f"cgroup {cgroup} with processes {host.processes(cgroup)}")
    found += [f"process {pid}: {command}" for pid, command in _processes()]
    found += [f"mount {target}" for target in _mounts()]
    found += [f"link {name}" for name in _LINKS.findall(tool("ip", "-oneline", "link"))]
    found += [f"nftables {table}" for table in _NFT_TABLES.findall(tool("nft", "list", "tables"))]
    if _PINS.exists():
        found.append(f"BPF pins in {_PINS}")
    found += [f"file {path}" for path in (*_FILES, *_FOLDERS) if path.exists()]
    return found


def _processes() -> list[tuple[int, str]]:
    """Processes that were started by a cluster: they name its state or its code."""
    marks = (f"{STATE}/", "e2e.cluster\0init-", "e2e.cluster.forwarder", "/opt/kube/bin/")
    found: list[tuple[int, str]] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_text(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if any(mark in command for mark in marks):
            found.append((int(entry.name), command.replace("\0", " ").strip()))
    return found


def _mounts() -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    targets = [line.split()[1] for line in lines]
    return [target for target in targets if target.startswith(f"{STATE}/")]
