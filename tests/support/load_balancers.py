# SPDX-License-Identifier: Apache-2.0
"""Builders of pools and of Services of type LoadBalancer, as the operator reads them, and who
listens behind what decides about them."""

from __future__ import annotations

from typing import Any

import msgspec

from weir.operator.balancers import WireBalancer, Wish, parse_balancer
from weir.operator.objects import Key, Problem
from weir.operator.pools import Pool, WirePool, parse_pool

OUR_CLASS = "weir.dev/load-balancer"


def pool(name: str, *blocks: str, created: int = 1, **spec: Any) -> Pool:
    """Blocks as CIDR or FIRST-LAST."""
    listed = [
        {"first": block.split("-")[0], "last": block.split("-")[1]}
        if "-" in block
        else {"cidr": block}
        for block in blocks
    ]
    when = f"2030-01-01T00:00:0{created}Z"
    raw = {
        "metadata": {"name": name, "uid": name, "creationTimestamp": when},
        "spec": {"blocks": listed} | spec,
    }
    made = parse_pool(msgspec.convert(raw, WirePool)).value
    assert made is not None
    return made


def service(name: str, namespace: str = "shop", created: int = 0, **fields: Any) -> Wish:
    """A Service with port 80/TCP, of one family unless `families` says more."""
    annotations = {}
    for annotation in ("ips", "sharing_key", "sharing_namespaces"):
        if annotation in fields:
            words = annotation.replace("_", "-")
            annotations[f"weir.dev/load-balancer-{words}"] = fields.pop(annotation)
    raw = {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "uid": name,
            "labels": fields.pop("labels", {}),
            "annotations": annotations,
            "creationTimestamp": f"2030-01-01T00:00:{created:02}Z",
        },
        "spec": {
            "type": "LoadBalancer",
            "ports": [
                {"port": int(p.split("/")[0]), "protocol": p.split("/")[1]}
                for p in fields.pop("ports", ["80/TCP"])
            ],
            "ipFamilies": fields.pop("families", ["IPv4"]),
            "externalTrafficPolicy": fields.pop("policy", "Cluster"),
        }
        | fields,
    }
    balancer = parse_balancer(msgspec.convert(raw, WireBalancer), OUR_CLASS, True).value
    assert balancer is not None
    return balancer.wish


class Nobody:
    """The consumer after the one that is tested."""

    def changed(self, kind: str, key: Key, old: object | None, new: object | None) -> None:
        pass

    def problems(self, kind: str, key: Key, problems: tuple[Problem, ...]) -> None:
        pass

    def synced(self, kind: str) -> None:
        pass
