# SPDX-License-Identifier: Apache-2.0
"""Build the images that every node has, without a registry: tars in `docker save` format.

The programs come from the machine's own packages, with the shared libraries that they need, and
from the Kubernetes binaries. The tars are kept in the cache, in a folder named by their recipe.
"""

import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.cluster.host import SETUP
from e2e.cluster.nodeconfig import PAUSE_IMAGE
from e2e.cluster.shell import tool

_E2E = "registry.k8s.io/e2e-test-images"
COREDNS_IMAGE = f"registry.k8s.io/coredns/coredns:{binaries.COREDNS}"
AGNHOST_IMAGE = f"{_E2E}/agnhost:2.63.0"  # as test/utils/image/manifest.go of that version says
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
# dash and wget also replace busybox' own: its shell prefers its applets to programs in PATH, and
# Debian's busybox dies of `wget -T`.
_SHELL_TOOLS = ("busybox", "dash", "wget")
_TOOLS = (
    *_SHELL_TOOLS,
    *("bash", "curl", "dig", "nslookup", "nc", "ip", "ss", "iperf", "ping", "hostname", "getent"),
    *("tcpdump", "conntrack", "iptables", "nft", "ipcs", "socat"),
)
_TEXT = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
    "user-defined-in-image:x:1000:1000::/home:/bin/sh\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\n"
    "group-defined-in-image:x:50000:user-defined-in-image\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
_FOLDERS = {"tmp": 0o1777, "root": 0o700, "proc": 0o755, "sys": 0o755, "dev": 0o755, "run": 0o755,
            "var/run": 0o755, "var/log": 0o755}  # fmt: skip


