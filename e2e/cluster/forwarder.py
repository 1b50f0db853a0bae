# SPDX-License-Identifier: Apache-2.0
"""The one way from the machine to the cluster: TCP from a loopback port to the API server.

The listening socket was made in the machine's network namespace and is inherited; the process
itself lives in the control plane's namespaces. So the machine's network gets neither link nor
route, and the forwarder ends with the control plane.
"""

import asyncio
import contextlib
import socket
import sys

from e2e.cluster.supervisor import INHERITED_FD

_CHUNK = 1 << 16


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()


async def _forward(
    target: tuple[str, int], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    try:
        server_reader, server_writer = await asyncio.open_connection(*target)
    except OSError:  # the API server is away: the client sees its connection closed
        writer.close()
        return
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_copy(reader, server_writer))
            group.create_task(_copy(server_reader, writer))
    except* OSError:  # one side reset the connection; closing both tells the other
        pass
    finally:
        for end in (writer, server_writer):
            end.close()
            with contextlib.suppress(OSError):
                await end.wait_closed()


async def serve(target: tuple[str, int]) -> None:
    """Accept on the inherited socket for ever."""
    listener = socket.socket(fileno=INHERITED_FD)
    server = await asyncio.start_server(lambda r, w: _forward(target, r, w), sock=listener)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve((sys.argv[1], int(sys.argv[2]))))
