# SPDX-License-Identifier: Apache-2.0
"""Run the suite and report: a line per spec as it ends, `N of M passed`, and results.json.

LIST names a selection below; FOCUS and SKIP choose freely. A selection's results are kept as a
text, build/conformance/LIST-CLUSTER.txt, to be read beside another cluster's.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from e2e.cluster import binaries, host, namespaces
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import KUBECONFIG, PKI, REPOSITORY, SETTINGS
from e2e.cluster.settings import CONTROL_PLANE, Cni, load_settings
from e2e.conformance.report import PASSED, Spec, read_output, read_report, write_list

OUTPUT = REPOSITORY / "build" / "conformance"
_UNQUIET = r"\[Disruptive\]|\[Slow\]|\[Serial\]"
_SELECTIONS = {  # name -> focus, skip
    "conformance": (r"\[sig-network\].*\[Conformance\]", r"\[Disruptive\]|\[Feature"),
    "others": (r"\[sig-network\]", rf"{_UNQUIET}|\[Feature|\[Conformance\]"),
    "dual-stack": (r"\[sig-network\].*\[Feature:IPv6DualStack\]", r"\[Disruptive\]|\[Serial\]"),
    "load-balancer": (r"\[sig-network\] LoadBalancers", r"\[Disruptive\]|\[Serial\]"),
}
_PROCESSES = "4"
_TIMEOUT = "2h"


def main() -> int:
    """Code 0 if at least one spec ran and all passed."""
    try:
        specs = _run()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    failed = [spec for spec in specs if spec.state != PASSED]
    for spec in failed:
        print(f"\n{spec.name}\n  {spec.state}: {spec.message}")
    passed = len(specs) - len(failed)
    print(f"log: {OUTPUT}/log.txt")
    print(f"{passed} of {len(specs)} passed")
    return 0 if passed == len(specs) > 0 else 1


def _run() -> list[Spec]:
    given = os.environ.get("KUBECONFIG")
    kubeconfig = Path(given).resolve() if given else KUBECONFIG
    local = kubeconfig == KUBECONFIG
    if not kubeconfig.exists():
        raise ClusterError(f"no kubeconfig {kubeconfig}", "run `make cluster`, or set KUBECONFIG")
    folder = binaries.binary_folder()
    binaries.build((*binaries.CONFORMANCE, "kubectl"), folder)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report = OUTPUT / "report.json"
    for old in (report, OUTPUT / "results.json"):
        old.unlink(missing_ok=True)
    nodes = _count_nodes(folder / "kubectl", kubeconfig)
    # The suite talks to node addresses too. For the local cluster that works in the control
    # plane's network, where the API server has its underlay address.
    selection, focus, skip = _selection()
    config = PKI / "admin.conf" if local else kubeconfig
    command = _command(folder, config, nodes, focus, skip)
    if local:
        command = namespaces.entered(CONTROL_PLANE, command, only_network=True)
    specs_seen = 0
    with (
        (OUTPUT / "log.txt").open("w") as log,
        subprocess.Popen(
            command,
            cwd=OUTPUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_join_control_plane if local else None,  # noqa: PLW1509 - no threads
        ) as process,
    ):
        assert process.stdout
        try:
            for spec in read_output(_kept(process.stdout, log)):
                specs_seen += 1
                print(f"{specs_seen:4}  {spec.line()}", flush=True)
        except BaseException:
            process.terminate()  # ginkgo ends its processes and they their namespaces
            raise
    if not report.exists():
        raise ClusterError("the suite did not finish", f"see {OUTPUT}/log.txt")
    specs = read_report(report)
    results = [asdict(spec) for spec in specs]
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if selection:
        stack, about = _cluster() if local else ("cluster", str(kubeconfig))
        write_list(specs, OUTPUT / f"{selection}-{stack}.txt", f"{selection}: {about}")
    return specs


def _selection() -> tuple[str, str, str]:
    """Its name, empty for one of FOCUS and SKIP, with what it takes and what it leaves out."""
    name = os.environ.get("LIST") or ""
    given = os.environ.get("FOCUS"), os.environ.get("SKIP")
    if name not in {"", *_SELECTIONS}:
        raise ClusterError(f"LIST={name} is not one of {', '.join(_SELECTIONS)}")
    if name and any(given):
        raise ClusterError("LIST and FOCUS or SKIP exclude each other")
    if not name and not any(given):
        name = "conformance"
    focus, skip = _SELECTIONS[name or "conformance"]
    return name, given[0] or focus, given[1] or skip


def _cluster() -> tuple[str, str]:
    """A name of the local cluster's stack for a file, and its settings for people."""
    settings = load_settings(SETTINGS)
    cni = f"{settings.cni}-{settings.routing}" if settings.cni is Cni.WEIR else str(settings.cni)
    proxy = "" if settings.kube_proxy == "none" else f"-kube-proxy-{settings.kube_proxy}"
    firewall = "" if settings.netpol == "none" else f"-{settings.netpol}"
    return cni + proxy + firewall, settings.describe()


def _kept(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    for line in lines:
        log.write(line)
        yield line


def _command(folder: Path, kubeconfig: Path, nodes: int, focus: str, skip: str) -> list[str]:
    return [
        str(folder / "ginkgo"),
        f"--procs={os.environ.get('PROCS') or _PROCESSES}",
        "--no-color",
        "-v",
        f"--timeout={_TIMEOUT}",
        f"--focus={focus}",
        f"--skip={skip}",
        "--json-report=report.json",
        f"--output-dir={OUTPUT}",
        str(folder / "e2e.test"),
        "--",
        f"--kubeconfig={kubeconfig}",
        "--provider=skeleton",
        f"--num-nodes={nodes}",  # without it specs that want two nodes skip themselves
    ]


def _count_nodes(kubectl: Path, kubeconfig: Path) -> int:
    command = [str(kubectl), f"--kubeconfig={kubeconfig}", "get", "nodes", "--output=name"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise ClusterError(f"the cluster of {kubeconfig} does not answer: {result.stderr.strip()}")
    return len(result.stdout.split())


def _join_control_plane() -> None:
    """Into the cluster's cgroup, so that `make cluster-down` ends a run that was left alone."""
    namespaces.join(host.cluster_cgroup() / CONTROL_PLANE / "system")


if __name__ == "__main__":
    sys.exit(main())
