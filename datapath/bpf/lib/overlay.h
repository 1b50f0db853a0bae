/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The outer header of what goes between nodes. */
#pragma once

#include "lib/packet.h"
#include "lib/settings.h"
#include "lib/where.h"

#define OVERLAY_VNI 1
#define OVERLAY_HOP_LIMIT 64

/* The kernel takes this size since 4.8; newer headers' struct is longer than 5.10 accepts. */
#define TUNNEL_KEY_SIZE offsetof(struct bpf_tunnel_key, local_ipv4)

/* Whether this is what another node encapsulated for this one: the stack takes it apart, and
 * from_overlay reads what was in it. */
static __always_inline bool overlay_is_outer(const struct packet *packet)
{
	const struct tuple *flow = &packet->flow;
	struct ip_addr node;

	if (!overlay_port || flow->l4_proto != IPPROTO_UDP ||
	    flow->destination_port != bpf_htons(overlay_port) || packet->fragment != FRAGMENT_NONE)
		return false;
	node_address(packet->ipv6, &node);
	return address_equal(&flow->destination, &node);
}

/* The node that encapsulated the packet. 0 or a drop reason. */
static __always_inline int overlay_sender(struct __sk_buff *ctx, struct ip_addr *node)
{
	struct bpf_tunnel_key key = {};

	if (!bpf_skb_get_tunnel_key(ctx, &key, TUNNEL_KEY_SIZE, 0)) {
		address_set_ipv4(node, bpf_htonl(key.remote_ipv4));
		return 0;
	}
	if (bpf_skb_get_tunnel_key(ctx, &key, TUNNEL_KEY_SIZE, BPF_F_TUNINFO_IPV6))
		return -DROP_SPOOFED_SOURCE;
	__builtin_memcpy(node, key.remote_ipv6, sizeof(*node));
	return 0;
}

/* Encapsulates to the node. 0 or a drop reason. */
static __always_inline int overlay_send_to(struct __sk_buff *ctx, const struct packet *packet,
					   const struct ip_addr *node)
{
	struct bpf_tunnel_key key = {
		.tunnel_id = OVERLAY_VNI,
		.tunnel_tos = packet->traffic_class,
		.tunnel_ttl = OVERLAY_HOP_LIMIT,
	};
	__u64 flags = BPF_F_ZERO_CSUM_TX;

	if (address_is_ipv4(node)) {
		key.remote_ipv4 = bpf_ntohl(node->word[3]);
	} else {
		__builtin_memcpy(key.remote_ipv6, node, sizeof(*node));
		flags = BPF_F_TUNINFO_IPV6;	/* receivers refuse IPv6 without a checksum */
	}
	return bpf_skb_set_tunnel_key(ctx, &key, TUNNEL_KEY_SIZE, flags) ? -DROP_REWRITE : 0;
}
