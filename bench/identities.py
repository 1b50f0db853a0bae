# SPDX-License-Identifier: Apache-2.0
"""What a design with an identity for each set of labels needs, for comparison: a model of it.

Every distinct set of a pod's labels, its namespace's among them, is an identity. A node's policy
table has a row for each (endpoint, identity that a rule selects, port or range), as endpoints do
not share theirs. So the rows grow with the pods that a rule selects if these have labels of their
own, whether or not a policy looks at those labels. Networks are one identity for each of a rule's
prefixes, which favours that design: it needs one for each combination of prefixes that overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from weir.operator.objects import Labels, Namespace, Pod
from weir.operator.policy import NetworkPolicy
from weir.operator.selectors import InNamespace, IpBlock, Pods, Selector

Identity = tuple[str, Labels, Labels]


@dataclass(frozen=True, slots=True)
class Needed:
    identities: int
    rows: int


def needed(
    pods: Iterable[Pod],
    namespaces: Iterable[Namespace],
    policies: Sequence[NetworkPolicy],
    local: Iterable[Pod],
) -> Needed:
    """`local`: the pods of the node whose rows are counted."""
    labels = {namespace.key.name: namespace.labels for namespace in namespaces}
    identities = {identity(pod, labels) for pod in pods}
    found: dict[Selector, int] = {}

    def selected(selector: Selector) -> int:
        """Identities; asked for once a selector."""
        if selector not in found:
            found[selector] = (
                1 + len(selector.excepts)
                if isinstance(selector, IpBlock)
                else sum(matches(selector, identity) for identity in identities)
            )
        return found[selector]

    rows = 0
    for endpoint in local:
        own = identity(endpoint, labels)
        for policy in policies:
            if policy.key.namespace == endpoint.key.namespace and matches(policy.subject, own):
                for rule in policy.rules:
                    peers = 1 if rule.peers is None else sum(map(selected, rule.peers))
                    rows += peers * max(1, len(rule.ports))
    return Needed(len(identities), rows)


def identity(pod: Pod, namespaces: dict[str, Labels]) -> Identity:
    return pod.key.namespace, namespaces[pod.key.namespace], pod.labels


def matches(selector: Selector, identity: Identity) -> bool:
    if not isinstance(selector, Pods):
        return False
    name, namespace_labels, labels = identity
    if isinstance(selector.scope, InNamespace):
        inside = selector.scope.name == name
    else:
        inside = selector.scope.labels.matches(dict(namespace_labels))
    return inside and selector.labels.matches(dict(labels))
