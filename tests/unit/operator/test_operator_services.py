# SPDX-License-Identifier: Apache-2.0
"""Which Services the operator gives to the agents."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from weir.operator import kinds


@pytest.mark.parametrize(
    ("labels", "spec", "served"),
    [
        pytest.param({}, {}, True, id="plain"),
        pytest.param({"app": "headless"}, {}, True, id="other label"),
        pytest.param(
            {"service.kubernetes.io/service-proxy-name": "mesh"}, {}, False, id="another proxy's"
        ),
        pytest.param({"service.kubernetes.io/headless": ""}, {}, False, id="headless label"),
        pytest.param({}, {"clusterIP": "None", "clusterIPs": ["None"]}, False, id="headless"),
        pytest.param({}, {"type": "ExternalName"}, False, id="ExternalName"),
    ],
)
def test_served(labels: dict[str, str], spec: dict[str, Any], served: bool) -> None:
    ips = {"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"]}
    content = {
        "metadata": {"namespace": "ns", "name": "s", "labels": labels},
        "spec": {"ports": [{"port": 80}], **ips, **spec},
    }
    parsed = kinds.SERVICE.read(msgspec.Raw(msgspec.json.encode(content)))
    assert parsed.value is not None
    assert bool(parsed.value.cluster_ips) is served
    assert not parsed.problems
