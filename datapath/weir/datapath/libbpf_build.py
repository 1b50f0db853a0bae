# SPDX-License-Identifier: Apache-2.0
"""Builds `_libbpf`, the cffi extension over the system's libbpf (API mode, abi3).

Run by the build hook with this folder as working directory. What loops over map entries
or ring buffer records is C below: one call a batch, with the interpreter lock released.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import cffi

CDEF = """
typedef uint32_t __u32;
typedef uint64_t __u64;
typedef int32_t __s32;

struct bpf_object; struct bpf_map; struct bpf_program; struct btf; struct ring_buffer;

struct bpf_map_info {
    __u32 type; __u32 id; __u32 key_size; __u32 value_size; __u32 max_entries;
    __u32 map_flags; ...;
};
struct bpf_prog_info {
    __u32 type; __u32 id; __u32 jited_prog_len; __u32 xlated_prog_len;
    __u32 verified_insns; ...;
};
struct weir_link_info {
    __u32 type; __u32 id; __u32 prog_id; __u32 ifindex; __u32 attach_type;
    __u64 cgroup_id;
};
struct __sk_buff {
    __u32 mark; __u32 ifindex; __u32 ingress_ifindex; __u32 cb[5]; ...;
};
struct xdp_md {
    __u32 data_end; __u32 ingress_ifindex; ...;
};
struct bpf_test_run_opts {
    size_t sz; const void *data_in; void *data_out; __u32 data_size_in; __u32 data_size_out;
    const void *ctx_in; void *ctx_out; __u32 ctx_size_in; __u32 ctx_size_out;
    __u32 retval; int repeat; __u32 duration; ...;
};
struct weir_drain {
    unsigned char *buffer; size_t capacity; size_t used; __u32 record_size; __u32 malformed;
};

void weir_log_init(void);
size_t weir_log_take(char *out, size_t size);
int libbpf_num_possible_cpus(void);
long weir_fs_magic(const char *path);

struct bpf_object *weir_object_open(const void *data, size_t size, const char *name, int *error);
void bpf_object__close(struct bpf_object *);
int bpf_object__load(struct bpf_object *);
struct btf *bpf_object__btf(const struct bpf_object *);
const void *btf__raw_data(const struct btf *, __u32 *size);
int weir_btf_load(struct btf *);

struct bpf_map *bpf_object__next_map(const struct bpf_object *, const struct bpf_map *);
const char *bpf_map__name(const struct bpf_map *);
_Bool bpf_map__is_internal(const struct bpf_map *);
int weir_map_type(const struct bpf_map *);
__u32 bpf_map__key_size(const struct bpf_map *);
__u32 bpf_map__value_size(const struct bpf_map *);
__u32 bpf_map__max_entries(const struct bpf_map *);
__u32 bpf_map__map_flags(const struct bpf_map *);
__u32 bpf_map__btf_key_type_id(const struct bpf_map *);
__u32 bpf_map__btf_value_type_id(const struct bpf_map *);
int bpf_map__reuse_fd(struct bpf_map *, int fd);
int bpf_map__set_pin_path(struct bpf_map *, const char *path);
const char *bpf_map__pin_path(const struct bpf_map *);
void *weir_map_initial_value(struct bpf_map *, size_t *size);

struct bpf_program *bpf_object__next_program(const struct bpf_object *, struct bpf_program *);
const char *bpf_program__name(const struct bpf_program *);
int bpf_program__fd(const struct bpf_program *);
int weir_program_attach_type(const struct bpf_program *);

int weir_map_create(int type, const char *name, __u32 key_size, __u32 value_size,
                    __u32 max_entries, __u32 flags, int btf_fd, __u32 key_id, __u32 value_id);
int weir_map_info(int fd, struct bpf_map_info *info);
int weir_prog_info(int fd, struct bpf_prog_info *info);
int weir_link_info(int fd, struct weir_link_info *info);
int bpf_obj_pin(int fd, const char *path);
int bpf_obj_get(const char *path);
int weir_link_create(int prog_fd, int target, int attach_type, __u32 flags);
int weir_xdp_mode(int ifindex);
int weir_link_update(int link_fd, int prog_fd);
int bpf_link_detach(int link_fd);
int weir_helper_probe(int prog_type, int helper);
int weir_tcx_probe(void);

int weir_tc_attach(int ifindex, int egress, int prog_fd, __u32 handle, __u32 priority);
int weir_tc_query(int ifindex, int egress, __u32 handle, __u32 priority, __u32 *prog_id);
int weir_tc_detach(int ifindex, int egress, __u32 handle, __u32 priority);

