# SPDX-License-Identifier: Apache-2.0
"""HTTP to the API server: one session, several addresses, tokens read again as they rotate.

The reflectors stream through it, and the few writes go through it. A request that cannot
connect, or that the server fails (5xx), moves on to the next address, round robin over those
configured and those learned meanwhile; whoever retries does so there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType

import aiohttp
import msgspec

from weir.operator.kubeconfig import Access, KubeconfigError
from weir.operator.wire import Status

logger = logging.getLogger(__name__)

LEARNED = 16  # addresses kept besides the configured ones; the latest stay
TOKEN_SECONDS = 10.0  # how long a token is used before its file is read again
USER_AGENT = "weir-operator"


class ApiError(Exception):
    """A request failed. `status` 0: there was no answer."""

    def __init__(self, request: str, status: int, message: str) -> None:
        super().__init__(f"{request}: {message}" + (f" ({status})" if status else ""))
        self.request = request
        self.status = status


class Api:
    """To be used as an async context manager."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._learned: dict[str, None] = {}
        self._server = access.servers[0]
        self._answered = ""
        self._token = ""
        self._token_read = float("-inf")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Api:
        context = await asyncio.to_thread(self._access.ssl_context)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=context, limit=0, use_dns_cache=False),
            headers={"User-Agent": USER_AGENT},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=30),
            read_bufsize=1 << 20,
            auto_decompress=True,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def server(self) -> str:
        """The one in use. May be asked from any thread."""
        return self._server

    @property
    def servers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._access.servers, *self._learned)))

    def learn(self, server: str) -> None:
        """One more API server. Its certificate must be of the same CA, like any other's."""
        if server in self._access.servers:
            return
        if server not in self._learned:
            logger.info("API server: %s is one too", server)
        self._learned.pop(server, None)
        self._learned[server] = None
        while len(self._learned) > LEARNED:
            del self._learned[next(iter(self._learned))]

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        read_seconds: float = 30.0,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer with status 2xx, its body still to be read. ApiError otherwise.

        `read_seconds` without a byte count as a lost connection.
        """
        if self._session is None:
            raise RuntimeError("Api is not open")
        what = f"{method} {path}"
        headers = {"Accept": "application/json"}
        token = await self.token()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None
        if body is not None:
            data = msgspec.json.encode(body)
            headers["Content-Type"] = content_type
        server = self.server
        try:
            async with self._session.request(
                method,
                server + path,
                params=query,
                data=data,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=read_seconds),
            ) as response:
                self._heard(server)
                if response.status >= 300:
                    if response.status >= 500:
                        self._next_server(server)
                    raise await self._failure(what, response)
                yield response
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self._next_server(server)
            raise ApiError(what, 0, f"{server}: {error or type(error).__name__}") from error

    async def get(self, path: str, query: Mapping[str, str] | None = None) -> bytes:
        async with self.request("GET", path, query=query) as response:
            return await response.read()

    async def post(self, path: str, body: object) -> bytes:
        async with self.request("POST", path, body=body) as response:
            return await response.read()

    async def put(self, path: str, body: object) -> bytes:
        async with self.request("PUT", path, body=body) as response:
            return await response.read()

    async def patch(self, path: str, body: object, content_type: str) -> bytes:
        async with self.request("PATCH", path, body=body, content_type=content_type) as response:
            return await response.read()

    async def token(self) -> str:
        now = time.monotonic()
        if now - self._token_read > TOKEN_SECONDS:
            try:
                self._token = await asyncio.to_thread(self._access.current_token)
            except KubeconfigError as error:
                # It may be being replaced; the one that we have is good for a while.
                if not self._token:
                    raise ApiError("token", 0, str(error)) from error
                logger.warning("%s: using the last one", error)
            self._token_read = now
        return self._token

    def _heard(self, server: str) -> None:
        if server != self._answered:
            self._answered = server
            logger.info("API server: %s", server)

    def _next_server(self, failed: str) -> None:
        if self._server == failed:
            known = self.servers
            at = known.index(failed) if failed in known else -1
            self._server = known[(at + 1) % len(known)]

    async def _failure(self, what: str, response: aiohttp.ClientResponse) -> ApiError:
        body = await response.content.read(64 * 1024)
        if response.status == 401:
            self._token_read = float("-inf")  # perhaps it was rotated just now
        try:
            message = msgspec.json.decode(body, type=Status).message
        except msgspec.DecodeError:
            message = None
        return ApiError(what, response.status, message or response.reason or "refused")
