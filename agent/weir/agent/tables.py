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
from weir.agent.announced import AnnouncedTable, Segment
from weir.agent.blocks import BlockTable
from weir.agent.classes import ClassContent, Numbers
from weir.agent.frontends import ALL_ADDRESSES, NodePortRule, ServiceFacts, node_port_addresses
from weir.agent.identity import CLASS_FIRST, Identity
from weir.agent.netns import NetnsTable
from weir.agent.placement import Placement
from weir.agent.policy import PolicyTables
from weir.agent.resources import Action, Resource, WireClass, WireSelector
from weir.agent.routes import HostRoute, RouteFacts, RouteTables
from weir.agent.rows import Change, RowsLike
from weir.agent.rule_sets import (
    FIRST_RULE_SET,
    STAGES,
    PolicyContent,
    PolicyName,
    PolicyRule,
    RuleName,
    RuleSetKey,
    describe_policy,
    port_spec,
)
from weir.agent.services import HOST_PORTS, ServiceName, ServiceTables, describe
from weir.agent.topology import Place
from weir.agent.wanted import Exposed
from weir.api.address import Addr, Cidr, text
from weir.cni.endpoint import LocalEndpoint
from weir.datapath import records


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """Of the configuration, for all Services. maglev_table_size: 0 chooses at random."""

    node_ports: NodePortRule = ALL_ADDRESSES
    maglev_table_size: int = 0
    dsr: bool = False


VERDICTS = {
    Action.ACCEPT: records.Verdict.ALLOW,
    Action.DENY: records.Verdict.DENY,
    Action.PASS: records.Verdict.PASS,
}


@dataclass(frozen=True, slots=True)
class Delta:
    """Changed rows of all maps, old and new."""

    services: dict[records.ServiceKey, Change[records.Service]] = field(default_factory=dict)
    backends: dict[records.BackendKey, Change[records.Backend]] = field(default_factory=dict)
    maglev: dict[records.MaglevKey, Change[records.MaglevBlock]] = field(default_factory=dict)
    source_ranges: dict[records.SourceRangeKey, Change[int]] = field(default_factory=dict)
    netns_addresses: dict[int, Change[records.NetnsAddresses]] = field(default_factory=dict)
    addresses: dict[Addr, Change[records.Address]] = field(default_factory=dict)
    prefixes: dict[records.PrefixKey, Change[records.Prefix]] = field(default_factory=dict)
    endpoints: dict[Addr, Change[records.Endpoint]] = field(default_factory=dict)
    policy: dict[records.PolicyKey, Change[records.PolicyVerdict]] = field(default_factory=dict)
    routes: dict[records.PrefixKey, Change[records.Route]] = field(default_factory=dict)
    blocked: dict[records.PrefixKey, Change[records.Blocked]] = field(default_factory=dict)
    announced: dict[Addr, Change[records.Announced]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)


