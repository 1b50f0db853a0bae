/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What policies denied, or would have without audit mode: for people who did not listen then. */
#pragma once

#include "lib/drop.h"

/* LRU_HASH: when full, what was denied longest ago is forgotten. 16384 entries of 128 B, 2.1 MB. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct denial_key);
	__type(value, struct denial);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} denials SEC(".maps");

/* @opened: the packet's flow as it was opened. */
__subprogram int denial_remember(const struct packet *packet, const struct tuple *opened,
				 __u32 reason, bool audited)
{
	struct denial_key key = {
		.source = opened->source,
		.destination = opened->destination,
		.protocol = opened->l4_proto,
		.direction = packet->direction,
	};

	/* That of a ping is its identifier: one row for all of them. */
	if (key.protocol != IPPROTO_ICMP && key.protocol != IPPROTO_ICMPV6)
		key.destination_port = opened->destination_port;

	struct denial *known = bpf_map_lookup_elem(&denials, &key);
	struct denial now = {
		.last_seen = seconds_now(),
		.packets = known ? known->packets + 1 : 1,
		.rule = packet->judgement.rule,
		.rule_set = packet->judgement.rule_set,
		.reason = reason,
		.flags = audited ? DENIAL_AUDITED : 0,
	};

	if (known)
		*known = now;
	else
		bpf_map_update_elem(&denials, &key, &now, BPF_ANY);
	return 0;
}
