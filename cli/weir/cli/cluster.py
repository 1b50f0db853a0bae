# SPDX-License-Identifier: Apache-2.0
"""The cluster's objects that policies are about, as the operator reads them, and policies of files.

What an operator parses at its edge comes here by `kubectl get`, with the same parsers, so that a
file is judged by what Weir would make of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import yaml

from weir.cli.errors import CliError
from weir.cli.source import Kubectl
from weir.operator import kinds, wire
from weir.operator.cluster_policy import ClusterPolicy
from weir.operator.objects import Key, Namespace, Node, Parsed, Pod, Problem, key_of
from weir.operator.policy import NetworkPolicy
from weir.operator.reflector import Kind


@dataclass(frozen=True, slots=True)
class PolicyKind:
    """words: how `--delete` may name it."""

    kind: Kind[Any]
    version: str
    resource: str
    namespaced: bool
    words: frozenset[str]


POLICY_KINDS = {
    made.kind.name: made
    for made in (
        PolicyKind(
            kinds.POLICY,
            "networking.k8s.io/v1",
            "networkpolicies.networking.k8s.io",
            True,
            frozenset({"networkpolicy", "networkpolicies", "netpol"}),
        ),
        PolicyKind(
            kinds.CLUSTER_POLICY,
            "policy.networking.k8s.io/v1alpha2",
            "clusternetworkpolicies.v1alpha2.policy.networking.k8s.io",
            False,
            frozenset({"clusternetworkpolicy", "clusternetworkpolicies", "cnp"}),
        ),
    )
}
PolicyKey = tuple[str, Key]
"""Of a kind."""


@dataclass(frozen=True, slots=True)
class Objects:
    """policies: what is in force of each, None: nothing."""

    namespaces: dict[Key, Namespace] = field(default_factory=dict)
    nodes: dict[Key, Node] = field(default_factory=dict)
    pods: dict[Key, Pod] = field(default_factory=dict)
    policies: dict[PolicyKey, NetworkPolicy | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a policy of a file."""

    policy: str
    field: str
    message: str

    def text(self) -> str:
        return f"{self.policy}: {self.field or 'object'}: {self.message}"


def read_cluster(kubectl: Kubectl) -> Objects:
    found = Objects()
    found.namespaces.update(_listed(kubectl, "namespaces", kinds.NAMESPACE))
    found.nodes.update(_listed(kubectl, "nodes", kinds.NODE))
    found.pods.update(_listed(kubectl, "pods", kinds.POD))
    for name, made in POLICY_KINDS.items():
        for key, value in _listed(kubectl, made.resource, made.kind):
            found.policies[name, key] = _in_force(value)
    return found


def _listed(kubectl: Kubectl, resource: str, kind: Kind[Any]) -> Iterator[tuple[Key, Any]]:
    listed = kubectl.get(resource, optional=kind.optional)
    for raw in msgspec.json.decode(listed, type=wire.Page).items or ():
        key = key_of(msgspec.json.decode(raw, type=wire.Identified).metadata)
        value = _read(kind, key, raw).value
        if value is not None:
            yield key, value


def _read(kind: Kind[Any], key: Key, raw: msgspec.Raw) -> Parsed[Any]:
    """As the reflector does."""
    try:
        return kind.read(raw)
    except msgspec.DecodeError as error:
        return Parsed(kind.unreadable(key), (Problem("", f"cannot be read: {error}"),))


def _in_force(value: NetworkPolicy | ClusterPolicy) -> NetworkPolicy | None:
    return value.policy if isinstance(value, ClusterPolicy) else value


def read_files(
    names: Sequence[str], namespace: str
) -> tuple[dict[PolicyKey, NetworkPolicy | None], list[Trouble], list[str]]:
    """Policies of YAML or JSON files ("-": standard input), what is wrong with them, and what else
    was there. `namespace`: of those that name none."""
    policies: dict[PolicyKey, NetworkPolicy | None] = {}
    troubles: list[Trouble] = []
    others: list[str] = []
    for name in names:
        for document in _documents(name):
            kind, meta = str(document.get("kind")), document.get("metadata") or {}
            label = f"{kind} {meta.get('name', '?') if isinstance(meta, dict) else '?'}"
            made = POLICY_KINDS.get(kind)
            if made is None or document.get("apiVersion") != made.version:
                others.append(f"{label} ({document.get('apiVersion')})")
                continue
            if not isinstance(meta, dict) or not meta.get("name"):
                troubles.append(Trouble(label, "metadata.name", "a policy needs a name"))
                continue
            if made.namespaced:
                document["metadata"] = meta = {"namespace": namespace, **meta}
            key = Key(str(meta["namespace"]) if made.namespaced else "", str(meta["name"]))
            raw = msgspec.Raw(msgspec.json.encode(document, enc_hook=str))
            parsed = _read(made.kind, key, raw)
            problems = parsed.problems
            if isinstance(parsed.value, ClusterPolicy):
                problems += parsed.value.problems
            troubles += [Trouble(f"{kind} {key}", p.field, p.message) for p in problems]
            if parsed.value is not None:
                policies[kind, key] = _in_force(parsed.value)
    return policies, troubles, others


def _documents(name: str) -> Iterator[dict[str, Any]]:
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text()
    except OSError as error:
        raise CliError(
            f"{name}: {error.strerror}", "Give a file that can be read, or -."
        ) from error
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise CliError(f"{name}: {error}", "Give YAML or JSON.") from error
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, dict):
            raise CliError(f"{name}: {document!r:.40} is no object", "Give Kubernetes objects.")
        if str(document.get("kind")).endswith("List"):
            yield from document.get("items") or ()
        else:
            yield document


def parse_deletion(text: str) -> PolicyKey:
    """kind/namespace/name, or kind/name of what has no namespace."""
    word, *rest = text.split("/")
    for kind, made in POLICY_KINDS.items():
        if word.lower() in made.words and all(rest) and len(rest) == 1 + made.namespaced:
            return kind, Key(*rest) if made.namespaced else Key("", *rest)
    raise CliError(
        f"--delete {text}", "Write networkpolicy/NAMESPACE/NAME or clusternetworkpolicy/NAME."
    )