int bpf_map_lookup_elem(int fd, const void *key, void *value);
int weir_map_walk(int fd, int first, void *token, char *keys, __u32 key_size,
                  char *values, __u32 value_size, __u32 *count);
int weir_map_update(int fd, const char *keys, __u32 key_size, const char *values,
                    __u32 value_size, __u32 count, __u64 flags, __u32 *done);
int weir_map_delete(int fd, const char *keys, __u32 key_size, __u32 count, __u32 *done);
int weir_map_delete_unchanged(int fd, const char *keys, __u32 key_size, const char *values,
                              __u32 value_size, __u32 offset, __u32 size, __u32 count,
                              __u32 *done);

struct ring_buffer *weir_ring_open(int map_fd, struct weir_drain *drain, int *error);
int ring_buffer__epoll_fd(const struct ring_buffer *);
int ring_buffer__consume(struct ring_buffer *);
void ring_buffer__free(struct ring_buffer *);

int bpf_prog_test_run_opts(int prog_fd, struct bpf_test_run_opts *opts);
"""

SOURCE = r"""
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/vfs.h>
#include <bpf/bpf.h>
#include <bpf/btf.h>
#include <bpf/libbpf.h>

/* The kernel's own "operation not supported", which errno.h lacks. */
#define KERNEL_ENOTSUPP 524
#define LOG_KEPT (128 * 1024)
#define TCX_INGRESS 46

static __thread char *log_text;
static __thread size_t log_used;

/* Keeps the end of what libbpf says: a verifier's log can be 16 MiB, its end tells why. */
static int keep_log(enum libbpf_print_level level, const char *format, va_list args)
{
    char *line = NULL;
    const char *from;
    size_t size, room;
    int written;

    if (level == LIBBPF_DEBUG)
        return 0;
    written = vasprintf(&line, format, args);
    if (written < 0)
        return 0;
    if (!log_text)
        log_text = malloc(LOG_KEPT);
    if (log_text) {
        size = written > LOG_KEPT ? LOG_KEPT : (size_t)written;
        from = line + written - size;
        room = LOG_KEPT - log_used;
        if (size > room) {
            memmove(log_text, log_text + (size - room), log_used - (size - room));
            log_used -= size - room;
        }
        memcpy(log_text + log_used, from, size);
        log_used += size;
    }
    free(line);
    return written;
}

static void weir_log_init(void)
{
    libbpf_set_print(keep_log);
}

static size_t weir_log_take(char *out, size_t size)
{
    size_t used = log_used < size ? log_used : size;

    if (log_text)
        memcpy(out, log_text + log_used - used, used);
    free(log_text);
    log_text = NULL;
    log_used = 0;
    return used;
}

static long weir_fs_magic(const char *path)
{
    struct statfs info;

    return statfs(path, &info) ? -errno : (long)(unsigned long)(__u32)info.f_type;
}

static struct bpf_object *weir_object_open(const void *data, size_t size, const char *name,
                       int *error)
{
    LIBBPF_OPTS(bpf_object_open_opts, opts, .object_name = name);
    struct bpf_object *object = bpf_object__open_mem(data, size, &opts);

    *error = object ? 0 : -errno;
    return object;
}

static int weir_btf_load(struct btf *btf)
{
    int err = btf__load_into_kernel(btf);

    return err ? err : btf__fd(btf);
}

static int weir_map_type(const struct bpf_map *map)
{
    return bpf_map__type(map);
}

static void *weir_map_initial_value(struct bpf_map *map, size_t *size)
{
    return (void *)bpf_map__initial_value(map, size);
}

static int weir_program_attach_type(const struct bpf_program *program)
{
    return bpf_program__expected_attach_type(program);
}

static int weir_map_create(int type, const char *name, __u32 key_size, __u32 value_size,
               __u32 max_entries, __u32 flags, int btf_fd, __u32 key_id,
               __u32 value_id)
{
    LIBBPF_OPTS(bpf_map_create_opts, opts, .map_flags = flags);

    if (btf_fd >= 0) {
        opts.btf_fd = btf_fd;
        opts.btf_key_type_id = key_id;
        opts.btf_value_type_id = value_id;
    }
    return bpf_map_create(type, name, key_size, value_size, max_entries, &opts);
}

static int weir_map_info(int fd, struct bpf_map_info *info)
{
    __u32 size = sizeof(*info);

    memset(info, 0, size);
    return bpf_obj_get_info_by_fd(fd, info, &size);
}

