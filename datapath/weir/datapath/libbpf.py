# SPDX-License-Identifier: Apache-2.0
"""The only user of cffi: libbpf's calls with Python types, and errors as DatapathError.

File descriptors are plain ints that the caller owns. Addresses of buffers, batch tokens and
libbpf's error conventions do not leave this module, which is why it is one and long.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from weir.datapath import errors
from weir.datapath._libbpf import ffi, lib

BPF_FS_MAGIC = 0xCAFE4A11
CGROUP2_MAGIC = 0x63677270
BPF_ANY = 0
BPF_NOEXIST = 1
LOG_ROOM = 128 * 1024
TEST_RUN_ROOM = 64 * 1024

lib.weir_log_init()


class MapType(IntEnum):
    """enum bpf_map_type: those that the datapath uses."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    RINGBUF = 27

    @property
    def per_cpu(self) -> bool:
        return self in {self.PERCPU_HASH, self.PERCPU_ARRAY, self.LRU_PERCPU_HASH}


class AttachType(IntEnum):
    """enum bpf_attach_type: those that user space names itself."""

    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class LinkType(IntEnum):
    """enum bpf_link_type."""

    CGROUP = 3
    XDP = 6
    TCX = 11


class XdpMode(IntEnum):
    """XDP_FLAGS_* of an attachment, by which of its ways into the kernel it takes."""

    GENERIC = 2
    NATIVE = 4


# enum XDP_ATTACHED_*; several at once, or in hardware, is not ours.
_XDP_ATTACHED = {1: XdpMode.NATIVE, 2: XdpMode.GENERIC}


@dataclass(frozen=True, slots=True)
class MapShape:
    """What must be equal for a map to be used in place of another, and its size."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """A map as an object file declares it."""

    name: str
    shape: MapShape
    key_type: int
    value_type: int


@dataclass(frozen=True, slots=True)
class MapInfo:
    """A map as the kernel has it."""

    id: int
    shape: MapShape


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """`verified` is the number of instructions the verifier walked (0 before Linux 5.16)."""

    id: int
    instructions: int
    verified: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """`ifindex` is 0 when the device of a TCX link is gone."""

    type: int
    id: int
    program_id: int
    ifindex: int
    attach_type: int
    cgroup_id: int


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome of BPF_PROG_TEST_RUN."""

    retval: int
    packet: bytes
    duration_ns: int
    mark: int
    cb: tuple[int, ...]


def _take_log() -> str:
    room = ffi.new("char[]", LOG_ROOM)
    used = lib.weir_log_take(room, LOG_ROOM)
    return bytes(ffi.buffer(room, used)).decode(errors="replace")


def failure(operation: str, subject: str, number: int) -> errors.DatapathError:
    """The exception for an errno, with what libbpf had to say about it."""
    log = _take_log().strip()
    hint = " | ".join(log.splitlines()[-3:])
    if number in {errno.EPERM, errno.EACCES}:
        needed = (
            "needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON; before Linux 5.11 also"
            " CAP_SYS_RESOURCE or an unlimited RLIMIT_MEMLOCK"
        )
        lockdown = "kernel lockdown can refuse it too: see /sys/kernel/security/lockdown"
        return errors.NotPermitted(operation, subject, number, "; ".join([needed, lockdown]))
    if number in {errno.ENODEV, errno.ENOLINK}:
        return errors.DeviceGone(operation, subject, number, hint)
    return errors.DatapathError(operation, subject, number, hint)


def check(result: int, operation: str, subject: str) -> int:
    if result < 0:
        raise failure(operation, subject, -result)
    return result


