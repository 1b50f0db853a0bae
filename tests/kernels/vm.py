# SPDX-License-Identifier: Apache-2.0
"""One guest: QEMU without hardware acceleration, this machine's files below a tmpfs.

The guest sees the machine's root file system read-only under an overlay, so it has the same
Python, packages, checkout and built objects, and nothing it does stays. `thread=single`,
because kernels of 7.x panic under multi-threaded emulation when static keys flip.
"""

from __future__ import annotations

import lzma
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kernels.errors import GuestDiedError, GuestTimeoutError, KernelRunError
from kernels.packages import Kernel

GUEST_SCRIPTS = Path(__file__).parent / "guest"
BOOT_MODULES = ("virtio_pci", "virtiofs", "overlay")
VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_DEADLINE_S = 10.0
CONSOLE_LINES = 30
# Our children must not outlive us, whatever ends us.
DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")

# $1: empty folder, $2: the guest's output folder, then file systems other than / that it needs.
SHARE = """
share=$1 out=$2; shift 2
mount -t tmpfs share "$share"
mkdir "$share/root" "$share/out"
mount --bind / "$share/root"
for path; do
    mount --bind "$path" "$share/root$path"
    mount -o remount,bind,ro "$share/root$path"
done
mount -o remount,bind,ro "$share/root"
mount --bind "$out" "$share/out"
exec "$VIRTIOFSD" --socket-path="$SOCKET" -o source="$share" -o cache=always -o sandbox=chroot \
    -o xattr -o log_level=err
"""


@dataclass(frozen=True, slots=True)
class Size:
    """What a guest gets. Defaults: two CPUs, so that per-CPU maps and races are real."""

    cpus: int = 2
    memory_mib: int = 2048


