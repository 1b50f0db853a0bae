# SPDX-License-Identifier: Apache-2.0
"""`weir policy why`, as far as one node can tell: the ends that are pods of it.

Each such end is asked about twice: what the policies say (weir.agent.verdict), and what the
programs will do with the maps as they are (weir.agent.judge). Ends elsewhere are named, with their
node, so that who asks all agents notices an end that nobody answered for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import msgspec

from weir.agent import verdict
from weir.agent.explain import Explainer, reason_text
from weir.agent.judge import Flow, Judged, judge
from weir.agent.model import ALL_BITS, Model, longest
from weir.agent.rule_sets import PolicyName, describe_policy
from weir.agent.tables import Projection
from weir.agent.verdict import PROTOCOLS, Near, Party, Question, Standing
from weir.agent.walks import Walks
from weir.api.address import Addr, is_ipv4, parse, text
from weir.datapath import records
from weir.datapath.datapath import Tables
from weir.datapath.records import Direction, DropReason, ServiceScope

NUMBERS = {"tcp": 6, "udp": 17, "sctp": 132}
ICMP, ICMPV6 = 1, 58
NO_TROUBLES: Mapping[PolicyName, str] = MappingProxyType({})


class BadQuestion(ValueError):
    """The user's mistake, in words for the user."""


class EndView(msgspec.Struct, frozen=True):
    """One end as the question named it. pod: namespace/name, or a word for what else the address
    is, or empty. node: that has the pod; empty if it is no pod's address. is_pod: it has a node
    that judges it, known or not. service: that has the address and port. blocked: BlockLists that
    have the address, whose packets nodes drop at their uplinks, ahead of policy."""

    given: str
    pod: str
    addresses: list[str]
    node: str
    is_pod: bool
    service: str
    blocked: list[str]


class PolicyView(msgspec.Struct, frozen=True):
    policy: str
    tier: str
    priority: int


class ModelView(msgspec.Struct, frozen=True):
    """allowed: by policy; audited: if not, it is let through all the same. rule: of `policy`, by
    which it is decided, if one does; because says it in words."""

    allowed: bool
    audited: bool
    ground: str
    because: str
    policies: list[PolicyView]
    policy: str
    rule: int | None
    near_misses: list[Near]
    change: str


class MapsView(msgspec.Struct, frozen=True):
    """allowed, audited: as in the model. reason: as `weir monitor` names it, "" if it is allowed.
    rule: what the row that decided is there for."""

    allowed: bool
    audited: bool
    reason: str
    rule: str
    rule_set: int
    source_class: int
    destination_class: int


class DirectionView(msgspec.Struct, frozen=True):
    """troubles: what the node cannot enforce as written, of the policies that are asked."""

    direction: str
    source: str
    destination: str
    protocol: str
    port: int
    model: ModelView
    maps: MapsView
    agree: bool
    troubles: list[str]


class WhyView(msgspec.Struct, frozen=True):
    source: EndView
    destination: EndView
    directions: list[DirectionView]