class Object:
    """An opened object file: its maps and programs, before and after load."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name = name
        # libbpf reads from our copy until it has loaded the object.
        self._data = ffi.from_buffer(data)
        number = ffi.new("int *")
        self._object = lib.weir_object_open(self._data, len(data), name.encode(), number)
        if self._object == ffi.NULL:
            raise failure("open", name, -number[0])

    def close(self) -> None:
        if self._object != ffi.NULL:
            lib.bpf_object__close(self._object)
            self._object = ffi.NULL

    def btf(self) -> bytes:
        """The object's type information as in its .BTF section."""
        size = ffi.new("__u32 *")
        data = lib.btf__raw_data(lib.bpf_object__btf(self._object), size)
        return bytes(ffi.buffer(data, size[0]))

    def load_btf(self) -> int | None:
        """A file descriptor of the object's BTF in the kernel, None where that refuses it."""
        result: int = lib.weir_btf_load(lib.bpf_object__btf(self._object))
        if result < 0:
            _take_log()
            return None
        return os.dup(result)

    def _maps(self) -> Iterator[Any]:
        entry = lib.bpf_object__next_map(self._object, ffi.NULL)
        while entry != ffi.NULL:
            yield entry
            entry = lib.bpf_object__next_map(self._object, entry)

    def maps(self) -> list[MapDefinition]:
        """The maps declared as pinned by name. The others live and die with the programs:
        libbpf makes them at load, as it does for global variables."""
        return [
            MapDefinition(
                name=ffi.string(lib.bpf_map__name(entry)).decode(),
                shape=MapShape(
                    type=lib.weir_map_type(entry),
                    key_size=lib.bpf_map__key_size(entry),
                    value_size=lib.bpf_map__value_size(entry),
                    max_entries=lib.bpf_map__max_entries(entry),
                    flags=lib.bpf_map__map_flags(entry),
                ),
                key_type=lib.bpf_map__btf_key_type_id(entry),
                value_type=lib.bpf_map__btf_value_type_id(entry),
            )
            for entry in self._maps()
            if lib.bpf_map__pin_path(entry) != ffi.NULL
        ]

    def use_map(self, name: str, fd: int) -> None:
        """Lets the programs use an existing map, whatever the object says about pinning."""
        for entry in self._maps():
            if ffi.string(lib.bpf_map__name(entry)).decode() == name:
                check(lib.bpf_map__set_pin_path(entry, ffi.NULL), "unpin", name)
                check(lib.bpf_map__reuse_fd(entry, fd), "reuse map", name)
                return
        raise errors.DatapathError("reuse map", name, 0, f"{self.name} has no such map")

    def rodata(self) -> bytearray:
        """The initial values of the constants (`const volatile` globals)."""
        return bytearray(self._rodata() or b"")

    def set_rodata(self, data: bytes | bytearray) -> None:
        view = self._rodata()
        if view is not None:
            view[:] = bytes(data)

    def _rodata(self) -> Any:
        for entry in self._maps():
            name = ffi.string(lib.bpf_map__name(entry))
            if lib.bpf_map__is_internal(entry) and name.endswith(b".rodata"):
                size = ffi.new("size_t *")
                return ffi.buffer(lib.weir_map_initial_value(entry, size), size[0])
        return None

    def load(self) -> None:
        """Loads all programs. VerifierRejected names the one that the kernel refuses."""
        _take_log()
        result = lib.bpf_object__load(self._object)
        if result == 0:
            return
        log = _take_log()
        if "BEGIN PROG LOAD LOG" in log or result in {-errno.EACCES, -errno.EINVAL}:
            raise errors.VerifierRejected(_rejected(log) or self.name, -result, log)
        raise failure("load", self.name, -result)

    def _programs(self) -> Iterator[Any]:
        entry = lib.bpf_object__next_program(self._object, ffi.NULL)
        while entry != ffi.NULL:
            yield entry
            entry = lib.bpf_object__next_program(self._object, entry)

    def programs(self) -> dict[str, int]:
        """Program name → attach type that its section implies (0 for tc)."""
        return {
            ffi.string(lib.bpf_program__name(entry)).decode(): lib.weir_program_attach_type(entry)
            for entry in self._programs()
        }

    def program_fds(self) -> dict[str, int]:
        """Program name → descriptor of its own for each, once loaded."""
        return {
            ffi.string(lib.bpf_program__name(entry)).decode(): os.dup(lib.bpf_program__fd(entry))
            for entry in self._programs()
        }


