# SPDX-License-Identifier: Apache-2.0
"""The CNI specification 1.1, and 0.3.1 to 1.0 before it: calls in, results and errors out.

A call is parsed once, here, into a `CniRequest`; every error names the field or variable.
Where the versions differ in form (0.x marks each address with its family, only 1.1 has a
link's MTU in results) the answer takes the form of the configuration's version.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, TypeVar

import msgspec

from weir.api import address
from weir.cni.endpoint import NO_POD, LocalEndpoint, PodRef
from weir.cni.errors import CniError, Code
from weir.cni.wiring import default_route, gateways

SUPPORTED_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
DEFAULT_VERSION = "1.0.0"
IFNAME_MAX = 15
CONTAINER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
CONTAINER_ID_MAX = 256


class Command(StrEnum):
    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"
    VERSION = "VERSION"


REQUIRED = {
    Command.ADD: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.CHECK: ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    Command.DEL: ("CNI_CONTAINERID", "CNI_IFNAME"),
}
INTRODUCED = {
    Command.CHECK: SUPPORTED_VERSIONS[1:],
    Command.GC: SUPPORTED_VERSIONS[3:],
    Command.STATUS: SUPPORTED_VERSIONS[3:],
}


class Interface(msgspec.Struct, frozen=True, omit_defaults=True):
    name: str
    mac: str = ""
    mtu: int = 0
    sandbox: str = ""
    socket_path: str = msgspec.field(default="", name="socketPath")
    pci_id: str = msgspec.field(default="", name="pciID")


class Ip(msgspec.Struct, frozen=True, omit_defaults=True):
    address: str
    gateway: str = ""
    interface: int | None = None
    version: str = ""


class ResultRoute(msgspec.Struct, frozen=True, omit_defaults=True):
    dst: str
    gw: str = ""
    mtu: int = 0
    advmss: int = 0
    priority: int = 0
    table: int | None = None
    scope: int | None = None


class Dns(msgspec.Struct, frozen=True, omit_defaults=True):
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


NO_DNS = Dns()


class Result(msgspec.Struct, frozen=True):
    """What ADD answers, and what CHECK and later plugins of a chain are given."""

    cni_version: str = msgspec.field(default=DEFAULT_VERSION, name="cniVersion")
    interfaces: tuple[Interface, ...] = ()
    ips: tuple[Ip, ...] = ()
    routes: tuple[ResultRoute, ...] = ()
    dns: Dns = NO_DNS


class Attachment(msgspec.Struct, frozen=True):
    container_id: str = msgspec.field(name="containerID")
    ifname: str


NOTHING = msgspec.Raw(b"null")


class _Config(msgspec.Struct, frozen=True):
    name: Annotated[str, msgspec.Meta(min_length=1)]
    cni_version: str = msgspec.field(default="", name="cniVersion")
    dns: Dns = NO_DNS
    prev_result: msgspec.Raw = msgspec.field(default=NOTHING, name="prevResult")
    valid_attachments: tuple[Attachment, ...] | msgspec.UnsetType | None = msgspec.field(
        default=msgspec.UNSET, name="cni.dev/valid-attachments"
    )
    attachments: tuple[Attachment, ...] | msgspec.UnsetType | None = msgspec.field(
        default=msgspec.UNSET, name="cni.dev/attachments"
    )


class _Error(msgspec.Struct, frozen=True, omit_defaults=True):
    cni_version: str = msgspec.field(name="cniVersion")
    code: int
    msg: str
    details: str = ""


class _Versions(msgspec.Struct, frozen=True):
    cni_version: str = msgspec.field(name="cniVersion")
    supported: tuple[str, ...] = msgspec.field(name="supportedVersions")


@dataclass(frozen=True, slots=True)
class CniRequest:
    """One call. Fields that a command does not need are empty. `valid` None: GC was not told
    what lives."""

    command: Command
    version: str
    network: str
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    pod: PodRef = NO_POD
    dns: Dns = NO_DNS
    prev_result: Result | None = None
    valid: frozenset[tuple[str, str]] | None = None

    def __str__(self) -> str:
        return f"{self.command} {self.container_id or self.network} {self.pod}"


@dataclass(frozen=True, slots=True)
class CniReply:
    exit: int
    stdout: bytes = b""


def parse(env: Mapping[str, str], config: bytes) -> CniRequest:
    """The call that `env` and `config` make. CniError with code 1, 4, 6 or 7."""
    if env.get("CNI_COMMAND") == Command.VERSION:  # the one that says nothing of a network
        return CniRequest(Command.VERSION, version_of(config), "")
    parsed = _config(config)
    if parsed.cni_version not in SUPPORTED_VERSIONS:
        raise CniError(
            f"cniVersion {parsed.cni_version!r} is not supported",
            details=f"supported: {', '.join(SUPPORTED_VERSIONS)}",
            code=Code.INCOMPATIBLE_VERSION,
        )
    command = _command(env.get("CNI_COMMAND", ""), parsed.cni_version)
    _check_environment(command, env)
    if command is Command.CHECK and bytes(parsed.prev_result) == b"null":
        raise CniError("CHECK needs prevResult in the configuration", code=Code.INVALID_CONFIG)
    return CniRequest(
        command=command,
        version=parsed.cni_version,
        network=parsed.name,
        container_id=env.get("CNI_CONTAINERID", ""),
        netns=env.get("CNI_NETNS", ""),
        ifname=env.get("CNI_IFNAME", ""),
        pod=_pod(env.get("CNI_ARGS", "")),
        dns=parsed.dns,
        # DEL must not fail for what it does not need
        prev_result=_prev_result(parsed) if command in (Command.ADD, Command.CHECK) else None,
        valid=_valid(parsed),
    )


def version_of(config: bytes) -> str:
    """The version to answer in, however broken the rest is."""
    try:
        found = msgspec.json.decode(config, type=_OnlyVersion).cni_version
    except msgspec.DecodeError:
        return DEFAULT_VERSION
    return found if found in SUPPORTED_VERSIONS else DEFAULT_VERSION


class _OnlyVersion(msgspec.Struct, frozen=True):
    cni_version: str = msgspec.field(default=DEFAULT_VERSION, name="cniVersion")


def result(request: CniRequest, endpoint: LocalEndpoint, mtu: int) -> CniReply:
    """ADD's answer: what earlier plugins of the chain did, and this endpoint."""
    before = request.prev_result or Result()
    modern = request.version.startswith("1.")
    shown_mtu = mtu if request.version == "1.1.0" else 0
    first = len(before.interfaces)
    interfaces = (
        Interface(endpoint.host_ifname, endpoint.host_mac.hex(":"), shown_mtu),
        Interface(endpoint.ifname, endpoint.mac.hex(":"), shown_mtu, endpoint.netns),
    )
    ips = tuple(
        Ip(
            address=f"{address.text(addr)}/{32 if address.is_ipv4(addr) else 128}",
            gateway=address.text(gateways([addr])[0]),
            interface=first + 1,
            version="" if modern else ("4" if address.is_ipv4(addr) else "6"),
        )
        for addr in endpoint.addresses
    )
    routes = tuple(
        ResultRoute(
            dst=f"{address.text(default_route(gateway, 0).destination)}/0",
            gw=address.text(gateway),
        )
        for gateway in gateways(endpoint.addresses)
    )
    whole = Result(
        cni_version=request.version,
        interfaces=before.interfaces + interfaces,
        ips=before.ips + ips,
        routes=before.routes + routes,
        dns=before.dns if before.dns != NO_DNS else request.dns,
    )
    return CniReply(0, msgspec.json.encode(whole) + b"\n")


