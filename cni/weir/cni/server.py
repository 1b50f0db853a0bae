# SPDX-License-Identifier: Apache-2.0
"""The unix socket that the shim (cni/shim/weir-cni.c) talks to.

    request  u32 length of env, u32 length of config (big endian)
             env: the CNI_* variables, each "NAME=value\\0"; config: standard input as it came
    answer   u32 exit code, u32 length (big endian), then what goes to standard output

Root only: by the socket's mode, and by the peer's credentials in case a mount shows it to
somebody else. A client that goes away does not stop its call: half an ADD helps nobody, and
the runtime follows with a DEL.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from pathlib import Path

from weir.cni import protocol
from weir.cni.errors import CniError, Code, NotReady
from weir.cni.protocol import CniReply
from weir.cni.service import CniService

logger = logging.getLogger(__name__)

HEAD = struct.Struct("!II")
CREDENTIALS = struct.Struct("=iII")
ENV_MAX = 256 << 10
CONFIG_MAX = 1 << 20
READ_SECONDS = 5.0
CALL_SECONDS = 60.0
"""Less than the shim waits, so that the runtime reads why."""
CALLS_MAX = 512
GRACE_SECONDS = 10.0
BACKLOG = 1024


class CniServer:
    """Serves until `run` is cancelled, then lets calls under way finish for a grace time."""

    def __init__(self, service: CniService, path: Path, *, call_seconds: float = CALL_SECONDS):
        self._service = service
        self._path = path
        self._call_seconds = call_seconds
        self._calls: set[asyncio.Task[None]] = set()
        self.listening = asyncio.Event()

    async def run(self) -> None:
        """Replaces a socket that an earlier agent left, without a moment with none there."""
        async with asyncio.TaskGroup() as group:

            def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                call = group.create_task(self._serve(reader, writer))
                self._calls.add(call)
                call.add_done_callback(self._calls.discard)

            server = await asyncio.start_unix_server(
                accept, sock=_bind(self._path), backlog=BACKLOG
            )
            self.listening.set()
            try:
                async with server:
                    await asyncio.get_running_loop().create_future()
            finally:
                if self._calls:
                    await asyncio.wait(self._calls, timeout=GRACE_SECONDS)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            reply = await self._answer(reader, writer)
            writer.write(HEAD.pack(reply.exit, len(reply.stdout)) + reply.stdout)
            async with asyncio.timeout(READ_SECONDS):
                await writer.drain()
        except (OSError, EOFError, TimeoutError) as failure:
            logger.info("a CNI client went away: %s", failure)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> CniReply:
        version = protocol.DEFAULT_VERSION
        try:
            _check_peer(writer)
            if len(self._calls) > CALLS_MAX:
                raise NotReady(f"more than {CALLS_MAX} CNI calls are under way")
            async with asyncio.timeout(READ_SECONDS):
                env, config = await _read(reader)
            version = protocol.version_of(config)
            request = protocol.parse(env, config)
        except CniError as failure:
            logger.warning("CNI call refused: %s", failure)
            return protocol.error(failure, version)
        try:
            async with asyncio.timeout(self._call_seconds):
                return await self._service.handle(request)
        except TimeoutError:
            logger.warning("%s took more than %g s", request, self._call_seconds)
            late = NotReady(f"{request.command} took more than {self._call_seconds:g} s")
            return protocol.error(late, version)


async def _read(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes]:
    env_length, config_length = HEAD.unpack(await reader.readexactly(HEAD.size))
    if env_length > ENV_MAX or config_length > CONFIG_MAX:
        raise CniError(
            "the CNI call is too large",
            details=f"environment {env_length} of {ENV_MAX}, configuration {config_length}"
            f" of {CONFIG_MAX} bytes",
            code=Code.DECODE_FAILURE,
        )
    text = (await reader.readexactly(env_length)).decode(errors="replace")
    pairs = (part.partition("=") for part in text.split("\0") if part)
    return {name: value for name, _, value in pairs}, await reader.readexactly(config_length)


def _check_peer(writer: asyncio.StreamWriter) -> None:
    peer = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, uid, _ = CREDENTIALS.unpack(credentials)
    if uid != 0:
        raise CniError(f"CNI calls are root's alone, not uid {uid}'s", code=Code.IO_FAILURE)


def _bind(path: Path) -> socket.socket:
    """A listening socket that takes `path` over by a rename, mode 0600 from the first moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        os.fchmod(listener.fileno(), 0o600)  # before bind(): the file is made with this mode
        listener.bind(str(fresh))
        listener.listen(BACKLOG)
        fresh.rename(path)
    except OSError:
        listener.close()
        raise
    return listener
