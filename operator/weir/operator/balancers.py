# SPDX-License-Identifier: Apache-2.0
"""What a Service of type LoadBalancer wants of the allocator, and what its status says now.

Parsed apart from `weir.operator.services`, which is what nodes serve: only the leader needs this,
and only of these Services. Whether a Service is ours to serve is told here too: its class is
ours, or it has none and the setting says that such are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from weir.api.address import Addr, is_ipv4, parse
from weir.operator import wire
from weir.operator.conditions import Condition
from weir.operator.objects import PROTOCOLS, Key, Labels, Parsed, Problem, labels_of
from weir.operator.objects import key_of as key_of_meta

IPS = "weir.dev/load-balancer-ips"
SHARING_KEY = "weir.dev/load-balancer-sharing-key"
SHARING_NAMESPACES = "weir.dev/load-balancer-sharing-namespaces"
ASSIGNED = "weir.dev/AddressesAssigned"  # type of our condition
EVERYWHERE = "*"
FAMILIES = {"IPv4": True, "IPv6": False}


class Meta(wire.Meta):
    annotations: dict[str, str] | None = None


class Port(wire.Struct):
    protocol: str | None = None
    port: int | None = None


class Spec(wire.Struct):
    type: str | None = None
    ports: list[Port] | None = None
    selector: dict[str, str] | None = None
    ip_families: list[str] | None = None
    external_traffic_policy: str | None = None
    load_balancer_class: str | None = None
    load_balancer_ip: str | None = msgspec.field(default=None, name="loadBalancerIP")


class Ingress(wire.Struct):
    ip: str | None = None
    hostname: str | None = None
    ip_mode: str | None = None


class LoadBalancer(wire.Struct):
    ingress: list[Ingress] | None = None


class Status(wire.Struct):
    load_balancer: LoadBalancer | None = None
    conditions: list[Condition] | None = None


class WireBalancer(wire.Struct):
    metadata: Meta = msgspec.field(default_factory=Meta)
    spec: Spec = msgspec.field(default_factory=Spec)
    status: Status = msgspec.field(default_factory=Status)


@dataclass(frozen=True, slots=True)
class Sharing:
    """With whom a Service shares an address: those who name the same key, in its own namespace or
    in those that both name."""

    key: str = ""  # empty: with nobody
    namespaces: frozenset[str] = frozenset()

    def lets_in(self, namespace: str) -> bool:
        return EVERYWHERE in self.namespaces or namespace in self.namespaces


@dataclass(frozen=True, slots=True)
class Wish:
    """What decides about addresses."""

    key: Key
    labels: Labels
    created: str
    families: tuple[bool, ...]  # whether IPv4, in the Service's order
    requested: tuple[Addr, ...]
    sharing: Sharing
    ports: frozenset[tuple[int, int]]  # protocol, port
    local: bool  # externalTrafficPolicy: Local
    selector: Labels
    explicit: bool  # it names our class

    def order(self) -> tuple[str, Key]:
        """Who keeps an address that two have: the older."""
        return (self.created, self.key)


@dataclass(frozen=True, slots=True)
class Shown:
    """What the status says."""

    addresses: tuple[Addr, ...] = ()
    odd: bool = False  # has something that we would not write: a host name, another ipMode
    condition: Condition | None = None


@dataclass(frozen=True, slots=True)
class Balancer:
    wish: Wish
    shown: Shown
    uid: str
    resource_version: str
    problems: tuple[Problem, ...] = field(default=())


def parse_balancer(raw: WireBalancer, our_class: str, classless: bool) -> Parsed[Balancer]:
    """Nothing comes out of a Service that is not ours, whatever it looks like."""
    meta, spec = raw.metadata, raw.spec
    named = spec.load_balancer_class or ""
    ours = named == our_class if named else classless
    if spec.type != "LoadBalancer" or not ours:
        return Parsed(None)
    problems: list[Problem] = []
    annotations = meta.annotations or {}
    policy = spec.external_traffic_policy
    ports = {
        (PROTOCOLS[port.protocol or "TCP"], port.port)
        for port in spec.ports or []
        if port.port and (port.protocol or "TCP") in PROTOCOLS
    }
    wish = Wish(
        key=key_of_meta(meta),
        labels=labels_of(meta),
        created=meta.creation_timestamp or "",
        families=tuple(FAMILIES[f] for f in spec.ip_families or ["IPv4"] if f in FAMILIES),
        requested=_requested(annotations, spec, problems),
        sharing=_sharing(annotations),
        ports=frozenset(ports),
        local=policy == "Local",
        selector=tuple(sorted((spec.selector or {}).items())),
        explicit=bool(named),
    )
    return Parsed(
        Balancer(wish, _shown(raw.status), meta.uid, meta.resource_version, tuple(problems))
    )


def _requested(
    annotations: Mapping[str, str], spec: Spec, problems: list[Problem]
) -> tuple[Addr, ...]:
    """The annotation can name more than one, and comes before the deprecated field."""
    where, words = f"metadata.annotations[{IPS}]", annotations.get(IPS)
    if words is None:
        where, words = "spec.loadBalancerIP", spec.load_balancer_ip or ""
    found: dict[Addr, None] = {}
    for part in filter(None, (part.strip() for part in words.split(","))):
        try:
            found[parse(part)] = None
        except ValueError as error:
            problems.append(Problem(where, str(error)))
    return tuple(found)


def _sharing(annotations: Mapping[str, str]) -> Sharing:
    key = annotations.get(SHARING_KEY, "").strip()
    if not key:
        return Sharing()
    names = (part.strip() for part in annotations.get(SHARING_NAMESPACES, "").split(","))
    return Sharing(key, frozenset(filter(None, names)))


def _shown(raw: Status) -> Shown:
    found: dict[Addr, None] = {}
    odd = False
    for entry in (raw.load_balancer.ingress if raw.load_balancer else None) or []:
        try:
            found[parse(entry.ip or "")] = None
        except ValueError:
            odd = True
        odd |= bool(entry.hostname) or entry.ip_mode != "VIP"
    condition = next((c for c in raw.conditions or [] if c.type == ASSIGNED), None)
    return Shown(tuple(found), odd, condition)


def share(one: Wish, other: Wish) -> str:
    """Why two Services cannot have one address. Empty: they can."""
    if not one.sharing.key or one.sharing.key != other.sharing.key:
        return f"without the same annotation {SHARING_KEY}"
    mine, theirs = one.key.namespace, other.key.namespace
    if mine != theirs and not (one.sharing.lets_in(theirs) and other.sharing.lets_in(mine)):
        return f"as not both let in the other's namespace by annotation {SHARING_NAMESPACES}"
    if common := one.ports & other.ports:
        names = {number: name for name, number in PROTOCOLS.items()}
        protocol, port = min(common)
        return f"as both have port {port}/{names[protocol]}"
    if one.local != other.local:
        return "as one has externalTrafficPolicy Local and the other has not"
    if one.local and one.selector != other.selector:
        return "as externalTrafficPolicy is Local and their selectors differ"
    return ""


def family_name(ipv4: bool) -> str:
    return "IPv4" if ipv4 else "IPv6"


def of_family(addresses: tuple[Addr, ...], ipv4: bool) -> list[Addr]:
    return [addr for addr in addresses if is_ipv4(addr) == ipv4]
