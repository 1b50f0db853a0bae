# SPDX-License-Identifier: Apache-2.0
"""Addresses for the suite's LoadBalancers on the local cluster, which no cloud gives any."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from e2e.cluster.paths import SETTINGS
from e2e.cluster.settings import IPV6, Cni, Network, load_settings
from e2e.conformance.target import Target

_NAME = "conformance"
# Of the underlay, past all nodes.
_FIRST, _LAST = 200, 230


def _block(network: Network) -> dict[str, str]:
    def address(number: int) -> str:
        text = f"{number:x}" if network is IPV6 else str(number)
        return network.underlay_prefix + text

    return {"first": address(_FIRST), "last": address(_LAST)}


@contextmanager
def pool(where: Target) -> Iterator[None]:
    """A LoadBalancerPool for as long as this lasts, if the cluster is the local one with Weir."""
    settings = load_settings(SETTINGS) if where.local else None
    if settings is None or settings.cni is not Cni.WEIR:
        yield
        return
    made = {
        "apiVersion": "weir.dev/v1alpha1",
        "kind": "LoadBalancerPool",
        "metadata": {"name": _NAME},
        "spec": {"blocks": [_block(network) for network in settings.networks]},
    }
    where.kubectl("apply", "--filename=-", text=json.dumps(made))
    try:
        yield
    finally:
        where.kubectl("delete", "loadbalancerpool", _NAME, "--ignore-not-found")
