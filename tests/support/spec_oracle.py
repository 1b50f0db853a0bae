# SPDX-License-Identifier: Apache-2.0
"""What NetworkPolicy v1 and ClusterNetworkPolicy v1alpha2 say, in the plainest way: over the
API's JSON.

Written from the two API references, it shares no code with the product, keeps nothing between
questions and has no classes or rows: every question walks all objects. How to use it:

    cluster = Cluster()
    cluster.put({"kind": "Pod", "metadata": {...}, ...})   # or fill the dicts; `take` removes
    cluster.allows("10.0.0.1", "10.0.1.9", "TCP", 80)      # both ends; as "fd00::1" for IPv6
    cluster.decision(EGRESS, "10.0.0.1", "10.0.1.9", "TCP", 80)   # one end, and who decided

Kinds are Namespace, Node, Pod, NetworkPolicy and ClusterNetworkPolicy, as the API server returns
them: what its validation refuses is not looked at, except for what the types say about peers and
protocols of a later version (`_whole`).

What the references leave open and Weir decides:
- A pod reaches itself, and its own node reaches it. A pod reaches its own node as far as
  NetworkPolicies go; ClusterNetworkPolicies' egress rules do judge that. NetworkPolicies that
  isolate the pod then decide, and what they decide is that it may.
- An address of a pod CIDR that no known pod or node has is nobody's: no peer selects it, not even
  a network. ClusterNetworkPolicies with rules in that direction deny it; of NetworkPolicies, a
  rule that names no peer allows it.
- Equal priorities go by the policies' names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

Json = dict[str, Any]
Name = tuple[str, str]
IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

EGRESS, INGRESS = "Egress", "Ingress"
ADMIN, NETWORK_POLICY, BASELINE = "Admin", "NetworkPolicy", "Baseline"
UNKNOWN_PEER = "unknown peer"
AUDIT = "policy.weir.dev/audit"
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
# Of a ClusterNetworkPolicy, by direction.
PEERS = {
    INGRESS: {"namespaces", "pods"},
    EGRESS: {"namespaces", "pods", "nodes", "networks"},
}


@dataclass(frozen=True)
class Decider:
    """A policy as Weir's tools print it ("NAMESPACE/NAME", or "ClusterNetworkPolicy NAME"), and
    the index of its rule in spec.ingress or spec.egress; None: it isolates, and no rule allows."""

    policy: str
    rule: int | None


@dataclass(frozen=True)
class Decision:
    """What one end says. `tier` is the one that decided: ADMIN, NETWORK_POLICY, BASELINE,
    UNKNOWN_PEER, or "" when no policy did. `by`: the one rule of a ClusterNetworkPolicy; all rules
    of NetworkPolicies that allow it; all policies that isolate, if none allows."""

    allowed: bool
    tier: str = ""
    by: tuple[Decider, ...] = ()


@dataclass
class Cluster:
    """Objects by name, or by (namespace, name)."""

    namespaces: dict[str, Json] = field(default_factory=dict)
    nodes: dict[str, Json] = field(default_factory=dict)
    pods: dict[Name, Json] = field(default_factory=dict)
    policies: dict[Name, Json] = field(default_factory=dict)
    cluster_policies: dict[str, Json] = field(default_factory=dict)

    def put(self, thing: Json) -> None:
        """A new object, or its new state."""
        self._of(thing["kind"])[self._key(thing)] = thing

    def take(self, thing: Json) -> None:
        self._of(thing["kind"]).pop(self._key(thing), None)

    def _of(self, kind: str) -> dict[Any, Json]:
        stores: dict[str, dict[Any, Json]] = {
            "Namespace": self.namespaces,
            "Node": self.nodes,
            "Pod": self.pods,
            "NetworkPolicy": self.policies,
            "ClusterNetworkPolicy": self.cluster_policies,
        }
        return stores[kind]

    @staticmethod
    def _key(thing: Json) -> str | Name:
        meta = thing["metadata"]
        if thing["kind"] in ("Pod", "NetworkPolicy"):
            return meta["namespace"], meta["name"]
        return str(meta["name"])

    # Questions

    def allows(self, source: str, target: str, protocol: str, port: int) -> bool:
        """Whether a new flow may be: "TCP", "UDP" or "SCTP"; anything else has no ports."""
        return all(
            self.decision(direction, source, target, protocol, port).allowed
            for direction in (EGRESS, INGRESS)
        )

    def decision(
        self, direction: str, source: str, target: str, protocol: str, port: int
    ) -> Decision:
        """What the policies of the source (EGRESS) or of the target (INGRESS) say."""
        own, peer = (source, target) if direction == EGRESS else (target, source)
        pod = self.pod_at(own)
        if pod is None or pod is self.pod_at(peer):
            return Decision(True)
        own_node = peer in node_addresses(self.nodes.get(pod["spec"]["nodeName"]))
        if own_node and direction == INGRESS:
            return Decision(True)
        question = _Question(self, direction, pod, peer, target, protocol, port)
        if self.is_nobodys(peer) and question.has_cluster_rules():
            return Decision(False, UNKNOWN_PEER)
        return (
            question.by_cluster_policies(ADMIN)
            or question.by_network_policies(own_node)
            or question.by_cluster_policies(BASELINE)
            or Decision(True)
        )

    def audited(self, address: str) -> bool:
        """Whether its pod's policies only report what they would deny."""
        pod = self.pod_at(address)
        if pod is None:
            return False
        meta = self.namespaces[pod["metadata"]["namespace"]]["metadata"]
        return (meta.get("annotations") or {}).get(AUDIT) == "true"

    # Who is where

    def pod_at(self, address: str) -> Json | None:
        for pod in self.pods.values():
            if address in pod_addresses(pod) and pod["metadata"]["namespace"] in self.namespaces:
                return pod
        return None

    def nodes_at(self, address: str) -> list[Json]:
        return [node for node in self.nodes.values() if address in node_addresses(node)]

    def is_nobodys(self, address: str) -> bool:
        """Of a pod CIDR, but no pod or node that is known has it."""
        if self.pod_at(address) is not None or self.nodes_at(address):
            return False
        return any(
            within(address, cidr)
            for node in self.nodes.values()
            for cidr in node.get("spec", {}).get("podCIDRs") or []
        )


