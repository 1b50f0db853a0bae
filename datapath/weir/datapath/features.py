# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do, found by trying: versions lie where vendors backport."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from weir.datapath import libbpf

_SCHED_CLS = 3
_CGROUP_SOCK_ADDR = 18
_REDIRECT_PEER = 155
_LOOP = 181
_SET_RETVAL = 187


@dataclass(frozen=True, slots=True)
class Features:
    """tcx: links for tc programs (6.6), else clsact filters. set_retval: a refused
    connect() says ECONNREFUSED (5.18), else EPERM. redirect_peer: 5.10. loop: 5.17."""

    tcx: bool
    set_retval: bool
    redirect_peer: bool
    loop: bool
    kernel: str


def probe() -> Features:
    return Features(
        tcx=libbpf.tcx_exists(),
        set_retval=libbpf.helper_exists(_CGROUP_SOCK_ADDR, _SET_RETVAL),
        redirect_peer=libbpf.helper_exists(_SCHED_CLS, _REDIRECT_PEER),
        loop=libbpf.helper_exists(_SCHED_CLS, _LOOP),
        kernel=platform.release(),
    )
