# SPDX-License-Identifier: Apache-2.0
"""Where the operators are: asked of the API server, remembered on disk.

Weir may not need its own Services to start, so operators are found by their EndpointSlices: one
GET by label, and the CA from a ConfigMap. All that was ever seen is remembered, so that an agent
that starts while the API server is away still finds an operator that is there.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import aiohttp
import msgspec
import yaml

from weir.agent.config import Config
from weir.agent.errors import NoServer

logger = logging.getLogger(__name__)
T = TypeVar("T")

SERVICE = "weir-operator"
PORT_NAME = "grpc"
CA_CONFIG_MAP = "weir-ca"
CA_KEY = "ca.crt"
REMEMBERED = 16
TIMEOUT = aiohttp.ClientTimeout(total=10.0, connect=3.0)


class Known(msgspec.Struct, frozen=True):
    """The file /var/lib/weir/servers. Newest first."""

    operators: tuple[str, ...] = ()
    api_servers: tuple[str, ...] = ()
    ca: str = ""


class _Port(msgspec.Struct):
    name: str | None = None
    port: int | None = None


class _Conditions(msgspec.Struct):
    serving: bool | None = None


class _Endpoint(msgspec.Struct):
    addresses: list[str]
    conditions: _Conditions = msgspec.field(default_factory=_Conditions)


class _Slice(msgspec.Struct, rename="camel"):
    ports: list[_Port] | None = None
    endpoints: list[_Endpoint] | None = None


class _SliceList(msgspec.Struct):
    items: list[_Slice]


class _ConfigMap(msgspec.Struct):
    data: dict[str, str] = msgspec.field(default_factory=dict)


class Servers:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._path = config.paths.state / "servers"
        self._known = self._load()

    @property
    def known(self) -> Known:
        return self._known

    async def find(self) -> Known:
        """Operators and CA as the API server says; what is remembered if it does not answer.

        Raises NoServer when neither knows any.
        """
        if self._config.operators:
            ca = self._known.ca or await self._configured_ca()
            return Known(self._config.operators, (), ca)
        candidates = await asyncio.to_thread(self._candidates)
        problems = []
        for server in candidates:
            try:
                found = await self._ask(server)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
                problems.append(f"{server}: {error or type(error).__name__}")
                continue
            await asyncio.to_thread(self._remember, found)
            if found.operators:
                return found
            problems.append(f"{server}: no operator serves")
            break
        if self._known.operators and self._known.ca:
            logger.warning("%s: using remembered operators", "; ".join(problems))
            return self._known
        if not candidates:
            problems.append(
                f"no API server: set apiServer, {self._config.kubelet_kubeconfig} names none"
            )
        raise NoServer("; ".join(problems))

    async def _configured_ca(self) -> str:
        path = self._config.paths.service_account / "operator-ca.crt"
        return await asyncio.to_thread(path.read_text)

    async def _ask(self, server: str) -> Known:
        folder = self._config.paths.service_account
        token, context = await asyncio.to_thread(_credentials, folder)
        namespace = self._config.namespace
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
        connector = aiohttp.TCPConnector(ssl=context)
        async with aiohttp.ClientSession(
            connector=connector, headers=headers, timeout=TIMEOUT
        ) as session:
            slices = await self._get(
                session,
                f"{server}/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"
                f"?labelSelector=kubernetes.io/service-name%3D{SERVICE}",
                _SliceList,
            )
            ca = await self._get(
                session,
                f"{server}/api/v1/namespaces/{namespace}/configmaps/{CA_CONFIG_MAP}",
                _ConfigMap,
            )
        operators = _operators(slices.items)
        if CA_KEY not in ca.data:
            raise ValueError(f"ConfigMap {namespace}/{CA_CONFIG_MAP} has no {CA_KEY} yet")
        remembered = [server, *self._known.api_servers]
        return Known(tuple(operators), tuple(dict.fromkeys(remembered)), ca.data[CA_KEY])

    @staticmethod
    async def _get(session: aiohttp.ClientSession, url: str, kind: type[T]) -> T:
        async with session.get(url) as response:
            body = await response.read()
            if response.status != 200:
                raise ValueError(f"GET {url}: {response.status} {body[:200]!r}")
        return msgspec.json.decode(body, type=kind)

    def _candidates(self) -> list[str]:
        named = [self._config.api_server] if self._config.api_server else []
        if not named:
            named = _kubeconfig_servers(self._config.kubelet_kubeconfig)
        return list(dict.fromkeys([*named, *self._known.api_servers]))

    def _load(self) -> Known:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Known)
        except FileNotFoundError:
            return Known()
        except (OSError, msgspec.MsgspecError) as error:
            logger.warning("%s: %s: forgotten", self._path, error)
            return Known()

    def _remember(self, found: Known) -> None:
        operators = dict.fromkeys([*found.operators, *self._known.operators])
        known = Known(tuple(operators)[:REMEMBERED], found.api_servers[:REMEMBERED], found.ca)
        if known == self._known:
            return
        self._known = known
        partial = self._path.with_suffix(".new")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_bytes(msgspec.json.encode(known))
            partial.rename(self._path)
        except OSError as error:
            logger.warning("cannot remember the operators in %s: %s", self._path, error)


def _credentials(folder: Path) -> tuple[str, ssl.SSLContext]:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    return (folder / "token").read_text().strip(), context


def _operators(slices: Iterable[_Slice]) -> list[str]:
    found = []
    for item in slices:
        ports = [p.port for p in item.ports or () if p.name == PORT_NAME and p.port]
        for endpoint in item.endpoints or ():
            if endpoint.conditions.serving is False:
                continue
            for address in endpoint.addresses:
                host = f"[{address}]" if ":" in address else address
                found += [f"{host}:{port}" for port in ports]
    return list(dict.fromkeys(found))


def _kubeconfig_servers(path: Path) -> list[str]:
    """`server` of the current context's cluster first. Only addresses are read, no credentials."""
    try:
        document = yaml.safe_load(path.read_text())
        clusters = {c["name"]: c["cluster"]["server"].rstrip("/") for c in document["clusters"]}
        contexts = {c["name"]: c["context"]["cluster"] for c in document.get("contexts") or ()}
        current = contexts.get(document.get("current-context"))
    except FileNotFoundError:
        return []
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s: not a kubeconfig: %s", path, error)
        return []
    first = [clusters[current]] if current in clusters else []
    return [*first, *(server for server in clusters.values() if server not in first)]
