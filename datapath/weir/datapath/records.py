# SPDX-License-Identifier: Apache-2.0
"""The shared structs of abi.h as Python records, and its enums.

Nothing here decides a layout: the codec takes offsets and sizes from BTF and refuses
records whose fields are not the struct's members, in order. `class` is `class_` here;
pads are no fields. Flags and numbers are plain ints, the enums compare equal to them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from weir.api.address import Addr

MAGLEV_BLOCK = 256


class DropReason(IntEnum):
    NONE = 0
    MALFORMED = 1
    UNSUPPORTED_L2 = 2
    SPOOFED_SOURCE = 3
    POLICY_EGRESS = 4
    POLICY_INGRESS = 5
    UNKNOWN_PEER = 6
    NO_BACKEND = 7
    INVALID_CT = 8
    CT_FULL = 9
    SNAT_NO_PORT = 10
    NO_ROUTE = 11
    TOO_BIG = 12
    FRAGMENT = 13
    NO_ENDPOINT = 14
    TTL_EXCEEDED = 15
    REWRITE = 16
    NOT_UNICAST = 17
    NO_LOCAL_BACKEND = 18
    SOURCE_RANGE = 19
    BLOCKED = 20
    AUDIT = 21


class Direction(IntEnum):
    EGRESS = 0
    INGRESS = 1


class ClassNumber(IntEnum):
    ANY = 0
    UNKNOWN = 1
    WORLD = 2
    HOST = 3
    FIRST = 16


class Verdict(IntEnum):
    DENY = 0
    ALLOW = 1
    PASS = 2


class PolicyLevel(IntEnum):
    PORT_BITS_MAX = 16
    ANY_PROTOCOL = 17
    ADMIN = 32


class IsolationFlag(IntFlag):
    ORDERED = 1 << 24
    DEFAULT_ALLOW = 1 << 25
    AUDIT = 1 << 26
    SHUT = 1 << 27


class PolicyOrder(IntEnum):
    NETWORK_POLICY = 0x8000
    BASELINE = 0x8001


class AddressFlag(IntFlag):
    LOCAL_HOST = 1
    REMOTE_NODE = 2


class RouteFlag(IntFlag):
    POD_CIDR = 1
    LOCAL = 2
    TUNNEL = 4
    NO_MASQUERADE = 8


class ServiceScope(IntEnum):
    INTERNAL = 0
    EXTERNAL = 1


class ServiceFlag(IntFlag):
    EXTERNAL_ROW = 1
    LOCAL = 2
    SOURCE_RANGES = 4
    MAGLEV = 8
    DSR = 16


class CtFlag(IntFlag):
    ORIGIN_IS_LOW = 1
    REPLIED = 2
    FIN_ORIGIN = 4
    FIN_REPLY = 8
    RESET = 16
    SERVICE = 32
    REV_NAT = 64
    SNAT = 256
    DSR = 512
    UNJUDGED = 1024


class EventKind(IntEnum):
    DROP = 1
    ALLOW = 2
    AUDIT = 3


class DenialFlag(IntFlag):
    AUDITED = 1


class SnatKind(IntEnum):
    FORWARD = 0
    REVERSE = 1


class SnatState(IntFlag):
    REPLIED = 1
    STREAM = 2
    CLOSING = 4


class RuntimeFeature(IntFlag):
    HOST_BACKENDS = 1
    ANNOUNCES = 2
    XDP_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class EnumBinding:
    """How an enum of abi.h is written here: without its prefix, and without its counter."""

    c_name: str
    prefix: str
    type: type[IntEnum] | type[IntFlag]
    counter: str = ""


ENUMS = (
    EnumBinding("drop_reason", "DROP_", DropReason, "DROP_REASON_COUNT"),
    EnumBinding("direction", "DIR_", Direction),
    EnumBinding("class_number", "CLASS_", ClassNumber),
    EnumBinding("verdict", "VERDICT_", Verdict),
    EnumBinding("policy_level", "LEVEL_", PolicyLevel, "LEVEL_COUNT"),
    EnumBinding("isolation_flag", "ISOLATION_", IsolationFlag),
    EnumBinding("policy_order", "ORDER_", PolicyOrder),
    EnumBinding("address_flag", "ADDRESS_", AddressFlag),
    EnumBinding("route_flag", "ROUTE_", RouteFlag),
    EnumBinding("service_scope", "SCOPE_", ServiceScope),
    EnumBinding("service_flag", "SERVICE_", ServiceFlag),
    EnumBinding("ct_flag", "CT_", CtFlag),
    EnumBinding("event_kind", "EVENT_", EventKind),
    EnumBinding("denial_flag", "DENIAL_", DenialFlag),
    EnumBinding("snat_kind", "SNAT_", SnatKind),
    EnumBinding("snat_state", "SNAT_", SnatState),
    EnumBinding("runtime_feature", "RUNTIME_", RuntimeFeature),
)


@dataclass(frozen=True, slots=True)
class ServiceKey:
    address: Addr
    port: int
    protocol: int
    scope: int


@dataclass(frozen=True, slots=True)
class Service:
    id: int
    count: int
    flags: int
    affinity_seconds: int
    identity: int = 0


@dataclass(frozen=True, slots=True)
class BackendKey:
    service: int
    slot: int


@dataclass(frozen=True, slots=True)
class Backend:
    address: Addr
    port: int


@dataclass(frozen=True, slots=True)
class MaglevKey:
    service: int
    block: int


@dataclass(frozen=True, slots=True)
class MaglevBlock:
    """`slot` is the array's bytes: 256 numbers of 16 bits (MAGLEV_BLOCK)."""

    slot: bytes

    @classmethod
    def of(cls, slots: Sequence[int]) -> MaglevBlock:
        """The last block of a table may be short."""
        return cls(array("H", slots).tobytes().ljust(2 * MAGLEV_BLOCK, b"\0"))

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(array("H", self.slot))


