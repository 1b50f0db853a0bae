/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The blocklist in tc. */
#pragma once

#include "lib/blocked.h"
#include "lib/packet.h"

/* Read apart from parse(), which gives up on what is malformed further in. */
static __always_inline bool blocked_source(struct __sk_buff *ctx, struct ip_addr *source)
{
	__be32 ipv4;

	switch (ctx->protocol) {
	case bpf_htons(ETH_P_IP):
		if (bpf_skb_load_bytes(ctx, ETH_HLEN + offsetof(struct iphdr, saddr), &ipv4,
				       sizeof(ipv4)))
			return false;
		address_set_ipv4(source, ipv4);
		return true;
	case bpf_htons(ETH_P_IPV6):
		return !bpf_skb_load_bytes(ctx, ETH_HLEN + offsetof(struct ipv6hdr, saddr), source,
					   sizeof(*source));
	default:
		return false;
	}
}

/* True: the packet is to be dropped, and was counted. @packet: a new one. */
static __always_inline bool blocked_drops(struct __sk_buff *ctx, struct packet *packet)
{
	struct ip_addr source;
	const struct blocked *by;

	if (runtime_has(RUNTIME_XDP_BLOCKS) || !blocked_source(ctx, &source))
		return false;
	by = blocked_find(&source);
	if (!by)
		return false;
	if (blocked_count(ctx->len)) {
		parse(ctx);
		packet->flow.source = source;	/* of an ICMP error: who sent it */
		packet->judgement.rule = by->rule;
		notify(ctx, packet, DROP_BLOCKED, EVENT_DROP);
	}
	return true;
}