@dataclass
class _Question:
    """One flow as one end sees it. `pod` is this end's, `peer` the other end's address."""

    cluster: Cluster
    direction: str
    pod: Json
    peer: str
    target: str
    protocol: str
    port: int

    # ClusterNetworkPolicy

    def has_cluster_rules(self) -> bool:
        return any(
            not self._is_lost(rule)
            for policy in self.cluster.cluster_policies.values()
            if self._is_subject(policy["spec"]["subject"])
            for rule in policy["spec"].get(self.direction.lower()) or []
        )

    def by_cluster_policies(self, tier: str) -> Decision | None:
        """None: it passed, or nothing matched."""
        ordered = sorted(
            self.cluster.cluster_policies.values(),
            key=lambda policy: (policy["spec"]["priority"], policy["metadata"]["name"]),
        )
        for policy in ordered:
            spec = policy["spec"]
            if spec["tier"] != tier or not self._is_subject(spec["subject"]):
                continue
            for index, rule in enumerate(spec.get(self.direction.lower()) or []):
                action = self._action(rule)
                if action == "Pass":
                    return None
                if action is not None:
                    name = f"ClusterNetworkPolicy {policy['metadata']['name']}"
                    return Decision(action == "Accept", tier, (Decider(name, index),))
        return None

    def _parts(self, rule: Json) -> tuple[list[Json], list[Json], bool]:
        """Peers and protocols that are understood, and whether that is the whole rule."""
        peers = rule.get("from" if self.direction == INGRESS else "to") or []
        protocols = rule.get("protocols") or []
        understood = [peer for peer in peers if _whole(peer, PEERS[self.direction])]
        readable = [protocol for protocol in protocols if _whole_protocol(protocol)]
        whole = bool(peers) and (understood, readable) == (peers, protocols)
        return understood, readable, whole

    def _is_lost(self, rule: Json) -> bool:
        """An Accept of which nothing is understood."""
        peers, protocols, _ = self._parts(rule)
        return rule["action"] == "Accept" and (
            not peers or (bool(rule.get("protocols")) and not protocols)
        )

    def _action(self, rule: Json) -> str | None:
        """Accept, Deny or Pass if the rule matches."""
        understood, readable, whole = self._parts(rule)
        if not whole and rule["action"] != "Accept":
            return "Deny"
        if not any(self._is_cluster_peer(peer) for peer in understood):
            return None
        if rule.get("protocols") and not any(self._is_protocol(protocol) for protocol in readable):
            return None
        return str(rule["action"])

    def _is_subject(self, subject: Json) -> bool:
        return self._is_pod(self.pod, subject)

    def _is_pod(self, pod: Json | None, wanted: Json) -> bool:
        """Whether `namespaces` or `pods`, as subject or peer, select a pod."""
        if pod is None:
            return False
        namespace = self.cluster.namespaces[pod["metadata"]["namespace"]]
        if "namespaces" in wanted:
            return selects(wanted["namespaces"], labels(namespace))
        if "pods" in wanted:
            return selects(wanted["pods"].get("namespaceSelector"), labels(namespace)) and (
                selects(wanted["pods"].get("podSelector"), labels(pod))
            )
        return False

    def _is_cluster_peer(self, peer: Json) -> bool:
        if self.cluster.is_nobodys(self.peer):
            return False
        if "nodes" in peer:
            return any(
                selects(peer["nodes"], labels(node)) for node in self.cluster.nodes_at(self.peer)
            )
        if "networks" in peer:
            return any(within(self.peer, cidr) for cidr in peer["networks"])
        return self._is_pod(self.cluster.pod_at(self.peer), peer)

    def _is_protocol(self, wanted: Json) -> bool:
        if "destinationNamedPort" in wanted:
            return self._named(wanted["destinationNamedPort"]) == self.port
        ((name, match),) = wanted.items()
        if name.upper() != self.protocol:
            return False
        destination = match["destinationPort"]
        if "number" in destination:
            return bool(destination["number"] == self.port)
        return bool(destination["range"]["start"] <= self.port <= destination["range"]["end"])

    # NetworkPolicy

    def by_network_policies(self, own_node: bool) -> Decision | None:
        """None: no policy isolates the pod in this direction."""
        isolating: list[Decider] = []
        allowing: list[Decider] = []
        for (namespace, name), policy in sorted(self.cluster.policies.items()):
            spec = policy["spec"]
            if namespace != self.pod["metadata"]["namespace"] or (
                self.direction not in policy_types(spec)
            ):
                continue
            if not selects(spec.get("podSelector"), labels(self.pod)):
                continue
            isolating.append(Decider(f"{namespace}/{name}", None))
            for index, rule in enumerate(spec.get(self.direction.lower()) or []):
                if self._is_allowed_by(rule, namespace):
                    allowing.append(Decider(f"{namespace}/{name}", index))
        if not isolating:
            return None
        if allowing or own_node:
            return Decision(True, NETWORK_POLICY, tuple(allowing))
        return Decision(False, NETWORK_POLICY, tuple(isolating))

    def _is_allowed_by(self, rule: Json, namespace: str) -> bool:
        peers = rule.get("from" if self.direction == INGRESS else "to")
        ports = rule.get("ports")
        if peers and not any(self._is_peer(peer, namespace) for peer in peers):
            return False
        return not ports or any(self._is_port(port) for port in ports)

    def _is_peer(self, peer: Json, namespace: str) -> bool:
        if "ipBlock" in peer:
            if self.cluster.is_nobodys(self.peer):
                return False
            block = peer["ipBlock"]
            return within(self.peer, block["cidr"]) and not any(
                within(self.peer, hole) for hole in block.get("except") or []
            )
        pod = self.cluster.pod_at(self.peer)
        if pod is None:
            return False
        where = pod["metadata"]["namespace"]
        if "namespaceSelector" in peer:
            if not selects(peer["namespaceSelector"], labels(self.cluster.namespaces[where])):
                return False
        elif where != namespace:
            return False
        return selects(peer.get("podSelector"), labels(pod))

    def _is_port(self, wanted: Json) -> bool:
        if wanted.get("protocol", "TCP") != self.protocol:
            return False
        first = wanted.get("port")
        if first is None:
            return True
        if isinstance(first, int):
            return bool(first <= self.port <= wanted.get("endPort", first))
        return self._named(first) == self.port

    def _named(self, name: str) -> int | None:
        """The port of that name which the destination has for this protocol."""
        pod = self.cluster.pod_at(self.target)
        if pod is None:
            return None
        for port in container_ports(pod):
            if port.get("name") == name and port.get("protocol", "TCP") == self.protocol:
                return int(port["containerPort"])
        return None


