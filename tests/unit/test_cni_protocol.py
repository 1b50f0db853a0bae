# SPDX-License-Identifier: Apache-2.0
"""CNI calls as the specification words them: what is accepted, and what each error says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from weir.api.address import parse as ip
from weir.cni import protocol
from weir.cni.endpoint import LocalEndpoint, PodRef
from weir.cni.errors import CniError, Code
from weir.cni.protocol import Command, Interface, Ip, Result

ROOT = Path(__file__).parents[2]


def env(command: str, **changes: str | None) -> dict[str, str]:
    values: dict[str, str | None] = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "c0ffee",
        "CNI_NETNS": "/run/netns/x",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web-0;K8S_POD_UID=u1",
    }
    return {k: v for k, v in {**values, **changes}.items() if v is not None}


def conf(**changes: Any) -> bytes:
    values = {"cniVersion": "1.1.0", "name": "weir", "type": "weir", **changes}
    return json.dumps({k: v for k, v in values.items() if v is not None}).encode()


def endpoint(*addresses: str) -> LocalEndpoint:
    return LocalEndpoint(
        container_id="c0ffee",
        netns="/run/netns/x",
        ifname="eth0",
        host_ifname="weir0123456789a",
        ifindex=7,
        mac=bytes.fromhex("020000000001"),
        host_mac=bytes.fromhex("020000000002"),
        addresses=tuple(ip(a) for a in addresses),
        pod=PodRef("ns", "web-0", "u1"),
    )


def test_add_is_parsed() -> None:
    request = protocol.parse(env("ADD"), conf(unknown={"a": 1}))
    assert request.command is Command.ADD
    assert (request.container_id, request.netns, request.ifname) == (
        "c0ffee",
        "/run/netns/x",
        "eth0",
    )
    assert request.pod == PodRef("ns", "web-0", "u1")
    assert request.network == "weir"


@pytest.mark.parametrize(
    ("environment", "config", "code", "says"),
    [
        pytest.param(env("ADD"), b"", Code.DECODE_FAILURE, "standard input", id="empty"),
        pytest.param(env("ADD"), conf()[:-9], Code.DECODE_FAILURE, "truncated", id="truncated"),
        pytest.param(env("ADD"), b"\xff\xfe{}", Code.DECODE_FAILURE, "JSON", id="not-text"),
        pytest.param(env("ADD"), b'{"a":' + b"[" * 100_000, Code.DECODE_FAILURE, "JSON", id="deep"),
        pytest.param(env("ADD"), b"[]", Code.INVALID_CONFIG, "object", id="not-an-object"),
        pytest.param(env("ADD"), conf(name=None), Code.INVALID_CONFIG, "name", id="no-name"),
        pytest.param(env("ADD"), conf(name=""), Code.INVALID_CONFIG, "$.name", id="empty-name"),
        pytest.param(env("ADD"), conf(name=3), Code.INVALID_CONFIG, "$.name", id="number-as-name"),
        pytest.param(
            env("ADD"), conf(cniVersion=None), Code.INCOMPATIBLE_VERSION, "0.3.1", id="no-version"
        ),
        pytest.param(
            env("ADD"), conf(cniVersion="2.0.0"), Code.INCOMPATIBLE_VERSION, "2.0.0", id="version-2"
        ),
        pytest.param(
            env("ADD"), conf(prevResult={"ips": 3}), Code.INVALID_CONFIG, "$.ips", id="prev-result"
        ),
        pytest.param(env(""), conf(), Code.INVALID_ENVIRONMENT, "CNI_COMMAND", id="no-command"),
        pytest.param(env("add"), conf(), Code.INVALID_ENVIRONMENT, "'add'", id="unknown-command"),
        pytest.param(
            env("ADD", CNI_NETNS=None, CNI_IFNAME=""),
            conf(),
            Code.INVALID_ENVIRONMENT,
            "CNI_NETNS, CNI_IFNAME",
            id="both-missing-named",
        ),
        pytest.param(
            env("DEL", CNI_CONTAINERID=None),
            conf(),
            Code.INVALID_ENVIRONMENT,
            "CNI_CONTAINERID",
            id="del-of-nothing",
        ),
        pytest.param(
            env("ADD", CNI_CONTAINERID="../x"),
            conf(),
            Code.INVALID_ENVIRONMENT,
            "../x",
            id="container-id-as-path",
        ),
        pytest.param(
            env("ADD", CNI_IFNAME="sixteen-bytes-ab"),
            conf(),
            Code.INVALID_ENVIRONMENT,
            "sixteen-bytes-ab",
            id="long-ifname",
        ),
        pytest.param(
            env("ADD", CNI_IFNAME="a b"),
            conf(),
            Code.INVALID_ENVIRONMENT,
            "'a b'",
            id="ifname-space",
        ),
        pytest.param(
            env("ADD", CNI_ARGS="K8S_POD_NAME"),
            conf(),
            Code.INVALID_ENVIRONMENT,
            "KEY=value",
            id="args-without-value",
        ),
        pytest.param(env("CHECK"), conf(), Code.INVALID_CONFIG, "prevResult", id="check-without"),
        pytest.param(
            env("CHECK"),
            conf(cniVersion="0.3.1"),
            Code.INCOMPATIBLE_VERSION,
            "CHECK",
            id="check-is-younger",
        ),
        pytest.param(
            env("GC"), conf(cniVersion="1.0.0"), Code.INCOMPATIBLE_VERSION, "GC", id="gc-is-younger"
        ),
        pytest.param(
            env("GC"),
            conf(**{"cni.dev/valid-attachments": [{"ifname": "eth0"}]}),
            Code.INVALID_CONFIG,
            "containerID",
            id="gc-attachment-without-id",
        ),
    ],
)
def test_bad_call(environment: dict[str, str], config: bytes, code: Code, says: str) -> None:
    with pytest.raises(CniError) as caught:
        protocol.parse(environment, config)
    assert caught.value.code is code
    assert says in str(caught.value)


def test_del_needs_neither_namespace_nor_a_sound_prev_result() -> None:
    request = protocol.parse(env("DEL", CNI_NETNS=None), conf(prevResult=[1]))
    assert request.netns == ""
    assert request.prev_result is None


LIVING = [{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "net1"}]


@pytest.mark.parametrize(
    ("given", "valid"),
    [
        pytest.param(
            {"cni.dev/valid-attachments": LIVING}, {("a", "eth0"), ("b", "net1")}, id="list"
        ),
        pytest.param({"cni.dev/attachments": LIVING[:1]}, {("a", "eth0")}, id="first-text's-key"),
        pytest.param({"cni.dev/valid-attachments": []}, set(), id="empty"),
        pytest.param({"cni.dev/valid-attachments": "null"}, set(), id="null-is-empty"),
        pytest.param({}, None, id="absent-is-not-empty"),
    ],
)
def test_gc_names_what_lives(given: dict[str, Any], valid: set[tuple[str, str]] | None) -> None:
    config = conf(**given).replace(b'"null"', b"null")
    request = protocol.parse(
        env("GC", CNI_CONTAINERID=None, CNI_NETNS=None, CNI_IFNAME=None), config
    )
    assert request.valid == valid


@pytest.mark.parametrize("version", protocol.SUPPORTED_VERSIONS)
def test_result_in_the_form_of_each_version(version: str) -> None:
    request = protocol.parse(
        env("ADD"), conf(cniVersion=version, dns={"nameservers": ["10.0.0.10"]})
    )
    reply = protocol.result(request, endpoint("10.1.0.7", "fd00::7"), 1450)
    mtu = {"mtu": 1450} if version == "1.1.0" else {}
    four, six = ({}, {}) if version[0] == "1" else ({"version": "4"}, {"version": "6"})
    assert reply.exit == 0
    assert json.loads(reply.stdout) == {
        "cniVersion": version,
        "interfaces": [
            {"name": "weir0123456789a", "mac": "02:00:00:00:00:02", **mtu},
            {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x", **mtu},
        ],
        "ips": [
            {"address": "10.1.0.7/32", "gateway": "169.254.1.1", "interface": 1, **four},
            {"address": "fd00::7/128", "gateway": "fe80::1", "interface": 1, **six},
        ],
        "routes": [
            {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
            {"dst": "::/0", "gw": "fe80::1"},
        ],
        "dns": {"nameservers": ["10.0.0.10"]},
    }


def test_result_after_another_plugin_keeps_its_part() -> None:
    before = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo1", "sandbox": "/run/netns/x"}],
        "ips": [{"address": "192.0.2.1/24", "interface": 0}],
        "dns": {"domain": "example"},
    }
    request = protocol.parse(env("ADD"), conf(prevResult=before))
    found = json.loads(protocol.result(request, endpoint("10.1.0.7"), 1450).stdout)
    assert [i["name"] for i in found["interfaces"]] == ["lo1", "weir0123456789a", "eth0"]
    assert [(i["address"], i["interface"]) for i in found["ips"]] == [
        ("192.0.2.1/24", 0),
        ("10.1.0.7/32", 2),
    ]
    assert found["dns"] == {"domain": "example"}


def test_prev_result_that_lacks_an_address() -> None:
    known = Result(interfaces=(Interface("eth0"),), ips=(Ip("10.1.0.7/32"),))
    request = protocol.CniRequest(Command.CHECK, "1.1.0", "weir", prev_result=known)
    assert protocol.prev_result_differs(request, endpoint("10.1.0.7")) == []
    assert protocol.prev_result_differs(request, endpoint("10.1.0.7", "fd00::7")) == [
        "prevResult lacks the address fd00::7"
    ]


def test_error_has_the_words_and_the_version_of_the_call() -> None:
    failure = CniError("no", details="because", code=Code.TRY_AGAIN)
    reply = protocol.error(failure, protocol.version_of(conf(cniVersion="0.4.0")))
    assert reply.exit == 1
    assert json.loads(reply.stdout) == {
        "cniVersion": "0.4.0",
        "code": 11,
        "msg": "no",
        "details": "because",
    }


@pytest.mark.parametrize("broken", [b"", b"{", b'{"cniVersion": 3}', conf(cniVersion="9.9.9")])
def test_version_of_a_broken_config(broken: bytes) -> None:
    assert protocol.version_of(broken) == "1.0.0"


def test_shim_knows_the_same_versions() -> None:
    source = (ROOT / "cni/shim/weir-cni.c").read_text()
    found = re.search(r'supportedVersions\\":"\s+"\[(.*?)\]', source)
    assert found is not None
    assert tuple(re.findall(r"\d\.\d\.\d", found[1])) == protocol.SUPPORTED_VERSIONS
