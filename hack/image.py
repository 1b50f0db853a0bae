# SPDX-License-Identifier: Apache-2.0
"""Builds the container image: `make image`.

With a Docker daemon this is `docker build` on Debian's published image. Without one, buildah does
the same on a base that mmdebstrap makes from the distribution's packages, so that neither a daemon
nor a registry is needed. Either way the result is

    build/image/weir.oci.tar   the archive, for `ctr images import` and the like
    build/image/reference      its name: localhost/weir:VERSION-CONTENT

The tag names the content, so a changed source is a new image and a deployment of it an upgrade; an
unchanged one is found by its hash and nothing is built. How this machine reaches its package
indexes (proxies, CA certificates, mirrors) is read from apt's and pip's own configuration and
passed as build secrets, which leave no trace in the image.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build" / "image"
ARCHIVE = OUT / "weir.oci.tar"
REFERENCE = OUT / "reference"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "weir"
BASE_IMAGE = "localhost/weir-base"
CA_IN_BUILD = "/run/secrets/ca.crt"
NAMES = "--format={{.Name}}:{{.Tag}}"
SYSTEM_CA = Path("/etc/ssl/certs/ca-certificates.crt")
INPUTS = [
    "Dockerfile", ".dockerignore", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE",
    "hack/requirements.py", "api", "operator", "datapath", "cni", "agent", "cli",
]  # fmt: skip
# Each build leaves three or four images as cache of its layers, about 100 MB.
CACHED_IMAGES_MAX = 100
GENERATED = re.compile(
    r"/__pycache__/|\.egg-info/|\.bpf\.o$|\.partial$|/_libbpf[^/]*$|_pb2(_grpc)?\.pyi?$"
)
# What of apt's configuration is about reaching the archive rather than about this machine.
APT_KEPT = re.compile(
    r"Acquire::(https?::|Check-Date|Check-Valid-Until|Retries|Queue-Mode|ForceIPv)", re.IGNORECASE
)


class ImageError(Exception):
    """The image could not be built; the text says what failed and what helps."""


def run(command: list[str], **options: object) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise ImageError(f"failed with {done.returncode}: {' '.join(command)}")


def output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def content() -> str:
    """A hash of everything that goes into the image."""
    digest = hashlib.sha256()
    for name in INPUTS:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            relative = "/" + file.relative_to(ROOT).as_posix()
            if file.is_file() and not GENERATED.search(relative):
                data = file.read_bytes()
                mode = file.stat().st_mode & 0o111
                digest.update(f"{relative}\0{mode}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12]


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def secrets() -> list[str]:
    """This machine's apt and pip settings and CA certificates, as `--secret` arguments."""
    folder = OUT / "secrets"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "apt_conf").write_text(apt_settings() + f'Acquire::https::CAInfo "{CA_IN_BUILD}";\n')
    (folder / "pip_conf").write_text(pip_settings())
    bundle = Path(os.environ.get("SSL_CERT_FILE", SYSTEM_CA))
    (folder / "ca").write_bytes(bundle.read_bytes() if bundle.is_file() else b"")
    return [f"--secret=id={name},src={folder / name}" for name in ("apt_conf", "pip_conf", "ca")]


def apt_settings() -> str:
    lines = output(["apt-config", "dump"]).splitlines()
    kept = [line for line in lines if APT_KEPT.match(line) and "CAInfo" not in line]
    return "".join(f"{line}\n" for line in kept if not line.endswith('"";'))


def pip_settings() -> str:
    """pip's effective configuration: files and PIP_* variables alike, but this machine's paths."""
    values = {"cert": CA_IN_BUILD, "disable-pip-version-check": "1"}
    python = ROOT / ".venv" / "bin" / "python"  # made by `make setup`; the system's may lack pip
    command = [str(python) if python.exists() else sys.executable, "-m", "pip", "config", "list"]
    for line in output(command).splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        text = value.strip("'\"")
        if not text.startswith("/"):
            values[key] = text
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def proxy_arguments() -> list[str]:
    """Proxies of the environment; Docker and buildah know these build arguments by name."""
    names = ("http_proxy", "https_proxy", "no_proxy")
    both = [*names, *(name.upper() for name in names)]
    return [f"--build-arg={name}={os.environ[name]}" for name in both if name in os.environ]


def with_docker(reference: str) -> None:
    command = ["docker", "build", "--network=host", f"--tag={reference}", *secrets()]
    run([*command, *proxy_arguments(), "."], env={**os.environ, "DOCKER_BUILDKIT": "1"})
    run(["docker", "save", f"--output={ARCHIVE}", reference])


