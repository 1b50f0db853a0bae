# SPDX-License-Identifier: Apache-2.0
"""Small clusters for tests of the agent: pods, policies, and an independent verdict.

`verdict` reads the specification (policies over selectors). `Judge` reads map rows as the
programs do. That both agree is what the tests are about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from weir.agent import resources
from weir.agent.resources import (
    Action,
    NamedPort,
    PortRange,
    Resource,
    Tier,
    WireClass,
    WireSelector,
)
from weir.api.address import Addr, parse
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.datapath import records

TCP, UDP = 6, 17


@dataclass(frozen=True)
class Pod:
    selectors: frozenset[str]
    ports: tuple[NamedPort, ...] = ()


@dataclass(frozen=True)
class Rule:
    egress: bool
    peers: frozenset[str] | None
    ports: tuple[PortRange, ...] = ()
    action: Action = Action.ACCEPT


@dataclass(frozen=True)
class Policy:
    subject: str
    ingress: bool
    egress: bool
    rules: tuple[Rule, ...] = ()
    tier: Tier = Tier.NETWORK_POLICY
    priority: int = 0


@dataclass(frozen=True)
class World:
    """Pods by number (their address ends in it), policies by name."""

    pods: Mapping[int, Pod] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)

    def selectors(self) -> frozenset[str]:
        named = {policy.subject for policy in self.policies.values()}
        for policy in self.policies.values():
            for rule in policy.rules:
                named |= rule.peers or set()
        return frozenset(named)

    def port_names(self) -> frozenset[str]:
        return frozenset(
            port.name
            for policy in self.policies.values()
            for rule in policy.rules
            for port in rule.ports
            if port.name
        )

    def resources(self, offset: int = 0) -> dict[str, Resource]:
        """As an operator would send it; `offset` shifts its wire numbers."""
        numbers = {
            key: WireSelector(n + offset + 1) for n, key in enumerate(sorted(self.selectors()))
        }
        result: dict[str, Resource] = {
            f"selector/{number}": resources.Selector(number, key) for key, number in numbers.items()
        }
        classes: dict[tuple[frozenset[str], tuple[NamedPort, ...]], WireClass] = {}
        names = self.port_names()
        for pod_number, pod in self.pods.items():
            content = (
                pod.selectors & self.selectors(),
                tuple(port for port in pod.ports if port.name in names),
            )
            wire = classes.setdefault(content, WireClass(len(classes) + offset + 1))
            item = resources.Class(wire, tuple(numbers[key] for key in content[0]), content[1])
            result[f"class/{wire}"] = item
            addr = address(pod_number)
            result[f"address/{addr.hex()}"] = resources.Address(addr, wire, "ns", f"p{pod_number}")
            result[f"pod/u{pod_number}"] = resources.Pod(
                "ns", f"p{pod_number}", f"u{pod_number}", wire
            )
        for name, policy in self.policies.items():
            rules = tuple(
                resources.Rule(
                    rule.egress,
                    index,
                    rule.peers is None,
                    tuple(numbers[key] for key in rule.peers or ()),
                    rule.ports,
                    rule.action,
                )
                for index, rule in enumerate(policy.rules)
            )
            namespaced = policy.tier == Tier.NETWORK_POLICY
            result[f"policy/ns/{name}" if namespaced else f"cluster-policy/{name}"] = (
                resources.Policy(
                    "ns" if namespaced else "",
                    name,
                    numbers[policy.subject],
                    policy.ingress,
                    policy.egress,
                    rules,
                    policy.tier,
                    policy.priority,
                )
            )
        return result

    def verdict(self, source: int, destination: int, protocol: int, port: int) -> bool:
        return self._allows(True, source, destination, destination, protocol, port) and (
            self._allows(False, destination, source, destination, protocol, port)
        )

    def _allows(
        self, egress: bool, subject: int, peer: int, destination: int, protocol: int, port: int
    ) -> bool:
        about = {
            name: policy
            for name, policy in self.policies.items()
            if policy.subject in self.pods[subject].selectors
            and (policy.egress if egress else policy.ingress)
        }

        def matching(tier: Tier) -> list[Rule]:
            """Rules that match, in their order."""
            names = [name for name, policy in about.items() if policy.tier == tier]
            names.sort(key=lambda name: (about[name].priority, name))
            return [
                rule
                for name in names
                for rule in about[name].rules
                if rule.egress == egress
                and (rule.peers is None or rule.peers & self.pods[peer].selectors)
                and (
                    not rule.ports
                    or any(self._port(item, destination, protocol, port) for item in rule.ports)
                )
            ]

        for rule in matching(Tier.ADMIN)[:1]:
            if rule.action != Action.PASS:
                return rule.action == Action.ACCEPT
        if any(policy.tier == Tier.NETWORK_POLICY for policy in about.values()):
            return bool(matching(Tier.NETWORK_POLICY))
        return all(rule.action != Action.DENY for rule in matching(Tier.BASELINE)[:1])

    def _port(self, item: PortRange, destination: int, protocol: int, port: int) -> bool:
        if item.protocol != protocol:
            return False
        if item.name:
            return NamedPort(item.name, protocol, port) in self.pods[destination].ports
        return item.first <= port <= item.last


class Judge:
    """Verdicts from map rows, as from_pod reaches them."""

    def __init__(
        self,
        endpoints: Mapping[Addr, records.Endpoint],
        addresses: Mapping[Addr, records.Address],
        policy: Mapping[records.PolicyKey, records.PolicyVerdict],
    ) -> None:
        self.endpoints = endpoints
        self.addresses = addresses
        self.policy = policy

    def verdict(self, source: int, destination: int, protocol: int, port: int) -> bool:
        here, there = address(source), address(destination)
        if here in self.endpoints:
            isolation = self.endpoints[here].egress
            if not self._allows(isolation, self._class(there), protocol, port):
                return False
        if there in self.endpoints:
            isolation = self.endpoints[there].ingress
            return self._allows(isolation, self._class(here), protocol, port)
        return True

    def _class(self, addr: Addr) -> int:
        if addr in self.endpoints:
            return self.endpoints[addr].class_
        return self.addresses[addr].class_ if addr in self.addresses else 1

    def _allows(self, isolation: records.Isolation, peer: int, protocol: int, port: int) -> bool:
        if not isolation.rule_set:
            return True
        if isolation.levels & records.IsolationFlag.SHUT:
            return False
        if not isolation.levels & records.IsolationFlag.ORDERED:
            return bool(self._hits(isolation, peer, protocol, port, 0))
        for tier in (records.PolicyLevel.ADMIN, 0):
            hits = self._hits(isolation, peer, protocol, port, tier)
            first = min(hits, key=lambda hit: hit.order, default=None)
            if first is not None and first.verdict != records.Verdict.PASS:
                return first.verdict == records.Verdict.ALLOW
        return bool(isolation.levels & records.IsolationFlag.DEFAULT_ALLOW)

    def _hits(
        self, isolation: records.Isolation, peer: int, protocol: int, port: int, tier: int
    ) -> list[records.PolicyVerdict]:
        found = []
        for level in range(18):
            if not isolation.levels >> level & 1:
                continue
            for number in (peer, 0):
                if level == 17:
                    key = records.PolicyKey(isolation.rule_set, number, 0, 0, 17 | tier)
                else:
                    masked = port >> (16 - level) << (16 - level)
                    key = records.PolicyKey(
                        isolation.rule_set, number, masked, protocol, level | tier
                    )
                if key in self.policy:
                    found.append(self.policy[key])
        return found


def address(number: int) -> Addr:
    return parse(f"10.0.{number >> 8}.{number & 255}")


def endpoint(number: int) -> LocalEndpoint:
    return LocalEndpoint(
        container_id=f"c{number}",
        netns=f"/run/netns/{number}",
        ifname="eth0",
        host_ifname=f"weir{number:011x}",
        ifindex=100 + number,
        mac=b"\2\0\0\0\0" + bytes([number]),
        host_mac=b"\2\0\0\0\1" + bytes([number]),
        addresses=(address(number),),
        pod=PodRef("ns", f"p{number}", f"u{number}"),
    )


def difference(
    old: Mapping[str, Resource], new: Mapping[str, Resource]
) -> dict[str, Resource | None]:
    """The change from one set of resources to another."""
    changes: dict[str, Resource | None] = dict.fromkeys(old.keys() - new.keys())
    changes.update({name: item for name, item in new.items() if old.get(name) != item})
    return changes


def questions(numbers: Iterable[int]) -> list[tuple[int, int, int, int]]:
    """(source, destination, protocol, port) of all pairs, at the ports that tests use."""
    numbers = list(numbers)
    return [
        (a, b, protocol, port)
        for a in numbers
        for b in numbers
        if a != b
        for protocol in (TCP, UDP)
        for port in (80, 81, 443, 5000)
    ]
