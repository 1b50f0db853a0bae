# SPDX-License-Identifier: Apache-2.0
"""The commands around the local cluster. `python3 -m e2e.cluster --help`."""

import argparse
import fcntl
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from e2e.cluster import (
    binaries,
    components,
    control_plane,
    deploy,
    down,
    host,
    namespaces,
    node,
    up,
)
from e2e.cluster import store as image_store
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import KUBECONFIG, SETTINGS, STATE
from e2e.cluster.progress import Progress
from e2e.cluster.settings import CONTROL_PLANE, Settings, load_settings, parse_settings

_INTERRUPTED = 130


def main() -> int:
    """Run one command; errors for people end with code 1 and no traceback."""
    arguments = _parser().parse_args()
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m e2e.cluster", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, action: Callable[[argparse.Namespace], int], text: str | None
    ) -> argparse.ArgumentParser:
        # Without a help text a command is an inner one and not listed.
        added = commands.add_parser(name, help=text) if text else commands.add_parser(name)
        added.set_defaults(command=action)
        return added

    command("up", _up, "start a cluster; its variables are in README.md")
    command("down", _down, "remove every trace of it")
    command("check-clean", _check_clean, "list what is left of a cluster; fails if anything is")
    command("status", _status, "settings, PIDs and components")
    command("deploy", _deploy, "build Weir's image and roll it out on the cluster that is up")
    build = command("build", _build, "build binaries: all of the cluster, or those named")
    build.add_argument("names", nargs="*")
    load = command("load-image", _load_image, "import an image tar into every node")
    load.add_argument("archive", type=Path)
    execute = command("node-exec", _node_exec, "run a command fully inside a node: -- CMD")
    execute.add_argument("--net", action="store_true", help="only its network namespace")
    execute.add_argument("name", help=f"node1 ..., or {CONTROL_PLANE}")
    execute.add_argument("words", nargs="+", metavar="CMD")
    for name, action, text in (
        ("node-pid", _node_pid, "the PID of a node's PID 1"),
        ("component-pid", _component_pid, "the PID of a component"),
        ("kill", _kill, "kill -9 a component; it is restarted after a second"),
        ("stop", _stop, "kill -9 a component and keep it down"),
        ("start", _start, "let a stopped component run again"),
    ):
        added = command(name, action, text)
        added.add_argument("name", help=f"node1 ..., or {CONTROL_PLANE}")
        if name != "node-pid":
            added.add_argument("component")
    inner = command("init-control-plane", _init_control_plane, None)
    inner.add_argument("binaries", type=Path)
    inner.add_argument("listener", type=int)
    inner = command("init-node", _init_node, None)
    inner.add_argument("binaries", type=Path)
    inner.add_argument("name")
    inner = command("fill-store", _fill_store, None)
    inner.add_argument("store", type=Path)
    inner.add_argument("binaries", type=Path)
    inner.add_argument("archives", type=Path, nargs="+")
    return parser


def _up(_: argparse.Namespace) -> int:
    settings = parse_settings(os.environ)
    with _Lock():
        up.up(settings)
    return 0


def _down(_: argparse.Namespace) -> int:
    with _Lock():
        down.down()
    return 0


def _check_clean(_: argparse.Namespace) -> int:
    found = down.leftovers()
    print("\n".join(found) or "nothing is left")
    return 1 if found else 0


def _status(_: argparse.Namespace) -> int:
    settings = _running_settings()
    print(f"{settings.describe()}\nkubeconfig {KUBECONFIG}")
    for name in (CONTROL_PLANE, *settings.node_names):
        print(f"{name}: PID {host.init_process(name) or '-, not running'}")
        for component in components.names(name):
            try:
                print(f"  {component}: {components.pid(name, component)}")
            except ClusterError:
                print(f"  {component}: not running")
    return 0 if up.is_up() else 1


def _deploy(_: argparse.Namespace) -> int:
    with _Lock():
        settings = _running_settings()
        deploy.build_image()
        deploy.deploy(settings, Progress())
    return 0


def _build(arguments: argparse.Namespace) -> int:
    binaries.build(tuple(arguments.names) or binaries.CLUSTER, binaries.binary_folder())
    return 0


def _load_image(arguments: argparse.Namespace) -> int:
    deploy.load_image(_running_settings().node_names, arguments.archive)
    return 0


def _node_exec(arguments: argparse.Namespace) -> int:
    namespaces.execute(arguments.name, arguments.words, arguments.net)
    return 0


def _node_pid(arguments: argparse.Namespace) -> int:
    pid = host.init_process(arguments.name)
    if pid is None:
        raise ClusterError(f"{arguments.name} is not running", "run `make cluster`")
    print(pid)
    return 0


def _component_pid(arguments: argparse.Namespace) -> int:
    print(components.pid(arguments.name, arguments.component))
    return 0


def _kill(arguments: argparse.Namespace) -> int:
    components.kill(arguments.name, arguments.component)
    return 0


def _stop(arguments: argparse.Namespace) -> int:
    components.stop(arguments.name, arguments.component)
    return 0


def _start(arguments: argparse.Namespace) -> int:
    components.start(arguments.name, arguments.component)
    return 0


def _init_control_plane(arguments: argparse.Namespace) -> int:
    _log()
    control_plane.run(load_settings(SETTINGS), arguments.binaries, arguments.listener)


def _init_node(arguments: argparse.Namespace) -> int:
    _log()
    node.run(arguments.name, load_settings(SETTINGS), arguments.binaries)


def _log() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)


def _fill_store(arguments: argparse.Namespace) -> int:
    image_store.fill(arguments.store, arguments.binaries, arguments.archives)
    return 0


def _running_settings() -> Settings:
    if not SETTINGS.exists():
        raise ClusterError("no cluster is up", "run `make cluster`")
    return load_settings(SETTINGS)


class _Lock:
    """One `up`, `down` or `deploy` at a time; the kernel drops it when the process ends."""

    def __enter__(self) -> None:
        STATE.mkdir(parents=True, exist_ok=True)
        self._file = (STATE / "lock").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ClusterError(
                "another `make cluster`, `cluster-down` or `deploy` is at work on this checkout",
                "wait until it has ended, or stop it",
            ) from error

    def __exit__(self, *_: object) -> None:
        self._file.close()


if __name__ == "__main__":
    sys.exit(main())
