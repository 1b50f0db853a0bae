# SPDX-License-Identifier: Apache-2.0
"""The CNI half of an agent as a process of its own, with a scripted stand-in for the datapath.

`python -m support.cni_agent FOLDER [--…]` serves FOLDER/cni.sock until SIGTERM, prints a line
with what it found at start, and writes every call of the stand-in to FOLDER/calls, so that a
test can kill it and read on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from weir.api.address import parse_cidr
from weir.cni.endpoint import EndpointStore, LocalEndpoint, PodRef
from weir.cni.errors import NotReady, Refused
from weir.cni.ipam import Pool
from weir.cni.netlink import IFF_UP
from weir.cni.server import CniServer
from weir.cni.service import CniService
from weir.cni.wiring import Wiring

SIOCGIFFLAGS = 0x8913


class ScriptedHost:
    """`die_at`: SIGKILL to ourselves at that step; `fail_at`: Refused there;
    `unknown`: the name of a pod whose class never comes."""

    def __init__(self, calls: Path, die_at: str, fail_at: str, unknown: str, limited: bool) -> None:
        self._file = os.open(calls, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._ioctl = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._die_at = die_at
        self._fail_at = fail_at
        self._unknown = unknown
        self._limited = limited

    def _step(self, step: str, what: str) -> None:
        os.write(self._file, f"{step} {what}\n".encode())
        if step == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self._fail_at:
            raise Refused(f"scripted failure of {step}", details=what)

    async def identity(self, pod: PodRef, timeout: float) -> None:  # noqa: ASYNC109 EndpointHost's
        self._step("identity", str(pod))
        if self._unknown and pod.name == self._unknown:
            await asyncio.sleep(timeout)
            raise NotReady(f"the class of {pod} is not known yet")

    async def publish(self, endpoint: LocalEndpoint) -> None:
        self._step("publish", endpoint.host_ifname)

    async def attach(self, ifname: str) -> None:
        request = struct.pack("16sH14x", ifname.encode(), 0)
        flags = struct.unpack_from("=H", fcntl.ioctl(self._ioctl, SIOCGIFFLAGS, request), 16)[0]
        self._step("attach", f"{ifname} {'up' if flags & IFF_UP else 'down'}")

    async def withdraw(self, container_id: str) -> None:
        self._step("withdraw", container_id)

    def status(self) -> None:
        if self._limited:
            raise NotReady("scripted: the datapath is broken", limited=True)


async def serve(args: argparse.Namespace) -> None:
    folder: Path = args.folder
    started = time.perf_counter()
    pool = Pool(
        args.journal or folder / "ipam.journal",
        [parse_cidr(cidr) for cidr in args.cidr],
        cooldown=args.cooldown,
    )
    store = EndpointStore(folder / "endpoints")
    wiring = Wiring(args.mtu)
    host = ScriptedHost(folder / "calls", args.die_at, args.fail_at, args.unknown, args.limited)
    service = CniService(pool, wiring, host, store, identity_seconds=args.identity_seconds)
    await wiring.prepare_host()
    found = await service.start()
    server = CniServer(service, folder / "cni.sock")
    task = asyncio.create_task(server.run())
    await server.listening.wait()
    print(f"{found} after {time.perf_counter() - started:.3f} s", flush=True)
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
    wiring.close()
    store.close()
    pool.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--cidr", action="append", default=[])
    parser.add_argument("--cooldown", type=float, default=30.0)
    parser.add_argument("--mtu", type=int, default=1450)
    parser.add_argument("--identity-seconds", type=float, default=0.5)
    parser.add_argument("--die-at", default="")
    parser.add_argument("--fail-at", default="")
    parser.add_argument("--unknown", default="")
    parser.add_argument("--limited", action="store_true")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