def prev_result_differs(request: CniRequest, endpoint: LocalEndpoint) -> list[str]:
    """What the runtime believes otherwise than we do."""
    known = {ip.address.partition("/")[0] for ip in (request.prev_result or Result()).ips}
    return [
        f"prevResult lacks the address {address.text(addr)}"
        for addr in endpoint.addresses
        if address.text(addr) not in known
    ]


def error(failure: CniError, version: str) -> CniReply:
    body = _Error(version, int(failure.code), failure.message, failure.details)
    return CniReply(1, msgspec.json.encode(body) + b"\n")


def versions(version: str) -> CniReply:
    return CniReply(0, msgspec.json.encode(_Versions(version, SUPPORTED_VERSIONS)) + b"\n")


def _config(config: bytes) -> _Config:
    if not config.strip():
        raise CniError("no network configuration on standard input", code=Code.DECODE_FAILURE)
    return _decode(config, _Config, "network configuration")


T = TypeVar("T")


def _decode(data: bytes | msgspec.Raw, kind: type[T], what: str) -> T:
    """msgspec's errors name the field: "Expected `str`, got `int` - at `$.name`"."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as failure:
        raise CniError(
            f"invalid {what}", details=str(failure), code=Code.INVALID_CONFIG
        ) from failure
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as failure:
        raise CniError(
            f"the {what} is not JSON", details=str(failure), code=Code.DECODE_FAILURE
        ) from failure


def _valid(config: _Config) -> frozenset[tuple[str, str]] | None:
    """null is an empty list, as Go writes one. The shorter key is what the specification's
    first text said, and what runtimes of that time send."""
    for given in (config.valid_attachments, config.attachments):
        if given is not msgspec.UNSET:
            return frozenset((a.container_id, a.ifname) for a in given or ())
    return None


def _prev_result(config: _Config) -> Result | None:
    if bytes(config.prev_result) == b"null":
        return None
    return _decode(config.prev_result, Result, "prevResult")


def _command(text: str, version: str) -> Command:
    try:
        command = Command(text)
    except ValueError:
        raise CniError(
            f"CNI_COMMAND {text!r} is unknown" if text else "CNI_COMMAND is not set",
            details=f"known: {', '.join(Command)}",
            code=Code.INVALID_ENVIRONMENT,
        ) from None
    if version not in INTRODUCED.get(command, SUPPORTED_VERSIONS):
        raise CniError(
            f"CNI_COMMAND {command} does not exist in cniVersion {version}",
            code=Code.INCOMPATIBLE_VERSION,
        )
    return command


def _check_environment(command: Command, env: Mapping[str, str]) -> None:
    required = REQUIRED.get(command, ())
    missing = [name for name in required if not env.get(name)]
    if missing:
        raise CniError(
            f"{command} needs {', '.join(missing)} in the environment",
            code=Code.INVALID_ENVIRONMENT,
        )
    if not required:
        return
    container_id, ifname = env["CNI_CONTAINERID"], env["CNI_IFNAME"]
    if not CONTAINER_ID.fullmatch(container_id) or len(container_id) > CONTAINER_ID_MAX:
        raise CniError(
            f"CNI_CONTAINERID {container_id[:80]!r} is not a container id",
            details="it begins with a letter or digit; then also . _ - are allowed",
            code=Code.INVALID_ENVIRONMENT,
        )
    bad = ifname in (".", "..") or len(ifname.encode()) > IFNAME_MAX
    if bad or any(c in "/:" or c.isspace() or not c.isprintable() for c in ifname):
        raise CniError(
            f"CNI_IFNAME {ifname[:80]!r} is not an interface name",
            details=f"at most {IFNAME_MAX} bytes without / : and spaces",
            code=Code.INVALID_ENVIRONMENT,
        )


def _pod(args: str) -> PodRef:
    """The pod in CNI_ARGS ("KEY=value;…"); keys that are not ours are other plugins'."""
    found: dict[str, str] = {}
    for part in filter(None, args.split(";")):
        key, equals, value = part.partition("=")
        if not equals:
            raise CniError(
                f"CNI_ARGS: {part[:80]!r} is not KEY=value", code=Code.INVALID_ENVIRONMENT
            )
        found[key] = value
    return PodRef(
        namespace=found.get("K8S_POD_NAMESPACE", ""),
        name=found.get("K8S_POD_NAME", ""),
        uid=found.get("K8S_POD_UID", ""),
    )