static int weir_prog_info(int fd, struct bpf_prog_info *info)
{
    __u32 size = sizeof(*info);

    memset(info, 0, size);
    return bpf_obj_get_info_by_fd(fd, info, &size);
}

struct weir_link_info {
    __u32 type, id, prog_id, ifindex, attach_type;
    __u64 cgroup_id;
};

/* Headers older than the kernel lack the TCX member of bpf_link_info: laid out here. */
static int weir_link_info(int fd, struct weir_link_info *out)
{
    struct {
        __u32 type, id, prog_id, pad;
        union {
            struct { __u32 ifindex, attach_type; } tcx;  /* XDP's has the first member only */
            struct { __u64 cgroup_id; __u32 attach_type; } cgroup;
            __u64 room[32];
        };
    } info;
    __u32 size = sizeof(info);
    int err;

    memset(&info, 0, sizeof(info));
    err = bpf_obj_get_info_by_fd(fd, &info, &size);
    if (err)
        return err;
    memset(out, 0, sizeof(*out));
    out->type = info.type;
    out->id = info.id;
    out->prog_id = info.prog_id;
    if (info.type == BPF_LINK_TYPE_CGROUP) {
        out->cgroup_id = info.cgroup.cgroup_id;
        out->attach_type = info.cgroup.attach_type;
    } else {
        out->ifindex = info.tcx.ifindex;
        out->attach_type = info.tcx.attach_type;
    }
    return 0;
}

/* `flags`: of an XDP link, the mode. */
static int weir_link_create(int prog_fd, int target, int attach_type, __u32 flags)
{
    LIBBPF_OPTS(bpf_link_create_opts, options, .flags = flags);

    return bpf_link_create(prog_fd, target, attach_type, &options);
}

/* How XDP is attached to an interface: enum XDP_ATTACHED_*, 0: not at all. */
static int weir_xdp_mode(int ifindex)
{
    LIBBPF_OPTS(bpf_xdp_query_opts, options);
    int err = bpf_xdp_query(ifindex, 0, &options);

    return err ? err : options.attach_mode;
}

static int weir_link_update(int link_fd, int prog_fd)
{
    return bpf_link_update(link_fd, prog_fd, NULL);
}

static int weir_helper_probe(int prog_type, int helper)
{
    return libbpf_probe_bpf_helper(prog_type, helper, NULL);
}

static int weir_tcx_probe(void)
{
    LIBBPF_OPTS(bpf_prog_query_opts, opts);

    /* Interface 1 is the loopback device in every network namespace. */
    return bpf_prog_query_opts(1, TCX_INGRESS, &opts);
}

static int weir_tc_attach(int ifindex, int egress, int prog_fd, __u32 handle, __u32 priority)
{
    LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
            .attach_point = egress ? BPF_TC_EGRESS : BPF_TC_INGRESS);
    LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority,
            .prog_fd = prog_fd, .flags = BPF_TC_F_REPLACE);
    int err = bpf_tc_hook_create(&hook);

    if (err && err != -EEXIST)
        return err;
    return bpf_tc_attach(&hook, &opts);
}

static int weir_tc_query(int ifindex, int egress, __u32 handle, __u32 priority, __u32 *prog_id)
{
    LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
            .attach_point = egress ? BPF_TC_EGRESS : BPF_TC_INGRESS);
    LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);
    int err = bpf_tc_query(&hook, &opts);

    *prog_id = err ? 0 : opts.prog_id;
    return err;
}

static int weir_tc_detach(int ifindex, int egress, __u32 handle, __u32 priority)
{
    LIBBPF_OPTS(bpf_tc_hook, hook, .ifindex = ifindex,
            .attach_point = egress ? BPF_TC_EGRESS : BPF_TC_INGRESS);
    LIBBPF_OPTS(bpf_tc_opts, opts, .handle = handle, .priority = priority);

    return bpf_tc_detach(&hook, &opts);
}

/* Fetches the next entries, *count at most. 0: there are more; 1: that was the end (with
 * entries nevertheless); else -errno. `token` holds a key, or 8 bytes if that is more. */
static int weir_map_walk(int fd, int first, void *token, char *keys, __u32 key_size,
             char *values, __u32 value_size, __u32 *count)
{
    __u32 room = *count;
    int err = bpf_map_lookup_batch(fd, first ? NULL : token, token, keys, values, count, NULL);

    if (err == -ENOENT)
        return 1;
    if (err != -KERNEL_ENOTSUPP)
        return err;
    for (*count = 0; *count < room; ) {
        char *key = keys + (size_t)*count * key_size;

        err = bpf_map_get_next_key(fd, first ? NULL : token, key);
        if (err)
            return err == -ENOENT ? 1 : err;
        first = 0;
        memcpy(token, key, key_size);
        err = bpf_map_lookup_elem(fd, key, values + (size_t)*count * value_size);
        if (err && err != -ENOENT)
            return err;
        if (!err)
            (*count)++;
    }
    return 0;
}