class KernelMaps:
    """The pinned maps. Each lookup is a system call."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def endpoint(self, addr: Addr) -> records.Endpoint | None:
        return self._tables.endpoints.get(addr)

    def address(self, addr: Addr) -> records.Address | None:
        return self._tables.addresses.get(addr)

    def route(self, addr: Addr) -> records.Route | None:
        return self._tables.routes.get(records.PrefixKey(ALL_BITS, addr))

    def prefix(self, addr: Addr) -> records.Prefix | None:
        return self._tables.prefixes.get(records.PrefixKey(ALL_BITS, addr))

    def policy(self, key: records.PolicyKey) -> records.PolicyVerdict | None:
        return self._tables.policy.get(key)


class Why:
    def __init__(self, projection: Projection, explainer: Explainer, walks: Walks) -> None:
        self._projection = projection
        self._explainer = explainer
        self._walks = walks

    async def answer(
        self, query: Mapping[str, str], troubles: Mapping[PolicyName, str] = NO_TROUBLES
    ) -> WhyView:
        """Raises BadQuestion; DatapathError or Exchanged if the maps cannot be read."""
        protocol, port = _asked(query)
        ends = [self._end(query.get(name, ""), protocol, port) for name in ("from", "to")]
        flows = [
            (Flow(source, destination, _of_family(protocol, source), port), direction)
            for source in map(parse, ends[0].addresses)
            for destination in map(parse, ends[1].addresses)
            if is_ipv4(source) == is_ipv4(destination)
            for direction, judged in ((Direction.EGRESS, source), (Direction.INGRESS, destination))
            if self._projection.placement.located(judged) is not None
        ]
        if not flows:
            return WhyView(ends[0], ends[1], [])
        model = Model(self._projection)
        by_model = [self._by_model(model, flow, direction) for flow, direction in flows]
        by_maps = await self._walks.read(
            lambda tables: [judge(KernelMaps(tables), flow, only) for flow, only in flows]
        )
        told = {describe_policy(name): text for name, text in troubles.items()}
        return WhyView(
            ends[0],
            ends[1],
            [
                _direction(flow, direction, said, self._maps_view(done), told)
                for (flow, direction), said, done in zip(flows, by_model, by_maps, strict=True)
            ],
        )

    def _end(self, given: str, protocol: int, port: int) -> EndView:
        if "/" in given:
            addresses = self._explainer.addresses_of(given)
            name = given
        else:
            try:
                addresses = (parse(given),)
            except ValueError as error:
                raise BadQuestion(f"{given!r} is neither namespace/pod nor an address") from error
            name = self._explainer.pod_name(addresses[0])
        nodes = {node for addr in addresses for node in self._nodes_of(addr)}
        owners = (
            self._projection.services.owner(
                records.ServiceKey(addr, port, protocol, ServiceScope.INTERNAL)
            )
            for addr in addresses
        )
        return EndView(
            given,
            name,
            [text(addr) for addr in addresses],
            min(nodes, default=""),
            bool(nodes) or "/" in given,
            next(("/".join(owner) for owner in owners if owner is not None), ""),
            [name for addr in addresses for name in self._blocked(addr)],
        )

    def _blocked(self, addr: Addr) -> tuple[str, ...]:
        row = longest(self._projection.blocks.rows.rows, addr)
        return self._projection.blocks.names(row.rule) if row is not None else ()

    def _nodes_of(self, addr: Addr) -> list[str]:
        """Whose pod CIDR has it."""
        return [
            node.name
            for node in self._projection.routes.nodes.values()
            if any(pod_cidr.contains(addr) for pod_cidr in node.pod_cidrs)
        ]

    def _party(self, model: Model, addr: Addr) -> Party:
        return model.party(addr, self._explainer.pod_name(addr) or text(addr))

    def question(self, model: Model, flow: Flow, direction: Direction) -> Question:
        """That one end of a flow asks the policies."""
        egress = direction is Direction.EGRESS
        here, there = (flow.source, flow.destination) if egress else (flow.destination, flow.source)
        subject, peer = self._party(model, here), self._party(model, there)
        placement = self._projection.placement
        at_here, at_there = placement.located(here), placement.located(there)
        if at_here is not None and at_there is not None and at_here.endpoint is at_there.endpoint:
            peer = replace(peer, standing=Standing.ITSELF)
        return Question(egress, subject, peer, flow.protocol, flow.port)

    def _by_model(self, model: Model, flow: Flow, direction: Direction) -> ModelView:
        question = self.question(model, flow, direction)
        here = flow.source if question.egress else flow.destination
        located = self._projection.placement.located(here)
        decision = model.decide(question)
        return ModelView(
            allowed=decision.allowed,
            audited=not decision.allowed and located is not None and located.audit,
            ground=decision.ground,
            because=verdict.because(decision, question),
            policies=[
                PolicyView(policy.title, verdict.tier_text(policy.tier), policy.priority)
                for policy in decision.policies
            ],
            policy=decision.by.title if decision.by else "",
            rule=decision.rule.index if decision.rule else None,
            near_misses=list(verdict.missed(decision, question)),
            change=verdict.change(decision, question),
        )

    def _maps_view(self, judged: Judged) -> MapsView:
        return MapsView(
            allowed=judged.reason is DropReason.NONE,
            audited=judged.audited,
            reason=reason_text(judged.reason) if judged.reason else "",
            rule=self._explainer.deciders(judged.rule, 0, judged.reason)[1],
            rule_set=judged.rule_set,
            source_class=judged.source_class,
            destination_class=judged.destination_class,
        )


def _direction(
    flow: Flow,
    direction: Direction,
    said: ModelView,
    done: MapsView,
    troubles: Mapping[str, str],
) -> DirectionView:
    return DirectionView(
        direction=direction.name.lower(),
        source=text(flow.source),
        destination=text(flow.destination),
        protocol=PROTOCOLS.get(flow.protocol, str(flow.protocol)),
        port=flow.port,
        model=said,
        maps=done,
        agree=(said.allowed, said.audited) == (done.allowed, done.audited),
        troubles=[
            f"{one.policy}: {troubles[one.policy]}"
            for one in said.policies
            if one.policy in troubles
        ],
    )


def _asked(query: Mapping[str, str]) -> tuple[int, int]:
    """Protocol and port; ICMP is that of the addresses' family."""
    name, port = query.get("protocol", "").lower(), query.get("port", "")
    if name == "icmp":
        if port:
            raise BadQuestion("icmp has no ports")
        return ICMP, 0
    if name not in NUMBERS:
        raise BadQuestion(f"protocol {name!r} is none of tcp, udp, sctp, icmp")
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise BadQuestion(f"port {port!r} is not a number from 1 to 65535")
    return NUMBERS[name], int(port)


def _of_family(protocol: int, addr: Addr) -> int:
    return ICMPV6 if protocol == ICMP and not is_ipv4(addr) else protocol