class Projection:
    """`audit`: no policy drops anything on this node."""

    def __init__(self, settings: ServiceSettings | None = None, *, audit: bool = False) -> None:
        self._settings = settings or ServiceSettings()
        self.rule_numbers: Numbers[RuleName] = Numbers(1)
        self.rule_set_numbers: Numbers[RuleSetKey] = Numbers(FIRST_RULE_SET)
        self.class_numbers: Numbers[ClassContent] = Numbers(CLASS_FIRST)
        self.policy = PolicyTables(self.rule_set_numbers)
        self.identity = Identity(self.class_numbers, self.policy)
        self.placement = Placement(self.identity, self.policy, audit=audit)
        self.services = ServiceTables()
        self.netns = NetnsTable()
        self.routes = RouteTables()
        self.blocks = BlockTable()
        self.announced = AnnouncedTable()
        self._tables: dict[str, RowsLike[Any, Any]] = {
            rows.name: rows
            for rows in (
                self.services.services,
                self.services.backends,
                self.services.maglev,
                self.services.source_ranges,
                self.netns.rows,
                self.placement.addresses,
                self.placement.prefixes,
                self.placement.endpoints,
                self.policy.rows,
                self.routes.rows,
                self.blocks.rows,
                self.announced.rows,
            )
        }
        self._policies: dict[PolicyName, resources.Policy] = {}
        self._dirty_policies: set[PolicyName] = set()
        self._rules: dict[PolicyName, list[int]] = {}
        self._host_ports: dict[str, resources.Pod] = {}
        self._dirty_host_ports = False

    # ---- inputs

    def apply(self, changes: Mapping[str, Resource | None]) -> None:
        """One transaction of named resources; None: gone."""
        for name, item in changes.items():
            self._apply(name, item)

    def set_endpoint(self, endpoint: LocalEndpoint) -> None:
        self.placement.set_endpoint(endpoint)
        self.netns.set_endpoint(endpoint)
        self._dirty_host_ports = True

    def remove_endpoint(self, container_id: str) -> None:
        self.placement.remove_endpoint(container_id)
        self.netns.remove_endpoint(container_id)
        self._dirty_host_ports = True

    def set_facts(self, facts: RouteFacts, segments: tuple[Segment, ...] = ()) -> None:
        self.routes.set_facts(facts)
        self.announced.set_facts(facts.node, segments)

    # ---- outputs

    def project(self) -> None:
        nodes = self.routes.project()
        if nodes is not None:
            self.placement.set_nodes(nodes)
            self.services.set_facts(self._service_facts())
        selectors_changed = self.identity.selectors_changed
        self.placement.classes_changed(self.identity.resolve())
        self._project_policies(selectors_changed)
        self.placement.locate()
        self.placement.project(self.policy.project())
        self.identity.settle()
        self._project_host_ports()
        self.services.project()

    def take(self, *, compared: bool = False) -> Delta:
        """`compared`: Services will be compared with the kernel, which finds what changed. The
        many rows of their backends are then left out: there may be hundreds of thousands."""
        self.project()
        if compared:
            self.services.backends.forget()
            self.services.maglev.forget()
        return Delta(
            services=self.services.services.take(),
            backends=self.services.backends.take(),
            maglev=self.services.maglev.take(),
            source_ranges=self.services.source_ranges.take(),
            netns_addresses=self.netns.rows.take(),
            addresses=self.placement.addresses.take(),
            prefixes=self.placement.prefixes.take(),
            endpoints=self.placement.endpoints.take(),
            policy=self.policy.rows.take(),
            routes=self.routes.rows.take(),
            blocked=self.blocks.rows.take(),
            announced=self.announced.rows.take(),
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
                name = self.services.owner(key)
                return describe(name) if name is not None else f"address {text(key.address)}"
            case "backends" | "maglev":
                return self.services.owner_of_id(key.service)
            case "source_ranges":
                return self.services.owner_of_identity(key.identity)
            case "netns_addresses":
                return f"network namespace {key}"
            case "blocked":
                return self.blocks.owner(key)
            case "announced":
                return f"announced address {text(key)}"
            case "policy":
                names = self.policy.policies_of(key.rule_set)
                return "policy " + ", ".join(map(describe_policy, names))
            case "endpoints":
                located = self.placement.located(key)
                return f"pod {located.endpoint.pod}" if located else f"address {text(key)}"
            case "addresses":
                return f"address {text(key)}"
            case _:
                return f"prefix {Cidr(key.address, key.bits).text()}"

    @property
    def features(self) -> int:
        """RuntimeFeature bits."""
        announces = records.RuntimeFeature.ANNOUNCES if self.announced.rows.rows else 0
        return self.services.features | announces

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
                self.placement.set_pod(item.uid, item.wire_class, audit=item.audit)
                self._set_host_ports(item.uid, item)
            case resources.Blocked():
                self.blocks.set_list(item.name, item.cidrs)
            case resources.Announced():
                self.announced.set_address(item.address, item.node)
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
            case "cluster-policy":
                self._set_policy(("", rest), None)
            case "address":
                self.placement.set_pod_address(Addr(bytes.fromhex(rest)), None)
            case "prefix":
                prefix = Cidr(Addr(bytes.fromhex(first)), int(second))
                self.placement.set_prefix(prefix, None)
            case "blocked":
                self.blocks.remove_list(rest)
            case "announced":
                self.announced.set_address(Addr(bytes.fromhex(rest)), None)
            case "pod":
                self.placement.set_pod(rest, None)
                self._set_host_ports(rest, None)

    def _set_host_ports(self, uid: str, pod: resources.Pod | None) -> None:
        if pod is not None and pod.host_ports:
            self._host_ports[uid] = pod
            self._dirty_host_ports = True
        elif self._host_ports.pop(uid, None) is not None:
            self._dirty_host_ports = True

    def _project_host_ports(self) -> None:
        if not self._dirty_host_ports:
            return
        self._dirty_host_ports = False
        wanted: dict[ServiceName, Exposed] = {}
        for endpoint in self.placement.local.values() if self._host_ports else ():
            pod = self._host_ports.get(endpoint.pod.uid)
            if pod is not None:
                name = (pod.namespace, HOST_PORTS + pod.name)
                wanted[name] = Exposed(pod.host_ports, endpoint.addresses)
        self.services.set_exposed(wanted)

    def _service_facts(self) -> ServiceFacts:
        facts, own = self.routes.facts, self.routes.own_node
        local = (*facts.addresses, *facts.local)
        return ServiceFacts(
            place=Place(facts.node, own.zone if own else ""),
            node_ports_at=node_port_addresses(self._settings.node_ports, facts.addresses, local),
            own=frozenset(local),
            maglev_table_size=self._settings.maglev_table_size,
            dsr=self._settings.dsr,
        )

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
                result.append(self._rule(number, rule))
            return tuple(result)

        return PolicyContent(
            subject=self.identity.selector_key(item.subject),
            ingress=rules(False) if item.ingress else None,
            egress=rules(True) if item.egress else None,
            stage=STAGES[item.tier],
            priority=item.priority,
        )

    def _rule(self, number: int, rule: resources.Rule) -> PolicyRule:
        """A peer that is not known is nobody. Where nobody would mean that more passes, the rule
        denies everything."""
        if rule.action != Action.ACCEPT and not self.identity.knows_selectors(rule.peers):
            return PolicyRule(number, rule.index, None, (), records.Verdict.DENY)
        peers = frozenset(self.identity.selector_key(peer) for peer in rule.peers)
        ports = tuple(port_spec(p.protocol, p.first, p.last, p.name) for p in rule.ports)
        verdict = VERDICTS[rule.action]
        return PolicyRule(number, rule.index, None if rule.any_peer else peers, ports, verdict)
