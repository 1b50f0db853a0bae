/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Session affinity ClientIP: a client's next connections go where its last one went. Packets
 * and sockets share the entries. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "lib/address.h"

/* LRU_HASH: when full, the clients idle for longest choose anew. 116 B an entry, 15 MB. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} affinity SEC(".maps");

/* HASH without preallocation, no eviction: a pod each, 96 B an entry, 0.4 MB full. Full: the
 * agent reports it, and the pod's sockets have no affinity. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct netns_addresses);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} netns_addresses SEC(".maps");
