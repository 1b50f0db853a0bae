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
from weir.operator.objects import Key, Namespace, Node, Parsed, Pod, Problem, key_of
from weir.operator.policy import NetworkPolicy
from weir.operator.reflector import Kind

POLICY_KINDS: dict[str, Kind[Any]] = {"NetworkPolicy": kinds.POLICY}
GROUPS = {"NetworkPolicy": "networking.k8s.io"}
RESOURCES = {"NetworkPolicy": "networkpolicies.networking.k8s.io"}
NAMESPACED = {"NetworkPolicy"}
# How `--delete` may name them.
SHORT = {"netpol": "NetworkPolicy", "networkpolicy": "NetworkPolicy",
         "networkpolicies": "NetworkPolicy"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Objects:
    """policies: by kind and key."""

    namespaces: dict[Key, Namespace] = field(default_factory=dict)
    nodes: dict[Key, Node] = field(default_factory=dict)
    pods: dict[Key, Pod] = field(default_factory=dict)
    policies: dict[tuple[str, Key], NetworkPolicy] = field(default_factory=dict)


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
    for name, kind in POLICY_KINDS.items():
        for key, policy in _listed(kubectl, RESOURCES[name], kind):
            found.policies[name, key] = policy
    return found


def _listed(kubectl: Kubectl, resource: str, kind: Kind[Any]) -> Iterator[tuple[Key, Any]]:
    for raw in msgspec.json.decode(kubectl.get(resource), type=wire.Page).items or ():
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


def read_files(
    names: Sequence[str], namespace: str
) -> tuple[dict[tuple[str, Key], Any], list[Trouble], list[str]]:
    """Policies of YAML or JSON files ("-": standard input), what is wrong with them, and what else
    was there. `namespace`: of those that name none."""
    policies: dict[tuple[str, Key], Any] = {}
    troubles: list[Trouble] = []
    others: list[str] = []
    for name in names:
        for document in _documents(name):
            kind, meta = str(document.get("kind")), document.get("metadata") or {}
            group = str(document.get("apiVersion")).partition("/")[0]
            label = f"{kind} {meta.get('name', '?') if isinstance(meta, dict) else '?'}"
            if kind not in POLICY_KINDS or GROUPS[kind] != group:
                others.append(label)
                continue
            if not isinstance(meta, dict) or not meta.get("name"):
                troubles.append(Trouble(label, "metadata.name", "a policy needs a name"))
                continue
            if kind in NAMESPACED:
                document["metadata"] = meta = {"namespace": namespace, **meta}
            key = Key(str(meta.get("namespace", "")), str(meta["name"]))
            raw = msgspec.Raw(msgspec.json.encode(document, enc_hook=str))
            parsed = _read(POLICY_KINDS[kind], key, raw)
            troubles += [Trouble(f"{kind} {key}", p.field, p.message) for p in parsed.problems]
            if parsed.value is not None:
                policies[kind, key] = parsed.value
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


def parse_deletion(text: str) -> tuple[str, Key]:
    """kind/namespace/name, or kind/name of what has no namespace."""
    word, *rest = text.split("/")
    kind = SHORT.get(word.lower())
    if kind is None or not all(rest) or len(rest) != 1 + (kind in NAMESPACED):
        raise CliError(
            f"--delete {text}", "Write networkpolicy/NAMESPACE/NAME or clusternetworkpolicy/NAME."
        )
    return kind, Key("", rest[0]) if len(rest) == 1 else Key(*rest)