static int weir_map_update(int fd, const char *keys, __u32 key_size, const char *values,
               __u32 value_size, __u32 count, __u64 flags, __u32 *done)
{
    int err;

    *done = count;
    if (!flags) {   /* the batch call takes no flags */
        err = bpf_map_update_batch(fd, keys, values, done, NULL);
        if (err != -KERNEL_ENOTSUPP)
            return err;
    }
    for (*done = 0; *done < count; (*done)++) {
        err = bpf_map_update_elem(fd, keys + (size_t)*done * key_size,
                      values + (size_t)*done * value_size, flags);
        if (err && !(flags == BPF_NOEXIST && err == -EEXIST))
            return err;
    }
    return 0;
}

/* An absent key is as good as a deleted one. */
static int weir_map_delete(int fd, const char *keys, __u32 key_size, __u32 count, __u32 *done)
{
    int err = 0;

    for (*done = 0; *done < count; ) {
        const char *key = keys + (size_t)*done * key_size;
        __u32 some = count - *done;

        err = bpf_map_delete_batch(fd, key, &some, NULL);
        if (err == -KERNEL_ENOTSUPP) {
            some = 0;
            err = bpf_map_delete_elem(fd, key);
            if (!err)
                some = 1;
        }
        *done += some;
        if (err == -ENOENT)
            (*done)++;
        else if (err)
            return err;
    }
    return 0;
}

/* Deletes the entries whose value still has the bytes of `values` at `offset`. An entry that
 * changes between the look and the deletion is put back, unless a program has made it anew:
 * the deletion itself tells what it took, but for kernels before 5.14. */
static int weir_map_delete_unchanged(int fd, const char *keys, __u32 key_size, const char *values,
                     __u32 value_size, __u32 offset, __u32 size, __u32 count,
                     __u32 *done)
{
    char *found = malloc(value_size);
    int err = 0;

    *done = 0;
    if (!found)
        return -ENOMEM;
    for (__u32 i = 0; i < count; i++) {
        const char *key = keys + (size_t)i * key_size;
        const char *wanted = values + (size_t)i * value_size + offset;

        err = bpf_map_lookup_elem(fd, key, found);
        if (!err && memcmp(found + offset, wanted, size))
            continue;
        if (!err)
            err = bpf_map_lookup_and_delete_elem(fd, key, found);
        if (err == -KERNEL_ENOTSUPP)
            err = bpf_map_delete_elem(fd, key);
        if (err == -ENOENT)
            continue;
        if (err)
            break;
        if (!memcmp(found + offset, wanted, size)) {
            (*done)++;
            continue;
        }
        err = bpf_map_update_elem(fd, key, found, BPF_NOEXIST);
        if (err && err != -EEXIST)
            break;
    }
    free(found);
    return err == -ENOENT || err == -EEXIST ? 0 : err;
}

struct weir_drain {
    unsigned char *buffer;
    size_t capacity, used;
    __u32 record_size, malformed;
};

/* libbpf counts a record as consumed even if this returns an error: so take it, then stop. */
static int take_record(void *context, void *data, size_t size)
{
    struct weir_drain *drain = context;

    if (size < drain->record_size) {
        drain->malformed++;
        return 0;
    }
    memcpy(drain->buffer + drain->used, data, drain->record_size);
    drain->used += drain->record_size;
    return drain->used + drain->record_size > drain->capacity ? -ENOSPC : 0;
}

static struct ring_buffer *weir_ring_open(int map_fd, struct weir_drain *drain, int *error)
{
    struct ring_buffer *ring = ring_buffer__new(map_fd, take_record, drain, NULL);

    *error = ring ? 0 : -errno;
    return ring;
}
"""


def main() -> None:
    ffi = cffi.FFI()
    ffi.cdef(CDEF)
    macros = [("_GNU_SOURCE", None), ("Py_LIMITED_API", "0x030b0000")]
    ffi.set_source("_libbpf", SOURCE, libraries=["bpf"], define_macros=macros)
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copyfile(ffi.compile(tmpdir=scratch), "_libbpf.partial")
    # The limited API makes one file serve all interpreters; cffi names it for this one only.
    Path("_libbpf.partial").rename("_libbpf.abi3.so")


if __name__ == "__main__":
    main()