def _whole(thing: Json, kinds: set[str]) -> bool:
    """Whether a peer or a part of a protocol is of one kind that we know."""
    return len(thing) == 1 and set(thing) <= kinds


def _whole_protocol(protocol: Json) -> bool:
    if "destinationNamedPort" in protocol:
        return len(protocol) == 1
    return (
        _whole(protocol, {"tcp", "udp", "sctp"})
        and all(_whole(match, {"destinationPort"}) for match in protocol.values())
        and all(
            _whole(match["destinationPort"], {"number", "range"}) for match in protocol.values()
        )
    )


def pod_addresses(pod: Json) -> list[str]:
    """None of its own in the host's network, when not scheduled, or when it has finished."""
    if pod["spec"].get("hostNetwork") or not pod["spec"].get("nodeName"):
        return []
    if pod["status"].get("phase") in {"Succeeded", "Failed"}:
        return []
    return [entry["ip"] for entry in pod["status"].get("podIPs", [])]


def node_addresses(node: Json | None) -> list[str]:
    """Those that are addresses: names are listed there too."""
    if node is None:
        return []
    listed = node.get("status", {}).get("addresses") or []
    return [entry["address"] for entry in listed if is_address(entry["address"])]


def container_ports(pod: Json) -> Iterator[Json]:
    """Of containers, then of init containers that keep running."""
    sidecars = [
        c for c in pod["spec"].get("initContainers", []) if c.get("restartPolicy") == "Always"
    ]
    for container in [*pod["spec"]["containers"], *sidecars]:
        yield from container.get("ports") or []