@dataclass(frozen=True, slots=True)
class AffinityKey:
    identity: int
    client: Addr


@dataclass(frozen=True, slots=True)
class Affinity:
    address: Addr
    port: int
    last_used: int


@dataclass(frozen=True, slots=True)
class NetnsAddresses:
    ipv4: Addr
    ipv6: Addr


@dataclass(frozen=True, slots=True)
class SourceRangeKey:
    bits: int
    identity: int
    address: Addr


@dataclass(frozen=True, slots=True)
class Announced:
    mac: bytes


@dataclass(frozen=True, slots=True)
class Blocked:
    rule: int


@dataclass(frozen=True, slots=True)
class SockNatKey:
    cookie: int
    address: Addr
    port: int
    protocol: int


@dataclass(frozen=True, slots=True)
class SockNat:
    address: Addr
    port: int
    service: int


@dataclass(frozen=True, slots=True)
class CtKey:
    low: Addr
    high: Addr
    low_port: int
    high_port: int
    protocol: int


@dataclass(frozen=True, slots=True)
class CtEntry:
    expires: int
    generation: int
    flags: int
    service: int
    nat_address: Addr
    nat_port: int


@dataclass(frozen=True, slots=True)
class SnatKey:
    remote: Addr
    local: Addr
    remote_port: int
    local_port: int
    protocol: int
    kind: int


@dataclass(frozen=True, slots=True)
class SnatEntry:
    address: Addr
    port: int
    state: int
    expires: int


@dataclass(frozen=True, slots=True)
class Isolation:
    rule_set: int = 0
    levels: int = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    ifindex: int
    class_: int
    egress: Isolation
    ingress: Isolation
    mac: bytes
    host_mac: bytes


@dataclass(frozen=True, slots=True)
class Address:
    class_: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class PrefixKey:
    bits: int
    address: Addr


@dataclass(frozen=True, slots=True)
class Prefix:
    class_: int


@dataclass(frozen=True, slots=True)
class Route:
    node: Addr
    flags: int


@dataclass(frozen=True, slots=True)
class PolicyKey:
    rule_set: int
    peer: int
    port: int
    protocol: int
    port_bits: int


@dataclass(frozen=True, slots=True)
class PolicyVerdict:
    rule: int
    order: int
    verdict: int


@dataclass(frozen=True, slots=True)
class DenialKey:
    source: Addr
    destination: Addr
    destination_port: int
    protocol: int
    direction: int


@dataclass(frozen=True, slots=True)
class Denial:
    last_seen: int
    packets: int
    rule: int
    rule_set: int
    reason: int
    flags: int


@dataclass(frozen=True, slots=True)
class Runtime:
    policy_generation: int
    event_mask: int
    features: int = 0


@dataclass(frozen=True, slots=True)
class MetricKey:
    reason: int
    direction: int


@dataclass(frozen=True, slots=True)
class Metric:
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Event:
    time_ns: int
    source: Addr
    destination: Addr
    source_port: int
    destination_port: int
    protocol: int
    kind: int
    direction: int
    tcp_flags: int
    reason: int
    source_class: int
    destination_class: int
    rule: int
    rule_set: int
    ifindex: int
    length: int
