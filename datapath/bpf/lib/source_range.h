/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* loadBalancerSourceRanges: who may use a load balancer's address. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "weir/abi.h"

#define SOURCE_RANGE_BITS_ALL (32 + 128)

/* LPM_TRIE (never preallocated), no eviction: 72 B a node, two nodes a range, 5 MB full. Full:
 * those that do not fit are refused, and the agent reports it. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct source_range_key);
	__type(value, __u8);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} source_ranges SEC(".maps");

static __always_inline bool source_range_has(__u32 identity, const struct ip_addr *client)
{
	struct source_range_key key = {
		.bits = SOURCE_RANGE_BITS_ALL,
		.identity = identity,
		.address = *client,
	};

	return bpf_map_lookup_elem(&source_ranges, &key);
}
