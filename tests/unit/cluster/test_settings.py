# SPDX-License-Identifier: Apache-2.0
"""The variables of `make cluster` and the addresses that follow from them."""

from pathlib import Path

import pytest

from e2e.cluster.errors import ClusterError
from e2e.cluster.nodeconfig import kube_router_flags
from e2e.cluster.settings import (
    Cni,
    IpFamily,
    NetPol,
    Settings,
    load_settings,
    parse_settings,
)


def test_absent_and_empty_variables_mean_the_default() -> None:
    assert parse_settings({"NODES": "", "CNI": ""}) == Settings()


def test_all_bad_values_are_reported_together() -> None:
    with pytest.raises(ClusterError) as caught:
        parse_settings({"NODES": "none", "ROUTING": "geneve", "CNI": "bridge"})
    assert "NODES=none" in str(caught.value)
    assert "ROUTING=geneve is not one of vxlan, native" in str(caught.value)
    assert "CNI" not in str(caught.value)


def test_a_firewall_beside_weirs_policy_is_refused() -> None:
    with pytest.raises(ClusterError, match="NETPOL=kube-router goes with CNI=bridge only"):
        parse_settings({"NETPOL": "kube-router"})
    assert parse_settings({"NETPOL": "kube-router", "CNI": "bridge"}).netpol is NetPol.KUBE_ROUTER


def test_kube_router_enforces_policy_and_does_nothing_else() -> None:
    settings = Settings(ip_family=IpFamily.IPV6, cni=Cni.BRIDGE, netpol=NetPol.KUBE_ROUTER)
    flags = dict(flag.split("=", 1) for flag in kube_router_flags("node2", settings))
    runs = {name: value for name, value in flags.items() if name.startswith("--run-")}
    assert runs == {
        "--run-firewall": "true",
        "--run-router": "false",
        "--run-service-proxy": "false",
    }
    assert (flags["--enable-ipv4"], flags["--enable-ipv6"]) == ("false", "true")
    assert flags["--hostname-override"] == "node2"


def test_settings_survive_their_file(tmp_path: Path) -> None:
    settings = Settings(nodes=3, ip_family=IpFamily.IPV6, cni=Cni.BRIDGE, netpol=NetPol.KUBE_ROUTER)
    settings.save(tmp_path / "cluster.json")
    assert load_settings(tmp_path / "cluster.json") == settings


@pytest.mark.parametrize(
    ("family", "addresses", "api_host"),
    [
        pytest.param(IpFamily.DUAL, ("172.30.0.12", "fd30::12"), "172.30.0.1", id="dual"),
        pytest.param(IpFamily.IPV4, ("172.30.0.12",), "172.30.0.1", id="ipv4"),
        pytest.param(IpFamily.IPV6, ("fd30::12",), "[fd30::1]", id="ipv6"),
    ],
)
def test_a_family_decides_all_addresses(
    family: IpFamily, addresses: tuple[str, ...], api_host: str
) -> None:
    settings = Settings(ip_family=family)
    assert settings.node_addresses("node2") == addresses
    assert settings.api_host == api_host
