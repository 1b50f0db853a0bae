# SPDX-License-Identifier: Apache-2.0
"""Resources as the protocol has them: names and messages, one builder a type.

Each builder takes None for a resource that is gone. Field order within messages is sorted where
order means nothing, so that equal content encodes to equal bytes and is not sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from weir.api.address import Addr, Cidr, text
from weir.api.v1 import weir_pb2 as pb
from weir.operator.classes import Content
from weir.operator.objects import EndpointSlice, Key, Node, Pod, Port
from weir.operator.policy import NetworkPolicy, Rule
from weir.operator.selectors import Selector
from weir.operator.services import Service

__all__ = ["Change", "text"]


@dataclass(frozen=True, slots=True)
class Change:
    """A resource's new content, or that it is gone. `node`: the only one to tell; None: all."""

    name: str
    resource: pb.Resource | None
    node: str | None = None


def service(key: Key, new: Service | None) -> Change:
    name = f"service/{key}"
    if new is None:
        return Change(name, None)
    message = pb.Service(
        namespace=key.namespace,
        name=key.name,
        cluster_ips=new.cluster_ips,
        ports=[
            pb.ServicePort(name=p.name, protocol=p.protocol, port=p.port, node_port=p.node_port)
            for p in new.ports
        ],
        external_ips=new.external_ips,
        load_balancer_ips=new.load_balancer_ips,
        internal_local=new.internal_local,
        external_local=new.external_local,
        affinity_seconds=new.affinity_seconds,
        source_ranges=[_cidr(cidr) for cidr in new.source_ranges],
        health_check_node_port=new.health_check_node_port,
        refused=[
            pb.Frontend(address=f.address, protocol=f.protocol, port=f.port)
            for f in sorted(new.refused)
        ],
    )
    return Change(name, pb.Resource(name=name, service=message))


def endpoint_slice(key: Key, new: EndpointSlice | None) -> Change:
    name = f"slice/{key}"
    if new is None:
        return Change(name, None)
    message = pb.Slice(
        namespace=key.namespace,
        service=new.service,
        ports=[pb.SlicePort(name=p.name, protocol=p.protocol, port=p.port) for p in new.ports],
        endpoints=[
            pb.SliceEndpoint(
                address=e.address,
                ready=e.ready,
                serving=e.serving,
                terminating=e.terminating,
                node=e.node,
                zone=e.zone,
                for_zones=e.for_zones,
                for_nodes=e.for_nodes,
            )
            for e in new.endpoints
        ],
    )
    return Change(name, pb.Resource(name=name, slice=message))


def _cidr(cidr: Cidr) -> pb.Cidr:
    return pb.Cidr(address=cidr.address, bits=cidr.bits)


def node(key: Key, new: Node | None, number: int | None = None) -> Change:
    name = f"node/{key.name}"
    if new is None:
        return Change(name, None)
    message = pb.Node(
        name=key.name,
        addresses=new.addresses,
        pod_cidrs=[_cidr(cidr) for cidr in new.pod_cidrs],
        zone=new.zone,
        leaving=new.leaving,
    )
    setattr(message, "class", number or 0)
    return Change(name, pb.Resource(name=name, node=message))


def selector(number: int, new: Selector | None) -> Change:
    name = f"selector/{number}"
    if new is None:
        return Change(name, None)
    return Change(name, pb.Resource(name=name, selector=pb.Selector(number=number, key=new.key)))


def policy_class(number: int, new: Content | None) -> Change:
    name = f"class/{number}"
    if new is None:
        return Change(name, None)
    message = pb.Class(
        number=number,
        selectors=sorted(new.selectors),
        named_ports=[_named_port(port) for port in sorted(new.ports)],
    )
    resource = pb.Resource(name=name)
    getattr(resource, "class").CopyFrom(message)  # a keyword in Python
    return Change(name, resource)


def _named_port(port: Port) -> pb.NamedPort:
    return pb.NamedPort(name=port.name, protocol=port.protocol, port=port.port)


def policy(key: Key, new: NetworkPolicy | None, number_of: Callable[[Selector], int]) -> Change:
    name = f"policy/{key}" if key.namespace else f"cluster-policy/{key}"
    if new is None:
        return Change(name, None)
    message = pb.Policy(
        namespace=key.namespace,
        name=key.name,
        subject=number_of(new.subject),
        ingress=new.ingress,
        egress=new.egress,
        rules=[_rule(rule, number_of) for rule in new.rules],
        tier=f"TIER_{new.tier.name}",
        priority=new.priority,
    )
    return Change(name, pb.Resource(name=name, policy=message))


def _rule(rule: Rule, number_of: Callable[[Selector], int]) -> pb.Rule:
    return pb.Rule(
        egress=rule.egress,
        index=rule.index,
        any_peer=rule.peers is None,
        peers=[number_of(peer) for peer in rule.peers or ()],
        ports=[
            pb.PortRange(protocol=p.protocol, first=p.first, last=p.last, name=p.name)
            for p in rule.ports
        ],
        action=f"ACTION_{rule.action.name}",
    )


def address(addr: Addr, owner: Key | None, number: int | None) -> Change:
    name = f"address/{addr.hex()}"
    if owner is None or number is None:
        return Change(name, None)
    resource = pb.Resource(name=name)
    message = resource.address
    message.address = addr
    setattr(message, "class", number)
    message.namespace = owner.namespace
    message.pod = owner.name
    return Change(name, resource)


def prefix(cidr: Cidr, number: int | None) -> Change:
    name = f"prefix/{cidr.address.hex()}/{cidr.bits}"
    if number is None:
        return Change(name, None)
    message = pb.Prefix(cidr=_cidr(cidr))
    setattr(message, "class", number)
    return Change(name, pb.Resource(name=name, prefix=message))


def pod(uid: str, where: str, new: Pod | None, number: int | None, audit: bool = False) -> Change:
    name = f"pod/{uid}"
    if new is None or number is None:
        return Change(name, None, where)
    resource = pb.Resource(name=name)
    message = resource.pod
    message.namespace = new.key.namespace
    message.name = new.key.name
    message.uid = uid
    setattr(message, "class", number)
    message.audit = audit
    for port in new.host_ports:
        message.host_ports.add(
            protocol=port.protocol,
            host_port=port.host_port,
            container_port=port.container_port,
            host_ip=port.host_ip or b"",
        )
    return Change(name, resource, where)