@dataclass(slots=True)
class Layer:
    """The content of one image layer, by path without a leading slash."""

    files: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)

    def tar(self) -> bytes:
        """The layer as a tar, the same bytes for the same content."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for path, mode in sorted(self._all_folders().items()):
                entry = tarfile.TarInfo(path)
                entry.type, entry.mode = tarfile.DIRTYPE, mode
                archive.addfile(entry)
            for path, source in sorted(self.files.items()):
                _add(archive, path, source.read_bytes(), 0o755)
            for path, text in sorted(self.texts.items()):
                _add(archive, path, text.encode(), 0o644)
            for path, target in sorted(self.links.items()):
                entry = tarfile.TarInfo(path)
                entry.type, entry.linkname = tarfile.SYMTYPE, target
                archive.addfile(entry)
        return buffer.getvalue()

    def _all_folders(self) -> dict[str, int]:
        parents: dict[str, int] = {}
        for path in (*self.files, *self.texts, *self.links, *self.folders):
            parents |= {str(parent): 0o755 for parent in Path(path).parents if parent.name}
        return parents | self.folders


@dataclass(frozen=True, slots=True)
class Image:
    """An image: its tar's name, its tags, its layers and how it starts."""

    name: str
    tags: tuple[str, ...]
    layers: tuple[Layer, ...]
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def build(binary_folder: Path) -> list[Path]:
    """The tars of all images; built when the cache lacks them."""
    recipe = hashlib.sha256(Path(__file__).read_bytes())
    recipe.update(f"{binaries.KUBERNETES} {PAUSE_IMAGE}".encode())
    folder = binaries.cache_folder() / "images" / recipe.hexdigest()[:16]
    if not folder.exists():
        print(f"building the images of the nodes into {folder}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            partial = Path(work) / "images"
            partial.mkdir()
            for image in _images(binary_folder, Path(work)):
                _write(image, partial / f"{image.name}.tar")
            partial.rename(folder)
    return sorted(folder.glob("*.tar"))


def _images(binary_folder: Path, work: Path) -> list[Image]:
    source = binaries.module_folder("k8s.io/kubernetes", binaries.KUBERNETES)
    porter = source / "test/images/agnhost/porter"
    busybox = _busybox(work)
    small = _tool_layer(_SHELL_TOOLS, busybox)
    large = _tool_layer(_TOOLS, busybox)
    pause = work / "pause"
    tool("cc", "-static", "-Os", "-s", "-o", str(pause), str(source / "build/pause/linux/pause.c"))
    coredns = Layer(files={"coredns": binary_folder / "coredns"})
    agnhost = Layer(
        files={"agnhost": binary_folder / "agnhost"},
        texts={name: (porter / name).read_text() for name in ("localhost.crt", "localhost.key")},
        links={"agnhost-2": "agnhost", "usr/local/bin/iperf": "/usr/bin/iperf"},
        folders={"uploads": 0o777, "var/registry": 0o755},
    )
    issue = "regression-issue-74839"
    return [
        Image("pause", (PAUSE_IMAGE,), (Layer(files={"pause": pause}),), ("/pause",)),
        Image(
            "busybox",
            (
                *(f"{_E2E}/busybox:{tag}" for tag in ("1.37.0-1", "1.36.1-1")),
                *(f"docker.io/library/busybox:{tag}" for tag in ("1.36", "1.37", "latest")),
            ),
            (small,),
            command=("sh",),
        ),
        Image("coredns", (COREDNS_IMAGE,), (coredns,), ("/coredns",)),
        Image(
            "agnhost",
            # 2.55: the suite's older tests; 2.45: ClusterNetworkPolicy's conformance
            (AGNHOST_IMAGE, *(f"{_E2E}/agnhost:{tag}" for tag in ("2.55", "2.45"))),
            (large, coredns, agnhost),
            ("/agnhost",),
            ("pause",),
        ),
        Image(
            "glibc-dns-testing",
            (f"{_E2E}/glibc-dns-testing:2.0.0",),
            (large, coredns),
            command=("bash",),
        ),
        Image(
            "distroless-iptables",
            ("registry.k8s.io/build-image/distroless-iptables:v0.9.1",),
            (large,),
            command=("bash",),
        ),
        Image(
            issue,
            (f"{_E2E}/{issue}:1.4",),
            (Layer(files={issue: binary_folder / issue}),),
            (f"/{issue}",),
        ),
    ]


def _busybox(work: Path) -> Path:
    """Debian's dynamic busybox. Not installed: its package conflicts with the static one, whose
    name resolution crashes."""
    try:
        # apt's own unprivileged user could not write into our folder
        download = ("apt-get", "download", "--quiet", "-o", "APT::Sandbox::User=root", "busybox")
        subprocess.run(download, cwd=work, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ClusterError("cannot download the package busybox", "run `apt-get update`") from error
    package = next(work.glob("busybox_*.deb"))
    tool("dpkg-deb", "--extract", str(package), str(work / "busybox"))
    found = [path for path in work.glob("busybox/**/busybox") if os.access(path, os.X_OK)]
    return next(path for path in found if path.is_file())


def _tool_layer(names: tuple[str, ...], busybox: Path) -> Layer:
    layer = Layer(texts=dict(_TEXT), folders=dict(_FOLDERS))
    for folder in ("bin", "sbin", "lib", "lib64"):
        layer.links[folder] = f"usr/{folder}"
        layer.folders[f"usr/{folder}"] = 0o755
    for name in names:
        path = busybox if name == "busybox" else _which(name)
        layer.files[f"usr/bin/{name}"] = path.resolve()
        for word in tool("ldd", str(path)).split():
            if word.startswith("/"):
                library = Path(word)
                layer.files[str(library.parent.resolve() / library.name).lstrip("/")] = library
    for applet in tool(str(busybox), "--list").split():
        if f"usr/bin/{applet}" not in layer.files and applet != "sh":
            layer.links[f"usr/bin/{applet}"] = "busybox"
    layer.links["usr/bin/sh"] = "dash"
    return layer


def _which(name: str) -> Path:
    found = shutil.which(name, path="/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin")
    if not found:
        raise ClusterError(f"the images need the program {name}, which is missing", SETUP)
    return Path(found)


def _write(image: Image, path: Path) -> None:
    layers = [layer.tar() for layer in image.layers]
    digests = [hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": list(image.entrypoint) or None,
            "Cmd": list(image.command) or None,
        },
    }
    encoded = json.dumps(config).encode()
    config_name = f"{hashlib.sha256(encoded).hexdigest()}.json"
    manifest = {
        "Config": config_name,
        "RepoTags": list(image.tags),
        "Layers": [f"{digest}.tar" for digest in digests],
    }
    with tarfile.open(path, "w") as archive:
        _add(archive, config_name, encoded, 0o644)
        for digest, layer in zip(digests, layers, strict=True):
            _add(archive, f"{digest}.tar", layer, 0o644)
        _add(archive, "manifest.json", json.dumps([manifest]).encode(), 0o644)


def _add(archive: tarfile.TarFile, path: str, content: bytes, mode: int) -> None:
    entry = tarfile.TarInfo(path)
    entry.size, entry.mode = len(content), mode
    archive.addfile(entry, io.BytesIO(content))