def labels(thing: Json) -> Json:
    found: Json = thing["metadata"].get("labels") or {}
    return found


def policy_types(spec: Json) -> list[str]:
    if spec.get("policyTypes"):
        return list(spec["policyTypes"])
    return [INGRESS, EGRESS] if spec.get("egress") else [INGRESS]


def selects(selector: Json | None, on: Json) -> bool:
    for key, value in ((selector or {}).get("matchLabels") or {}).items():
        if key not in on or on[key] != value:
            return False
    for expression in (selector or {}).get("matchExpressions") or []:
        key, values = expression["key"], expression.get("values") or []
        found = {
            "In": key in on and on[key] in values,
            "NotIn": key not in on or on[key] not in values,
            "Exists": key in on,
            "DoesNotExist": key not in on,
        }
        if not found[expression["operator"]]:
            return False
    return True


@lru_cache(10_000)
def address(text: str) -> IpAddress:
    return ipaddress.ip_address(text)


@lru_cache(10_000)
def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


@lru_cache(10_000)
def network(text: str) -> IpNetwork:
    """Blocks of IPv4-mapped addresses are IPv4's, as Go's net.ParseCIDR has them."""
    found = ipaddress.ip_network(text, strict=False)
    if isinstance(found, ipaddress.IPv6Network) and found.subnet_of(MAPPED):
        low = int(found.network_address) & 0xFFFFFFFF
        return ipaddress.IPv4Network((low, found.prefixlen - 96))
    return found


@lru_cache(100_000)
def within(ip: str, cidr: str) -> bool:
    """Never across families."""
    return address(ip) in network(cidr)
