# SPDX-License-Identifier: Apache-2.0
"""The projection: resources, local endpoints and node facts → desired rows of every map.

Pure and incremental: inputs mark what they touch, `project` brings the rows up to date, and
`take` hands out what changed since the last time. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weir.agent import resources
from weir.agent.classes import ClassContent, Numbers
from weir.agent.identity import CLASS_FIRST, Identity
from weir.agent.placement import Placement
from weir.agent.policy import (
    FIRST_RULE_SET,
    PolicyContent,
    PolicyName,
    PolicyRule,
    PolicyTables,
    RuleName,
    RuleSetKey,
    port_spec,
)
from weir.agent.resources import Resource, WireClass, WireSelector
from weir.agent.routes import HostRoute, RouteFacts, RouteTables
from weir.agent.rows import Change, RowsLike
from weir.agent.services import ServiceTables
from weir.api.address import Addr, Cidr, text
from weir.cni.endpoint import LocalEndpoint
from weir.datapath import records


@dataclass(frozen=True, slots=True)
class Delta:
    """Changed rows of all maps, old and new."""

    services: dict[records.ServiceKey, Change[records.Service]] = field(default_factory=dict)
    backends: dict[records.BackendKey, Change[records.Backend]] = field(default_factory=dict)
    addresses: dict[Addr, Change[records.Address]] = field(default_factory=dict)
    prefixes: dict[records.PrefixKey, Change[records.Prefix]] = field(default_factory=dict)
    endpoints: dict[Addr, Change[records.Endpoint]] = field(default_factory=dict)
    policy: dict[records.PolicyKey, Change[records.PolicyVerdict]] = field(default_factory=dict)
    routes: dict[records.PrefixKey, Change[records.Route]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


class Projection:
    def __init__(self) -> None:
        self.rule_numbers: Numbers[RuleName] = Numbers(1)
        self.rule_set_numbers: Numbers[RuleSetKey] = Numbers(FIRST_RULE_SET)
        self.class_numbers: Numbers[ClassContent] = Numbers(CLASS_FIRST)
        self.policy = PolicyTables(self.rule_set_numbers)
        self.identity = Identity(self.class_numbers, self.policy)
        self.placement = Placement(self.identity, self.policy)
        self.services = ServiceTables()
        self.routes = RouteTables()
        self._tables: dict[str, RowsLike[Any, Any]] = {
            rows.name: rows
            for rows in (
                self.services.services,
                self.services.backends,
                self.placement.addresses,
                self.placement.prefixes,
                self.placement.endpoints,
                self.policy.rows,
                self.routes.rows,
            )
        }
        self._policies: dict[PolicyName, resources.Policy] = {}
        self._dirty_policies: set[PolicyName] = set()
        self._rules: dict[PolicyName, list[int]] = {}

    # ---- inputs

    def apply(self, changes: Mapping[str, Resource | None]) -> None:
        """One transaction of named resources; None: gone."""
        for name, item in changes.items():
            self._apply(name, item)

    def set_endpoint(self, endpoint: LocalEndpoint) -> None:
        self.placement.set_endpoint(endpoint)

    def remove_endpoint(self, container_id: str) -> None:
        self.placement.remove_endpoint(container_id)

    def set_facts(self, facts: RouteFacts) -> None:
        self.routes.set_facts(facts)

    # ---- outputs

    def project(self) -> None:
        nodes = self.routes.project()
        if nodes is not None:
            self.placement.set_nodes(nodes)
        selectors_changed = self.identity.selectors_changed
        self.placement.classes_changed(self.identity.resolve())
        self._project_policies(selectors_changed)
        self.placement.locate()
        self.placement.project(self.policy.project())
        self.identity.settle()
        self.services.project()

    def take(self) -> Delta:
        self.project()
        return Delta(
            services=self.services.services.take(),
            backends=self.services.backends.take(),
            addresses=self.placement.addresses.take(),
            prefixes=self.placement.prefixes.take(),
            endpoints=self.placement.endpoints.take(),
            policy=self.policy.rows.take(),
            routes=self.routes.rows.take(),
        )

    def table(self, name: str) -> RowsLike[Any, Any]:
        """The desired rows of the map of that name."""
        return self._tables[name]

    def number_spaces(self) -> Mapping[str, Numbers[Any]]:
        return {
            "class": self.class_numbers,
            "rule set": self.rule_set_numbers,
            "rule": self.rule_numbers,
        }

    def owner(self, table: str, key: Any) -> str:
        """The object that a row is there for, as its user knows it."""
        match table:
            case "services":
                return "service " + "/".join(self.services.owner(key) or ("?", "?"))
            case "backends":
                return f"service {self.services.owner_of_backend(key)}"
            case "policy":
                names = self.policy.policies_of(key.rule_set)
                return "policy " + ", ".join("/".join(name) for name in names)
            case "endpoints":
                located = self.placement.located(key)
                return f"pod {located.endpoint.pod}" if located else f"address {text(key)}"
            case "addresses":
                return f"address {text(key)}"
            case _:
                return f"prefix {Cidr(key.address, key.bits).text()}"

    @property
    def host_routes(self) -> frozenset[HostRoute]:
        return self.routes.host_routes

    def policies(self) -> Mapping[PolicyName, resources.Policy]:
        return self._policies

    # ---- parts

    def _apply(self, name: str, item: Resource | None) -> None:
        kind, _, rest = name.partition("/")
        match item:
            case resources.Service():
                self.services.set_service(item)
            case resources.Slice():
                self.services.set_slice(name, item)
            case resources.Node():
                self.routes.set_node(rest, item)
            case resources.Selector():
                self.identity.set_selector(item.number, item.key)
            case resources.Class():
                self.identity.set_class(item.number, item)
            case resources.Policy():
                self._set_policy((item.namespace, item.name), item)
            case resources.Address():
                self.placement.set_pod_address(item.address, item.wire_class)
            case resources.Prefix():
                self.placement.set_prefix(item.cidr, item.wire_class)
            case resources.Pod():
                self.placement.set_pod(item.uid, item.wire_class)
            case None:
                self._remove(kind, rest)

    def _remove(self, kind: str, rest: str) -> None:
        first, _, second = rest.partition("/")
        match kind:
            case "service":
                self.services.remove_service((first, second))
            case "slice":
                self.services.remove_slice(f"slice/{rest}")
            case "node":
                self.routes.set_node(rest, None)
            case "selector":
                self.identity.set_selector(WireSelector(int(rest)), None)
            case "class":
                self.identity.set_class(WireClass(int(rest)), None)
            case "policy":
                self._set_policy((first, second), None)
            case "address":
                self.placement.set_pod_address(Addr(bytes.fromhex(rest)), None)
            case "prefix":
                prefix = Cidr(Addr(bytes.fromhex(first)), int(second))
                self.placement.set_prefix(prefix, None)
            case "pod":
                self.placement.set_pod(rest, None)

    def _set_policy(self, name: PolicyName, item: resources.Policy | None) -> None:
        if item is None:
            self._policies.pop(name, None)
        else:
            self._policies[name] = item
        self._dirty_policies.add(name)

    def _project_policies(self, selectors_changed: bool) -> None:
        dirty, self._dirty_policies = self._dirty_policies, set()
        if selectors_changed:
            dirty |= self._policies.keys()
        for name in dirty:
            item = self._policies.get(name)
            old = self._rules.pop(name, [])
            if item is None:
                self.policy.remove_policy(name)
            else:
                self.policy.set_policy(name, self._content(name, item))
            for number in old:
                self.rule_numbers.release(number)

    def _content(self, name: PolicyName, item: resources.Policy) -> PolicyContent:
        numbers = self._rules.setdefault(name, [])

        def rules(egress: bool) -> tuple[PolicyRule, ...]:
            result = []
            for rule in item.rules:
                if rule.egress != egress:
                    continue
                label = RuleName(item.namespace, item.name, egress, rule.index)
                number = self.rule_numbers.acquire(label)
                numbers.append(number)
                peers = frozenset(self.identity.selector_key(peer) for peer in rule.peers)
                ports = tuple(port_spec(p.protocol, p.first, p.last, p.name) for p in rule.ports)
                result.append(
                    PolicyRule(number, rule.index, None if rule.any_peer else peers, ports)
                )
            return tuple(result)

        return PolicyContent(
            subject=self.identity.selector_key(item.subject),
            ingress=rules(False) if item.ingress else None,
            egress=rules(True) if item.egress else None,
        )