def _rejected(log: str) -> str:
    """The name in libbpf's "prog 'NAME': BPF program load failed"."""
    _, found, rest = log.partition("prog '")
    return rest.partition("'")[0] if found else ""


def fs_magic(path: Path) -> int:
    """statfs' f_type, 0 if there is no such path."""
    return max(0, int(lib.weir_fs_magic(os.fsencode(path))))


def possible_cpus() -> int:
    return check(lib.libbpf_num_possible_cpus(), "count", "CPUs")


# ---- objects in the kernel ---------------------------------------------------


def create_map(name: str, shape: MapShape, btf: int | None, key_type: int, value_type: int) -> int:
    """A new map; without BTF where this kernel does not take it for this type of map."""
    sizes = (shape.key_size, shape.value_size, shape.max_entries, shape.flags)
    kernel_name = name.encode()[:15]
    for fd in (btf if btf is not None and key_type else -1, -1):
        result = lib.weir_map_create(shape.type, kernel_name, *sizes, fd, key_type, value_type)
        if result >= 0 or fd < 0:
            break
    return check(result, "create map", f"{name} ({shape.max_entries} entries)")


def map_info(fd: int, name: str = "map") -> MapInfo:
    info = ffi.new("struct bpf_map_info *")
    check(lib.weir_map_info(fd, info), "inspect map", name)
    shape = MapShape(info.type, info.key_size, info.value_size, info.max_entries, info.map_flags)
    return MapInfo(info.id, shape)


