# SPDX-License-Identifier: Apache-2.0
"""kubeconfig files, the status server, and what Services, slices and nodes are parsed to."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import yaml
from support.operator_state import READERS

from weir.api.address import text
from weir.operator import resources
from weir.operator.config import ConfigError, load
from weir.operator.kubeconfig import KubeconfigError, from_file, in_cluster
from weir.operator.objects import Key
from weir.operator.status import HELP, Sample, StatusServer, render

ENVIRONMENT = {"POD_NAMESPACE": "ns", "POD_NAME": "me"}


def test_all_bad_settings_are_named_at_once(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("apiServer: ftp://x\nlisten: nowhere\nbatchMilliseconds: -1\nodd: 1\n")
    with pytest.raises(ConfigError) as raised:
        load(path, {"POD_NAME": "me"})
    names = ("POD_NAMESPACE", "apiServer", "listen", "batchMilliseconds", "odd")
    assert all(f"{name}: " in str(raised.value) for name in names), raised.value


def kubeconfig(folder: Path, **changes: Any) -> Path:
    cluster: dict[str, Any] = {"server": "https://10.0.0.1:6443/"}
    cluster |= changes.get("cluster", {})
    content = {
        "current-context": changes.get("current", "c"),
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": cluster}],
        "users": [{"name": "u", "user": changes.get("user", {"token": "t"})}],
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_kubeconfig(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("CA")
    (tmp_path / "token").write_text("secret\n")
    data = base64.b64encode(b"CERT").decode()
    user = {"tokenFile": "token", "client-certificate-data": data}
    path = kubeconfig(tmp_path, cluster={"certificate-authority": "ca.pem"}, user=user)
    access = from_file(path)
    assert access.servers == ("https://10.0.0.1:6443",)
    assert (access.ca, access.cert, access.current_token()) == ("CA", "CERT", "secret")
    (tmp_path / "token").write_text("rotated\n")
    assert access.current_token() == "rotated"


def test_a_token_file_comes_before_a_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n")
    user = {"tokenFile": str(tmp_path / "token"), "token": "older"}
    assert from_file(kubeconfig(tmp_path, user=user)).current_token() == "secret"
    assert from_file(kubeconfig(tmp_path, user={"token": "only"})).current_token() == "only"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"current": "other"}, "other", id="no such context"),
        pytest.param({"user": {"client-key": "none"}}, "none", id="no such file"),
    ],
)
def test_a_bad_kubeconfig(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(KubeconfigError, match=words):
        from_file(kubeconfig(tmp_path, **changes))


@pytest.mark.parametrize(
    ("setting", "kubelet", "environment", "servers"),
    [
        pytest.param("https://a:1/", True, {}, ("https://a:1",), id="the setting first"),
        pytest.param("", True, {}, ("https://10.0.0.1:6443",), id="the kubelet's"),
        pytest.param(
            "",
            False,
            {"KUBERNETES_SERVICE_HOST": "fd00::1"},
            ("https://[fd00::1]:443",),
            id="the environment last",
        ),
    ],
)
def test_where_a_pod_finds_the_api_server(
    tmp_path: Path,
    setting: str,
    kubelet: bool,
    environment: dict[str, str],
    servers: tuple[str, ...],
) -> None:
    (tmp_path / "ca.crt").write_text("CA")
    path = kubeconfig(tmp_path) if kubelet else tmp_path / "none"
    assert in_cluster(setting, path, tmp_path, environment).servers == servers


def test_no_api_server_is_said(tmp_path: Path) -> None:
    with pytest.raises(KubeconfigError, match="set apiServer"):
        in_cluster("", tmp_path / "none", tmp_path, {})


async def test_status_over_http() -> None:
    missing = ["Pods"]
    samples = [
        Sample("weir_operator_streams", 2),
        Sample("weir_operator_objects", 1, ("kind", "x")),
    ]
    server = StatusServer(lambda: missing[0] if missing else "", lambda: samples)
    await server.start("127.0.0.1:0", "127.0.0.1:0")
    health, metrics = (f"http://127.0.0.1:{r.addresses[0][1]}" for r in server._runners)
    try:
        async with aiohttp.ClientSession() as session:

            async def get(url: str) -> tuple[int, str]:
                async with session.get(url) as response:
                    return response.status, await response.text()

            assert await get(f"{health}/healthz") == (200, "ok\n")
            assert await get(f"{health}/readyz") == (503, "Pods\n")
            missing.clear()
            assert await get(f"{health}/readyz") == (200, "ok\n")
            assert (await get(f"{metrics}/readyz"))[0] == 404
            status, body = await get(f"{metrics}/metrics")
            assert status == 200
            assert 'weir_operator_objects{kind="x"} 1\n' in body
            assert "# TYPE weir_operator_streams gauge\nweir_operator_streams 2\n" in body
    finally:
        await server.close()


def test_every_metric_says_what_it_is() -> None:
    for name, (kind, _) in HELP.items():
        assert (kind == "counter") is name.endswith("_total")
        assert name in render([Sample(name, 1)])


def read(kind: str, body: dict[str, Any]) -> tuple[Any, list[str]]:
    meta = {"name": "x", "namespace": "ns", "labels": {"kubernetes.io/service-name": "s"}}
    parsed = READERS[kind](msgspec.Raw(msgspec.json.encode({"metadata": meta, **body})))
    return parsed.value, [problem.field for problem in parsed.problems]


@pytest.mark.parametrize(
    ("endpoint", "wanted", "fields"),
    [
        pytest.param({}, None, ["endpoints[0].addresses"], id="no address"),
        pytest.param({"addresses": ["x"]}, None, ["endpoints[0].addresses[0]"], id="bad address"),
        pytest.param({"addresses": ["10.0.0.1"]}, (True, True, False), [], id="unknown is ready"),
        pytest.param(
            {"addresses": ["10.0.0.1"], "conditions": {"ready": False}},
            (False, True, False),
            [],
            id="serving unless it says not",
        ),
        pytest.param(
            {
                "addresses": ["10.0.0.1"],
                "conditions": {"ready": False, "serving": True, "terminating": True},
            },
            (False, True, True),
            [],
            id="draining",
        ),
    ],
)
def test_endpoints(endpoint: Any, wanted: tuple[bool, ...] | None, fields: list[str]) -> None:
    made, problems = read("EndpointSlice", {"endpoints": [endpoint], "ports": [{"port": 80}]})
    assert problems == fields
    assert [(e.ready, e.serving, e.terminating) for e in made.endpoints] == (
        [wanted] if wanted else []
    )


def test_a_node() -> None:
    addresses = [
        {"type": "Hostname", "address": "x"},
        {"type": "ExternalIP", "address": "192.0.2.1"},
        {"type": "InternalIP", "address": "10.0.0.1"},
        {"type": "InternalIP", "address": "bad"},
    ]
    spec = {"podCIDRs": ["10.1.0.0/24", "worse"]}
    made, problems = read("Node", {"status": {"addresses": addresses}, "spec": spec})
    assert [text(a) for a in made.addresses] == ["10.0.0.1", "192.0.2.1"]
    assert [c.text() for c in made.pod_cidrs] == ["10.1.0.0/24"]
    assert made.zone == ""
    assert problems == ["status.addresses[1]", "spec.podCIDRs"]


def test_a_nodes_zone() -> None:
    meta = {"name": "n", "labels": {"topology.kubernetes.io/zone": "a", "zone": "b"}}
    parsed = READERS["Node"](msgspec.Raw(msgspec.json.encode({"metadata": meta})))
    assert resources.node(Key("", "n"), parsed.value).resource.node.zone == "a"
