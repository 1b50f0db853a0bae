/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The blocklist: sources whose packets are dropped ahead of everything, by XDP, or by tc where
 * XDP is not attached. */
#pragma once

#include "lib/drop.h"
#include "lib/where.h"

/* LPM_TRIE (never preallocated), no eviction: 64 B a node, two nodes a prefix, 17 MB full. Full:
 * prefixes that do not fit are let through, and the agent reports their object. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct prefix_key);
	__type(value, struct blocked);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} blocked SEC(".maps");

static __always_inline const struct blocked *blocked_find(const struct ip_addr *source)
{
	struct prefix_key key = { .bits = PREFIX_BITS_ALL, .address = *source };

	return bpf_map_lookup_elem(&blocked, &key);
}

#define BLOCKED_TELL_NS 10000000ull

static __u64 blocked_told;

/* Whether to tell of a drop: 100 a second, as a flood must leave room for other events. CPUs
 * race for it, which tells at most one more each. */
static __always_inline bool blocked_may_tell(void)
{
	if (!event_is_wanted(EVENT_DROP))
		return false;
	__u64 now = bpf_ktime_get_ns();

	if (now - blocked_told < BLOCKED_TELL_NS)
		return false;
	blocked_told = now;
	return true;
}

/* Counts a packet of a blocked source; true: tell of it, too. */
static __always_inline bool blocked_count(__u32 length)
{
	count_bytes(length, DROP_BLOCKED, DIR_INGRESS);
	return blocked_may_tell();
}