def with_buildah(reference: str) -> None:
    for tool, package in (("buildah", "buildah"), ("mmdebstrap", "mmdebstrap")):
        if shutil.which(tool) is None:
            raise ImageError(f"neither a Docker daemon nor {tool}: apt-get install {package}")
    storage = CACHE / "containers"
    storage.mkdir(parents=True, exist_ok=True)
    state = ["--root", str(storage), "--runroot", str(OUT / "run"), "--storage-driver", "overlay"]
    base = make_base(state)
    if len(images(state, "--all", "--quiet")) > CACHED_IMAGES_MAX:
        buildah(state, "rmi", "--prune")
    build = ["build", "--isolation=chroot", "--network=host", "--layers", "--format=oci"]
    build += [f"--build-arg=BASE={base}", f"--tag={reference}", *secrets(), *proxy_arguments()]
    buildah(state, *build, ".")
    partial = ARCHIVE.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    push = ["push", "--quiet", "--disable-compression", "--format=oci", reference]
    buildah(state, *push, f"oci-archive:{partial}:{reference}")
    partial.rename(ARCHIVE)
    drop_older(state, reference)


def buildah(state: list[str], command: str, *arguments: str) -> None:
    """Run buildah in a mount namespace of its own: it would leave its storage mounted."""
    own = ["unshare", "--mount", "--propagation=private"]
    run([*own, "buildah", *state, command, *arguments])


def images(state: list[str], *arguments: str) -> list[str]:
    """A line per image in buildah's storage."""
    return output(["unshare", "--mount", "buildah", *state, "images", *arguments]).split()


def make_base(state: list[str]) -> str:
    """A minimal base of the running distribution, made once and kept in buildah's storage."""
    sources = apt_sources()
    # A base is a snapshot of the archive: a new one each month keeps security updates coming.
    key = hashlib.sha256(f"{sources}{time.strftime('%Y-%m')}".encode()).hexdigest()[:12]
    image = f"{BASE_IMAGE}:{key}"
    if image in images(state, NAMES):
        return image
    print(f"making the base image {image} from the distribution's packages", flush=True)
    folder = CACHE / "image-base"
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "sources.list"
    listing.write_text(sources)
    (folder / "apt.conf").write_text(apt_settings())
    tree = folder / "base.tar"
    tree.unlink(missing_ok=True)
    clean = "rm -f $1/etc/apt/apt.conf.d/99mmdebstrap && rm -rf $1/var/lib/apt/lists/*"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--aptopt={folder / 'apt.conf'}"]
    command += [f"--customize-hook={clean}", suite(), str(tree), str(listing)]
    run(command)
    context = OUT / "base"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    (context / "base.tar").unlink(missing_ok=True)
    shutil.move(tree, context / "base.tar")
    buildah(state, "build", "--quiet", "--isolation=chroot", f"--tag={image}", str(context))
    shutil.rmtree(context)
    return image


def suite() -> str:
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise ImageError("/etc/os-release has no VERSION_CODENAME: use Docker on this distribution")


def apt_sources() -> str:
    """The distribution's own entries of this machine's apt sources (no third parties)."""
    fields = "$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(ORIGIN)"
    listing = output(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"])
    entries = set()
    for line in listing.splitlines():
        uri, release, component, origin = line.split("|")
        if origin in {"Debian", "Ubuntu"} and release.startswith(suite()):
            entries.add(f"deb {uri} {release} {component}\n")
    if not entries:
        raise ImageError("apt knows no Debian or Ubuntu archive here: run `apt-get update` first")
    return "".join(sorted(entries))


def drop_older(state: list[str], reference: str) -> None:
    """Forget earlier images; their shared layers stay as the cache."""
    for name in images(state, NAMES):
        if name.startswith("localhost/weir:") and name != reference:
            buildah(state, "rmi", "--force", name)


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second build waits, and then has nothing to do
        build()


def build() -> None:
    reference = f"localhost/weir:{version()}-{content()}"
    if ARCHIVE.exists() and REFERENCE.exists() and REFERENCE.read_text().strip() == reference:
        print(f"{reference} is up to date")
        return
    REFERENCE.unlink(missing_ok=True)
    started = time.monotonic()
    if output(["docker", "version", "--format", "{{.Server.Version}}"]).strip():
        with_docker(reference)
    else:
        with_buildah(reference)
    REFERENCE.write_text(reference + "\n")
    size = ARCHIVE.stat().st_size >> 20
    took = time.monotonic() - started
    print(f"built {reference} in {took:.0f} s: {ARCHIVE.relative_to(ROOT)}, {size} MiB")


if __name__ == "__main__":
    try:
        main()
    except ImageError as error:
        sys.exit(f"image: {error}")