def program_info(fd: int, name: str = "program") -> ProgramInfo:
    info = ffi.new("struct bpf_prog_info *")
    check(lib.weir_prog_info(fd, info), "inspect program", name)
    return ProgramInfo(info.id, info.xlated_prog_len // 8, info.verified_insns)


def link_info(fd: int, name: str = "link") -> LinkInfo:
    info = ffi.new("struct weir_link_info *")
    check(lib.weir_link_info(fd, info), "inspect link", name)
    return LinkInfo(
        info.type, info.id, info.prog_id, info.ifindex, info.attach_type, info.cgroup_id
    )


def pin(fd: int, path: Path) -> None:
    check(lib.bpf_obj_pin(fd, os.fsencode(path)), "pin", str(path))


def get_pinned(path: Path) -> int | None:
    """A new descriptor of what is pinned there, None if nothing is."""
    fd: int = lib.bpf_obj_get(os.fsencode(path))
    if fd == -errno.ENOENT:
        return None
    return check(fd, "open pin", str(path))


def is_link(fd: int) -> bool:
    """Whether it is a link rather than a program or map; kernels write it with - or _."""
    kind = Path(f"/proc/self/fd/{fd}").readlink().name
    return kind in {"anon_inode:bpf-link", "anon_inode:bpf_link"}


def create_link(program: int, target: int, attach_type: int, name: str, flags: int = 0) -> int:
    return check(lib.weir_link_create(program, target, attach_type, flags), "attach", name)


def xdp_mode(ifindex: int, name: str) -> XdpMode | None:
    """How XDP is attached to an interface, by anybody."""
    mode = check(lib.weir_xdp_mode(ifindex), "inspect", f"XDP of {name}")
    return _XDP_ATTACHED.get(mode)


def update_link(link: int, program: int, name: str) -> None:
    """Swaps the program of a link; at no moment there is none. DeviceGone when it is."""
    check(lib.weir_link_update(link, program), "swap program of", name)


def detach_link(link: int, name: str) -> None:
    result = lib.bpf_link_detach(link)
    if result not in {-errno.ENOLINK, -errno.EOPNOTSUPP}:
        check(result, "detach", name)


def helper_exists(program_type: int, helper: int) -> bool:
    known: bool = lib.weir_helper_probe(program_type, helper) == 1
    _take_log()
    return known


def tcx_exists() -> bool:
    found: bool = lib.weir_tcx_probe() == 0
    return found


# ---- clsact, where there is no TCX ---------------------------------------------


def tc_attach(ifindex: int, egress: bool, program: int, handle: int, priority: int) -> None:
    """Puts the program at this handle and priority, in place of what is there."""
    result = lib.weir_tc_attach(ifindex, egress, program, handle, priority)
    check(result, "attach", f"clsact of interface {ifindex}")


def tc_query(ifindex: int, egress: bool, handle: int, priority: int) -> int | None:
    """The id of the program there, None if there is none (or no device)."""
    program = ffi.new("__u32 *")
    result = lib.weir_tc_query(ifindex, egress, handle, priority, program)
    _take_log()
    return program[0] if result == 0 else None


def tc_detach(ifindex: int, egress: bool, handle: int, priority: int) -> None:
    result = lib.weir_tc_detach(ifindex, egress, handle, priority)
    if result not in {-errno.ENOENT, -errno.ENODEV, -errno.EINVAL}:
        check(result, "detach", f"clsact of interface {ifindex}")
    _take_log()


# ---- map entries -----------------------------------------------------------------


def lookup(fd: int, key: bytes, value_size: int) -> bytes | None:
    value = ffi.new("char[]", value_size)
    result = lib.bpf_map_lookup_elem(fd, ffi.from_buffer(key), value)
    if result == -errno.ENOENT:
        return None
    check(result, "look up in", "map")
    return bytes(ffi.buffer(value))


def walk(fd: int, key_size: int, value_size: int, chunk: int) -> Iterator[tuple[bytes, bytes]]:
    """All entries as (keys, values) of up to `chunk` each, packed. `value_size`: as copied out."""
    token = ffi.new("char[]", max(key_size, 8))
    count = ffi.new("__u32 *")
    first = True
    while True:
        keys = ffi.new("char[]", key_size * chunk)
        values = ffi.new("char[]", value_size * chunk)
        count[0] = chunk
        result = lib.weir_map_walk(fd, first, token, keys, key_size, values, value_size, count)
        if result == -errno.ENOSPC:  # a hash bucket holds more entries than that
            chunk *= 2
            continue
        check(result, "walk", "map")
        first = False
        if count[0]:
            yield (
                bytes(ffi.buffer(keys, count[0] * key_size)),
                bytes(ffi.buffer(values, count[0] * value_size)),
            )
        if result == 1:
            return


def update(
    fd: int, keys: bytes, key_size: int, values: bytes, value_size: int, flags: int = BPF_ANY
) -> tuple[int, int]:
    """Writes entries in order. Returns how many were written and the errno that stopped it."""
    done = ffi.new("__u32 *")
    count = len(keys) // key_size
    result = lib.weir_map_update(
        fd,
        ffi.from_buffer(keys),
        key_size,
        ffi.from_buffer(values),
        value_size,
        count,
        flags,
        done,
    )
    return done[0], -result


def delete(fd: int, keys: bytes, key_size: int) -> tuple[int, int]:
    """Deletes entries, absent ones are skipped. Returns as `update`."""
    done = ffi.new("__u32 *")
    result = lib.weir_map_delete(fd, ffi.from_buffer(keys), key_size, len(keys) // key_size, done)
    return done[0], -result


def delete_unchanged(
    fd: int, keys: bytes, key_size: int, values: bytes, value_size: int, span: range
) -> tuple[int, int]:
    """Deletes entries whose value still is as in `values` at the bytes of `span`. Returns how many
    it deleted and the errno that stopped it."""
    done = ffi.new("__u32 *")
    result = lib.weir_map_delete_unchanged(
        fd,
        ffi.from_buffer(keys),
        key_size,
        ffi.from_buffer(values),
        value_size,
        span.start,
        len(span),
        len(keys) // key_size,
        done,
    )
    return done[0], -result


# ---- ring buffer and test runs -----------------------------------------------------


class Ring:
    """A ring buffer's consumer for records of one size; a drain is one call into C."""

    def __init__(self, fd: int, record_size: int, records: int) -> None:
        self._buffer = ffi.new("unsigned char[]", record_size * records)
        self._drain = ffi.new("struct weir_drain *")
        self._drain.buffer = self._buffer
        self._drain.capacity = record_size * records
        self._drain.record_size = record_size
        number = ffi.new("int *")
        self._ring = lib.weir_ring_open(fd, self._drain, number)
        if self._ring == ffi.NULL:
            raise failure("open ring buffer", "events", -number[0])

    @property
    def fd(self) -> int:
        """Readable while there are records; for select, epoll and asyncio."""
        return int(lib.ring_buffer__epoll_fd(self._ring))

    @property
    def malformed(self) -> int:
        """Records that were too short to be ours, since the start."""
        return int(self._drain.malformed)

    def drain(self) -> bytes:
        """The records that are there, as many as the buffer holds."""
        self._drain.used = 0
        result = lib.ring_buffer__consume(self._ring)
        if result < 0 and result != -errno.ENOSPC:
            raise failure("drain", "events", -result)
        return bytes(ffi.buffer(self._buffer, self._drain.used))

    def close(self) -> None:
        if self._ring != ffi.NULL:
            lib.ring_buffer__free(self._ring)
            self._ring = ffi.NULL


def run_xdp(program: int, packet: bytes, *, ifindex: int = 0, repeat: int = 1) -> RunResult:
    """Runs an XDP program on a packet as if it had come in by `ifindex` (0: loopback)."""
    context = ffi.new("struct xdp_md *")
    context.data_end = len(packet)
    context.ingress_ifindex = ifindex
    options = ffi.new("struct bpf_test_run_opts *")
    if ifindex:
        options.ctx_in = context
        options.ctx_size_in = ffi.sizeof("struct xdp_md")
    packet_out = _test_run(program, packet, options, repeat)
    return RunResult(options.retval, packet_out, options.duration, 0, ())


def run_program(
    program: int,
    packet: bytes,
    *,
    ifindex: int = 0,
    ingress_ifindex: int = 0,
    mark: int = 0,
    repeat: int = 1,
) -> RunResult:
    """Runs a tc program on a packet as if `ifindex` (of this network namespace) had it."""
    context = ffi.new("struct __sk_buff *")
    context.ifindex = ifindex
    context.ingress_ifindex = ingress_ifindex
    context.mark = mark
    after = ffi.new("struct __sk_buff *")
    options = ffi.new("struct bpf_test_run_opts *")
    options.ctx_in = context
    options.ctx_size_in = ffi.sizeof("struct __sk_buff")
    options.ctx_out = after
    options.ctx_size_out = ffi.sizeof("struct __sk_buff")
    packet_out = _test_run(program, packet, options, repeat)
    return RunResult(options.retval, packet_out, options.duration, after.mark, tuple(after.cb))


def _test_run(program: int, packet: bytes, options: Any, repeat: int) -> bytes:
    """The packet afterwards. options: a struct bpf_test_run_opts with its contexts."""
    data = ffi.from_buffer(packet)
    room = ffi.new("unsigned char[]", TEST_RUN_ROOM)
    options.sz = ffi.sizeof("struct bpf_test_run_opts")
    options.data_in = data
    options.data_size_in = len(packet)
    options.data_out = room
    options.data_size_out = TEST_RUN_ROOM
    options.repeat = repeat
    check(lib.bpf_prog_test_run_opts(program, options), "test run", "program")
    return bytes(ffi.buffer(room, options.data_size_out))
