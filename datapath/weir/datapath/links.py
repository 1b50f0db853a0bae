# SPDX-License-Identifier: Apache-2.0
"""Attaches programs to interfaces and cgroups, and swaps them with no moment without one.

Every attachment is a pin below links/ (see pins). With TCX and cgroups that is the link
itself; for clsact, whose filters live on the device, it is the program, as a note that we
attached. An interface is one of the current network namespace.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weir.datapath import libbpf, pins
from weir.datapath.errors import DatapathError, DeviceGone
from weir.datapath.libbpf import AttachType, LinkType, XdpMode

logger = logging.getLogger(__name__)

# Our place among clsact filters. Replacing at one place is atomic, and other tools that
# number their filters from 1 or from 49152 down do not meet us there.
TC_HANDLE = 1
TC_PRIORITY = 0xC1


# By setting: how XDP is attached, the best way first.
XDP_MODES: Mapping[str, tuple[XdpMode, ...]] = {
    "off": (),
    "native": (XdpMode.NATIVE,),
    "generic": (XdpMode.GENERIC,),
    "auto": (XdpMode.NATIVE, XdpMode.GENERIC),
}


@dataclass(frozen=True, slots=True)
class Attachment:
    """A program on one side of an interface. `brief`: the interface comes and goes, so attaching
    must be quick. A TCX link waits for an RCU grace period with the RTNL lock held: 25 to 35 ms
    for the two of a pod, during which no other pod is wired. A clsact filter takes 0.2 ms, but
    costs each packet more: `Links.settle` makes it a link when there is time."""

    program: str
    egress: bool
    brief: bool = False


def ifindex_of(ifname: str) -> int:
    try:
        return socket.if_nametoindex(ifname)
    except OSError as error:
        raise DeviceGone("attach to", ifname, errno.ENODEV) from error


class Links:
    """The attachments of one installation. `programs` are descriptors by name."""

    def __init__(
        self, tree: pins.Pins, programs: Mapping[str, int], ids: Mapping[str, int], tcx: bool
    ) -> None:
        self._tree = tree
        self._programs = programs
        self._ids = ids
        self._tcx = tcx

    # ---- interfaces ----------------------------------------------------------

    def attach(self, ifname: str, attachments: tuple[Attachment, ...]) -> None:
        """Attaches, or makes sure that it is so. DeviceGone if there is no such interface."""
        ifindex = ifindex_of(ifname)
        folder = self._tree.interface(ifname)
        pins.make_folder(folder)
        for wanted in attachments:
            path = folder / wanted.program
            if self._tcx and (not wanted.brief or _is_link(path)):
                self._attach_tcx(path, ifindex, wanted)
            else:
                self._attach_clsact(path, ifindex, wanted)

    def settle(self, ifname: str, attachments: tuple[Attachment, ...]) -> bool:
        """Makes links of the filters of `attach`, where the kernel has TCX. False: nothing to do.

        At no moment a packet passes unseen or twice: the link runs first and its verdict is
        final, and the filter goes after it came.
        """
        folder = self._tree.interface(ifname)
        notes = [a for a in attachments if self._noted(folder / a.program) is not None]
        if not self._tcx or not notes:
            return False
        ifindex = ifindex_of(ifname)
        for wanted in notes:
            self._attach_tcx(folder / wanted.program, ifindex, wanted)
        return True

    def _attach_tcx(self, path: Path, ifindex: int, wanted: Attachment) -> None:
        side = AttachType.TCX_EGRESS if wanted.egress else AttachType.TCX_INGRESS
        name = f"{wanted.program} of {path.parent.name}"
        fd = libbpf.get_pinned(path)
        if fd is not None:
            try:
                if libbpf.is_link(fd):
                    info = libbpf.link_info(fd, name)
                    if (info.ifindex, info.attach_type) == (ifindex, side):
                        self._update(fd, wanted.program, name)
                        _remove_filter(ifindex, wanted)
                        return
            finally:
                os.close(fd)
        # A pin that is there is a filter's note, or of a device that had this name before.
        fd = libbpf.create_link(self._programs[wanted.program], ifindex, side, name)
        try:
            pins.pin_over(fd, path)
        finally:
            os.close(fd)
        _remove_filter(ifindex, wanted)

    def _update(self, link: int, program: str, name: str) -> None:
        if libbpf.link_info(link, name).program_id != self._ids[program]:
            libbpf.update_link(link, self._programs[program], name)
            logger.info("swapped %s", name)

    def _attach_clsact(self, path: Path, ifindex: int, wanted: Attachment) -> None:
        program = self._programs[wanted.program]
        current = libbpf.tc_query(ifindex, wanted.egress, TC_HANDLE, TC_PRIORITY)
        if current != self._ids[wanted.program]:
            libbpf.tc_attach(ifindex, wanted.egress, program, TC_HANDLE, TC_PRIORITY)
        if self._noted(path) != self._ids[wanted.program]:
            pins.pin_over(program, path)

    @staticmethod
    def _noted(path: Path) -> int | None:
        """The program that a filter's pin names; None: no pin, or a link's."""
        fd = libbpf.get_pinned(path)
        if fd is None:
            return None
        try:
            return None if libbpf.is_link(fd) else libbpf.program_info(fd, path.name).id
        finally:
            os.close(fd)

    def detach(self, ifname: str, attachments: tuple[Attachment, ...]) -> None:
        """Detaches; what is not attached, or has no device any more, is fine."""
        folder = self._tree.interface(ifname)
        for wanted in attachments:
            path = folder / wanted.program
            fd = libbpf.get_pinned(path)
            if fd is None:
                continue
            try:
                self._detach(fd, ifname, wanted)
            finally:
                os.close(fd)
            path.unlink(missing_ok=True)
        pins.remove_tree(folder)

    @staticmethod
    def _detach(fd: int, ifname: str, wanted: Attachment) -> None:
        if libbpf.is_link(fd):
            libbpf.detach_link(fd, f"{wanted.program} of {ifname}")
            return
        try:
            ifindex = ifindex_of(ifname)
        except DeviceGone:
            return
        libbpf.tc_detach(ifindex, wanted.egress, TC_HANDLE, TC_PRIORITY)

    # ---- XDP -----------------------------------------------------------------

    def attach_xdp(self, ifname: str, program: str, modes: Sequence[XdpMode]) -> XdpMode | None:
        """Attaches by the first of these modes that the device takes; one that is attached by any
        of them stays. None: by none, and then nothing of ours is attached any more."""
        ifindex = ifindex_of(ifname)
        path = self._tree.interface(ifname) / program
        name = f"{program} of {ifname}"
        fd = libbpf.get_pinned(path)
        if fd is not None:
            try:
                mode = self._keep_xdp(fd, ifindex, program, name, modes)
                if mode is not None:
                    return mode
                libbpf.detach_link(fd, name)
                path.unlink()
                logger.info("detached %s", name)
            finally:
                os.close(fd)
        for mode in modes:
            try:
                fd = libbpf.create_link(
                    self._programs[program], ifindex, AttachType.XDP, name, flags=mode
                )
            except DatapathError as error:
                logger.info("%s: no %s XDP: %s", ifname, mode.name.lower(), error)
                continue
            try:
                pins.make_folder(path.parent)
                pins.pin_over(fd, path)
            finally:
                os.close(fd)
            logger.info("attached %s, %s", name, mode.name.lower())
            return mode
        return None

    def _keep_xdp(
        self, fd: int, ifindex: int, program: str, name: str, modes: Sequence[XdpMode]
    ) -> XdpMode | None:
        """The mode of a link that may stay, with the current program; None: it may not."""
        if not libbpf.is_link(fd) or libbpf.link_info(fd, name).ifindex != ifindex:
            return None
        mode = libbpf.xdp_mode(ifindex, name)
        if mode not in modes:
            return None
        self._update(fd, program, name)
        return mode

    # ---- after a start -----------------------------------------------------------

    def refresh(self, attachments: Mapping[str, Attachment]) -> None:
        """Moves all attachments found to the current programs; prunes those of devices that
        are gone and of programs that are no more."""
        for ifname, folder in self._tree.interfaces().items():
            for program, path in pins.files(folder).items():
                wanted = attachments.get(program)
                if wanted is None or not self._refresh_one(ifname, path, wanted):
                    path.unlink(missing_ok=True)
                    logger.info("pruned %s of %s", program, ifname)
            if not pins.files(folder):
                pins.remove_tree(folder)

    def _refresh_one(self, ifname: str, path: Path, wanted: Attachment) -> bool:
        name = f"{wanted.program} of {ifname}"
        with pins.opened(path) as fd:
            if libbpf.is_link(fd):
                try:
                    self._update(fd, wanted.program, name)
                except DeviceGone:
                    return False
                return libbpf.link_info(fd, name).ifindex != 0
        try:
            ifindex = ifindex_of(ifname)
        except DeviceGone:
            return False
        # A filter that is gone was on another device of that name.
        if libbpf.tc_query(ifindex, wanted.egress, TC_HANDLE, TC_PRIORITY) is None:
            return False
        self._attach_clsact(path, ifindex, wanted)
        return True

    def attached(self, roles: Iterable[tuple[Attachment, ...]]) -> set[str]:
        """The existing interfaces that have all attachments of one of these roles."""
        wanted = list(roles)
        return {
            ifname
            for ifname, folder in self._tree.interfaces().items()
            if any(self._all_alive(ifname, pins.files(folder), role) for role in wanted)
        }

    def with_program(self, program: str) -> set[str]:
        """The interfaces that it is noted to be attached to, whether they exist or not."""
        interfaces = self._tree.interfaces().items()
        return {ifname for ifname, folder in interfaces if program in pins.files(folder)}

    @staticmethod
    def _all_alive(ifname: str, found: Mapping[str, Path], role: tuple[Attachment, ...]) -> bool:
        try:
            ifindex = ifindex_of(ifname)
        except DeviceGone:
            return False
        return all(
            wanted.program in found and _is_alive(ifindex, found[wanted.program], wanted)
            for wanted in role
        )

    # ---- cgroup ------------------------------------------------------------------

    def attach_cgroup(self, cgroup: Path, programs: Mapping[str, int]) -> None:
        """Attaches the programs (name → attach type) to a cgroup; detaches what is no more."""
        pins.require_cgroup2(cgroup)
        folder = self._tree.links / pins.CGROUP
        pins.make_folder(folder)
        identity = cgroup.stat().st_ino
        for path in set(pins.files(folder).values()) - {folder / name for name in programs}:
            path.unlink()
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for program, attach_type in programs.items():
                self._attach_cgroup(folder / program, target, identity, attach_type)
        finally:
            os.close(target)

    def _attach_cgroup(self, path: Path, target: int, identity: int, attach_type: int) -> None:
        name = f"{path.name} of the cgroup"
        fd = libbpf.get_pinned(path)
        if fd is not None:
            try:
                info = libbpf.link_info(fd, name)
                same = info.type == LinkType.CGROUP and info.cgroup_id == identity
                if same and info.attach_type == attach_type:
                    self._update(fd, path.name, name)
                    return
            except DeviceGone:
                logger.info("%s is gone", name)
            finally:
                os.close(fd)
        fd = libbpf.create_link(self._programs[path.name], target, attach_type, name)
        try:
            # The old link goes with its pin, only once the new one works.
            pins.pin_over(fd, path)
        finally:
            os.close(fd)


def _is_link(path: Path) -> bool:
    fd = libbpf.get_pinned(path)
    if fd is None:
        return False
    try:
        return libbpf.is_link(fd)
    finally:
        os.close(fd)


def _remove_filter(ifindex: int, wanted: Attachment) -> None:
    """What a link took the place of, also if we ended between the two."""
    if wanted.brief and libbpf.tc_query(ifindex, wanted.egress, TC_HANDLE, TC_PRIORITY):
        libbpf.tc_detach(ifindex, wanted.egress, TC_HANDLE, TC_PRIORITY)


def _is_alive(ifindex: int, path: Path, wanted: Attachment) -> bool:
    with pins.opened(path) as fd:
        if libbpf.is_link(fd):
            return libbpf.link_info(fd, wanted.program).ifindex == ifindex
    return libbpf.tc_query(ifindex, wanted.egress, TC_HANDLE, TC_PRIORITY) is not None


def detach_all(tree: pins.Pins, attachments: Mapping[str, Attachment]) -> None:
    """Detaches everything that is noted below links/."""
    links = Links(tree, {}, {}, tcx=True)
    for ifname in tree.interfaces():
        links.detach(ifname, tuple(attachments.values()))
    for path in pins.files(tree.links / pins.CGROUP).values():
        with pins.opened(path) as fd:
            try:
                libbpf.detach_link(fd, path.name)
            except DatapathError as error:
                logger.warning("%s", error)
    pins.remove_tree(tree.links)
