# SPDX-License-Identifier: Apache-2.0
"""Makes the far ends of the nodes' veths fit for XDP at the near ones, as a wire is.

    python -m e2e.suite.far_ends native|generic DEVICE…      in their network namespace

Says "ready", and goes on until its standard input ends. A veth leaves checksums to be filled in,
which XDP would take for whole; and takes what its other end's XDP sends in the driver only if it
has a program itself, here one that passes everything.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

from weir.datapath import libbpf, loader
from weir.datapath.libbpf import AttachType, XdpMode
from weir.datapath.settings import Settings, Sizes

OBJECT, PROGRAM = "xdp_uplink.bpf.o", "xdp_uplink"


def main() -> int:
    mode, *devices = sys.argv[1:]
    with ExitStack() as stack:
        for device in devices:
            _checksums(device, "off")
            stack.callback(_checksums, device, "on")
        if mode == "native":
            program = passing(stack)
            for device in devices:
                index = socket.if_nametoindex(device)
                link = libbpf.create_link(program, index, AttachType.XDP, device, XdpMode.NATIVE)
                stack.callback(os.close, link)
        print("ready", flush=True)
        sys.stdin.read()
    return 0


def passing(stack: ExitStack) -> int:
    """Weir's own program, with no settings and with empty maps of its own."""
    objects = loader.open_objects([loader.OBJECTS / OBJECT], Settings())
    for opened in objects:
        stack.callback(opened.handle.close)
    for name, (_, _, wanted) in loader.wanted_maps(objects, Sizes()).items():
        made = libbpf.create_map(name, wanted.shape, None, 0, 0)
        stack.callback(os.close, made)
        for opened in objects:
            opened.handle.use_map(name, made)
    [opened] = objects
    opened.handle.load()
    program = opened.handle.program_fds()[PROGRAM]
    stack.callback(os.close, program)
    return program


def _checksums(device: str, state: str) -> None:
    subprocess.run(["ethtool", "-K", device, "tx", state], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