def boot_modules(kernel: Kernel) -> list[Path]:
    """What the guest needs to reach its files, in the order of loading."""
    ordered: dict[Path, None] = {}
    for module in BOOT_MODULES:
        show = [
            "modprobe",
            "-d",
            str(kernel.folder),
            "-S",
            kernel.release,
            "--show-depends",
            module,
        ]
        done = subprocess.run(show, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelRunError(f"kernel {kernel.release}: module {module}: {done.stderr}")
        for line in done.stdout.splitlines():
            action, _, rest = line.partition(" ")
            if action == "insmod":
                ordered[Path(rest.split()[0])] = None
    return list(ordered)


def build_initrd(kernel: Kernel, folder: Path) -> Path:
    """busybox, our two scripts and the modules, as a cpio archive."""
    tree = folder / "initrd"
    for name in ("bin", "modules", "proc", "sys", "dev", "machine", "changes", "new"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    if busybox is None:
        raise KernelRunError("busybox not found: install busybox-static (make setup)")
    shutil.copy(busybox, tree / "bin/busybox")
    shutil.copy(GUEST_SCRIPTS / "init.sh", tree / "init")
    (tree / "init").chmod(0o755)
    shutil.copy(GUEST_SCRIPTS / "run.sh", tree / "run.sh")
    for number, module in enumerate(boot_modules(kernel)):
        content = module.read_bytes()
        if module.suffix == ".xz":
            content = lzma.decompress(content)
        (tree / "modules" / f"{number:02}-{module.name.split('.')[0]}.ko").write_bytes(content)
    names = "\n".join(str(p.relative_to(tree)) for p in sorted(tree.rglob("*")))
    archive = folder / "initrd.cpio"
    with archive.open("wb") as output:
        subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"],
            cwd=tree, input=names.encode(), stdout=output, stderr=subprocess.DEVNULL, check=True,
        )  # fmt: skip
    return archive


def other_file_systems(paths: list[Path]) -> list[str]:
    """Mount points below / that hold what the guest needs."""
    found = set()
    for path in paths:
        mount = path.resolve()
        while not mount.is_mount():
            mount = mount.parent
        if mount != Path("/"):
            found.add(str(mount))
    return sorted(found)


def start_file_server(folder: Path, out: Path, needed: list[Path]) -> subprocess.Popen[bytes]:
    server = next((path for path in VIRTIOFSD if Path(path).exists()), None)
    if server is None:
        raise KernelRunError("virtiofsd not found: install the packages in hack/packages.txt")
    socket = folder / "fs.sock"
    (folder / "share").mkdir()
    unshare = ("unshare", "--mount", "--propagation", "private", "sh", "-ec", SHARE, "share")
    with (out / "virtiofsd.log").open("wb") as log:
        process = subprocess.Popen(
            [*DIE_WITH_US, *unshare, folder / "share", out, *other_file_systems(needed)],
            env={"PATH": SYSTEM_PATH, "VIRTIOFSD": server, "SOCKET": str(socket)},
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    deadline = time.monotonic() + START_DEADLINE_S
    while not socket.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise KernelRunError(f"virtiofsd: {(out / 'virtiofsd.log').read_text()}")
        time.sleep(0.02)
    return process


def qemu_command(kernel: Kernel, folder: Path, out: Path, size: Size) -> list[str]:
    modules = kernel.folder / "lib" / "modules" / kernel.release
    append = "console=ttyS0 quiet panic=-1 oops=panic mitigations=off"
    return [
        *DIE_WITH_US, "qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max",
        "-smp", str(size.cpus), "-m", str(size.memory_mib),
        "-machine", "pc,memory-backend=memory",
        "-object", f"memory-backend-memfd,id=memory,size={size.memory_mib}M,share=on",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-chardev", f"socket,id=files,path={folder / 'fs.sock'}",
        "-device", "vhost-user-fs-pci,chardev=files,tag=machine,queue-size=1024",
        "-serial", f"file:{out / 'console'}",
        "-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output",
        "-kernel", str(kernel.image), "-initrd", str(build_initrd(kernel, folder)),
        "-append", f"{append} weir.modules={modules.resolve()}",
    ]  # fmt: skip


def print_lines(series: str, output: Iterable[str]) -> None:
    for line in output:
        print(f"{series:>5} | {line}", end="", flush=True)


def run_once(
    kernel: Kernel, command: list[str], out: Path, cwd: Path, timeout_s: float, size: Size
) -> int:
    """Run a command in a fresh guest; its output goes to ours, each line with the kernel's series.

    Returns its exit status. Raises GuestTimeoutError, and GuestDiedError when there is none.
    """
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    enter = f"cd {shlex.quote(str(cwd))} && exec {shlex.join(command)}"
    (out / "command").write_text(f"export PATH={SYSTEM_PATH}\n{enter}\n")
    with tempfile.TemporaryDirectory(prefix="weir-kernel-") as name:
        folder = Path(name)
        needed = [cwd, Path(command[0]), kernel.folder]
        server = start_file_server(folder, out, needed)
        guest = printer = None
        try:
            guest = subprocess.Popen(
                qemu_command(kernel, folder, out, size),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace",
            )  # fmt: skip
            printer = threading.Thread(target=print_lines, args=(kernel.series, guest.stdout))
            printer.start()
            guest.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise GuestTimeoutError(kernel.release, timeout_s) from None
        finally:
            for process in (guest, server):
                if process is not None:
                    process.kill()
                    process.wait()
            if printer is not None:
                printer.join()
    status = out / "status"
    if status.exists():
        return int(status.read_text())
    console = (out / "console").read_text(errors="replace") if (out / "console").exists() else ""
    tail = "\n".join(console.splitlines()[-CONSOLE_LINES:])
    raise GuestDiedError(kernel.release, (out / "started").exists(), tail)


def run(
    kernel: Kernel,
    command: list[str],
    out: Path,
    cwd: Path,
    timeout_s: float,
    size: Size = Size(),
) -> int:
    """As run_once; a guest that died before it reached the command gets a second chance."""
    try:
        return run_once(kernel, command, out, cwd, timeout_s, size)
    except GuestDiedError as died:
        if died.started:
            raise
        return run_once(kernel, command, out, cwd, timeout_s, size)
