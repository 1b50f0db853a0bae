# SPDX-License-Identifier: Apache-2.0
"""Run upstream's ClusterNetworkPolicy conformance: `make conformance-policy` with PROFILE, FOCUS.

A line per test, `N of M passed`, and in build/conformance the results, the log, upstream's own
report and a list to be read beside another cluster's. On a kernel without SCTP sockets the suite
is one without SCTP (`e2e.cluster.without_sctp`), and what that leaves out is said.
"""

import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TextIO

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.conformance import target
from e2e.conformance.policy_report import LEFT, Report
from e2e.conformance.report import PASSED, SKIPPED, Spec, write_list
from e2e.conformance.target import OUTPUT

_IPPROTO_SCTP = 132
_STANDARD = ("ClusterNetworkPolicy",)
_PROFILES = {  # name -> features; upstream calls those beyond the standard ones experimental
    "all": (*_STANDARD, "ClusterNetworkPolicyNamedPorts", "ClusterNetworkPolicyEgressNodePeers"),
    "standard": _STANDARD,
}
_TIMEOUT = "60m"
_LABEL = "conformance-house"  # of the suite's namespaces
_CRD = "clusternetworkpolicies.policy.networking.k8s.io"


def main() -> int:
    """Code 0 if at least one test ran and all passed."""
    try:
        specs, report = _run()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    counted = [spec for spec in specs if spec.state not in {LEFT, SKIPPED}]
    failed = [spec for spec in counted if spec.state != PASSED]
    for spec in failed:
        print(f"\n{spec.name}\n  {spec.state}: {spec.message}")
    print(f"log: {OUTPUT}/policy-log.txt")
    left = sum(spec.state == LEFT for spec in specs)
    if left or report.probes_left_out:
        print(
            f"left out, as this kernel has no SCTP sockets: {left} tests of SCTP alone, and"
            f" {report.probes_left_out} probes by SCTP of other tests"
        )
    passed = len(counted) - len(failed)
    print(f"{passed} of {len(counted)} passed")
    return 0 if passed == len(counted) > 0 else 1


def _run() -> tuple[list[Spec], Report]:
    profile = os.environ.get("PROFILE") or "all"
    if profile not in _PROFILES:
        raise ClusterError(f"PROFILE={profile} is not one of {', '.join(_PROFILES)}")
    where = target.find()
    program = binaries.POLICY_CONFORMANCE if has_sctp() else binaries.POLICY_WITHOUT_SCTP
    folder = binaries.binary_folder()
    binaries.build((program, "kubectl"), folder)
    if _CRD not in where.kubectl("get", "crds", "--output=name"):
        raise ClusterError("the cluster has no ClusterNetworkPolicies", "the chart brings the CRD")
    # An earlier run's are deleted when it ends, and without waiting.
    where.kubectl("delete", "namespaces", f"--selector={_LABEL}", "--timeout=120s")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report, specs = Report(), []
    command = [str(folder / program), *_flags(profile)]
    with (
        (OUTPUT / "policy-log.txt").open("w") as log,
        where.start(command, KUBECONFIG=str(where.config)) as process,
    ):
        assert process.stdout
        try:
            for spec in report.read(_kept(process.stdout, log)):
                specs.append(spec)
                print(f"{len(specs):4}  {spec.line()}", flush=True)
        except BaseException:
            process.terminate()
            raise
    if not specs or (process.returncode and all(spec.state == PASSED for spec in specs)):
        raise ClusterError("the suite did not finish", f"see {OUTPUT}/policy-log.txt")
    results = [asdict(spec) for spec in specs]
    (OUTPUT / "policy-results.json").write_text(json.dumps(results, indent=2) + "\n")
    if not os.environ.get("FOCUS"):
        stack, about = where.describe()
        name = f"cluster-network-policy-{profile}"
        write_list(specs, OUTPUT / f"{name}-{stack}.txt", f"{name}: {about}")
    return specs, report


def _flags(profile: str) -> list[str]:
    focus = os.environ.get("FOCUS")
    return [
        "-test.v=test2json",
        "-test.run=^TestConformanceProfiles$" + (f"/{focus}" if focus else ""),
        f"-test.timeout={_TIMEOUT}",
        "-conformance-profiles=ClusterNetworkPolicy",
        f"-supported-features={','.join(_PROFILES[profile])}",
        f"-report-output={OUTPUT}/policy-report.yaml",
        # For upstream's report, which asks for all of them.
        *("-organization=weir", "-project=weir", "-url=weir.dev", "-version=main"),
        *("-contact=weir", "-additional-info=make conformance-policy"),
    ]


def has_sctp() -> bool:
    """Whether pods can have SCTP sockets; of another cluster's kernels SCTP=0 or 1 says it."""
    given = os.environ.get("SCTP")
    if given:
        return given != "0"
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, _IPPROTO_SCTP).close()
    except OSError:
        return False
    return True


def _kept(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    for line in lines:
        log.write(line)
        yield line


if __name__ == "__main__":
    sys.exit(main())
