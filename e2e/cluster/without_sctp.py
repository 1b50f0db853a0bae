# SPDX-License-Identifier: Apache-2.0
"""ClusterNetworkPolicy's conformance suite for kernels without SCTP sockets.

There its set-up would wait for ever: each of its pods has two SCTP servers, which crash. And its
tests of other things ask by SCTP too, which fails before a packet is sent. So two places of a copy
of the module are changed before it is built: the pods have no SCTP servers, and a probe by SCTP
says in the log that it was left out, one of another protocol that it was made. What is left of a
test is what its log says; `e2e.conformance.policy_report` reads it.
"""

import re
from pathlib import Path

from e2e.cluster.errors import ClusterError

PROBED = "probe made"
LEFT_OUT = "probe left out: no SCTP here"
_MANIFESTS = Path("conformance/base/manifests.yaml")
_PROBES = Path("conformance/utils/kubernetes/helper.go")
_ITEM = re.compile(r"^        - name: ", re.MULTILINE)  # of spec.template.spec.containers
_SERVER = "SERVE_SCTP_PORT_"
_SIGNATURE = re.compile(r"^func PokeServer\(t \*testing\.T,.*\bprotocol\b.*\{\n", re.MULTILINE)


def edit(module: Path) -> None:
    """Change the unpacked module; an unknown form of it is an error, never a smaller change."""
    for path, change in ((_MANIFESTS, without_servers), (_PROBES, without_probes)):
        (module / path).write_text(change((module / path).read_text()))


def without_servers(manifests: str) -> str:
    """The manifests without the containers that serve SCTP."""
    documents = manifests.split("\n---\n")
    kept = "\n---\n".join(_without_containers(document) for document in documents)
    if kept == manifests or _SERVER in kept:
        raise ClusterError("the suite's manifests are not as this version of the suite has them")
    return kept


def _without_containers(document: str) -> str:
    starts = [match.start() for match in _ITEM.finditer(document)]
    if not starts:
        return document
    ends = [*starts[1:], len(document)]
    containers = [document[start:end] for start, end in zip(starts, ends, strict=True)]
    kept = [container for container in containers if _SERVER not in container]
    return document[: starts[0]] + "".join(kept)


def without_probes(source: str) -> str:
    """The probing function with a beginning that leaves out SCTP."""
    beginning = (
        f'\tif protocol == "sctp" {{\n\t\tt.Log("{LEFT_OUT}")\n\t\treturn\n\t}}\n'
        f'\tt.Log("{PROBED}")\n'
    )
    changed, count = _SIGNATURE.subn(lambda match: match[0] + beginning, source)
    if count != 1:
        raise ClusterError("the suite's PokeServer is not as this version of the suite has it")
    return changed
