/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Where an allowed packet goes. Returns what the hook returns, or a drop reason. */
#pragma once

#include "lib/drop.h"
#include "lib/reply.h"
#include "lib/where.h"

#define MTU_MIN 1280			/* of IPv6; IPv4's hosts manage with it too */

/* <sys/socket.h> needs the C library, which BPF has not. */
enum address_family {
	FAMILY_IPV4 = 2,
	FAMILY_IPV6 = 10,
};

/* Into the pod's namespace at once, past the host's stack and the pod's to_pod. */
static __always_inline int deliver_to_pod(struct __sk_buff *ctx, const struct endpoint *endpoint)
{
	/* mac and host_mac lie as in an Ethernet header. */
	if (bpf_skb_store_bytes(ctx, 0, endpoint->mac, 2 * ETH_ALEN, 0))
		return -DROP_REWRITE;
	/* 5.10 to 5.13 do not look at the address again and drop what was another host's. */
	if (ctx->pkt_type != 0 && bpf_skb_change_type(ctx, 0))
		return -DROP_REWRITE;
	return bpf_redirect_peer(endpoint->ifindex, 0);
}

/* What the kernel gives as the size of the segments of SCTP (GSO_BY_FRAGS): each has its own,
 * chosen for the path. */
#define SEGMENTS_DIFFER 0xffff

/* Bytes of IP that one packet on the wire has, also when the skb is many of them. */
static __always_inline __u32 wire_length(const struct __sk_buff *ctx, const struct packet *packet)
{
	if (ctx->gso_size == SEGMENTS_DIFFER)
		return 0;
	if (ctx->gso_size)
		return packet->l4_offset - ETH_HLEN + packet->l4_header + ctx->gso_size;
	return packet->l3_length + packet->extra;
}

/* The stack takes an address of the node's own, on a packet that comes in, for a lie. */
static __always_inline bool is_for_the_stack(const struct packet *packet)
{
	return !packet->restored && !packet->snat && !packet->dsr;
}

/* To another node. What is too big and may be cut up goes through the host's stack. */
static __always_inline int deliver_to_overlay(struct __sk_buff *ctx, struct packet *packet)
{
	if (wire_length(ctx, packet) <= overlay_mtu)
		return bpf_redirect(overlay_ifindex, 0);
	if (!packet->dont_fragment && is_for_the_stack(packet))
		return TC_ACT_OK;
	packet->mtu = overlay_mtu - packet->extra;
	return -DROP_TOO_BIG;
}

/* As the host routes. What is for the host itself, or what it must decide, goes up. */
__subprogram int deliver_by_fib(struct __sk_buff *ctx, struct packet *packet)
{
	struct bpf_fib_lookup fib = {
		.family = packet->ipv6 ? FAMILY_IPV6 : FAMILY_IPV4,
		.l4_protocol = packet->flow.l4_proto,
		.ifindex = ctx->ifindex,
	};
	struct bpf_redir_neigh neighbour = {};

	/* Else the kernel goes by what the packet is now. */
	if (packet->extra)
		fib.tot_len = packet->l3_length + packet->extra;

	if (packet->ipv6) {
		__builtin_memcpy(fib.ipv6_src, &packet->sender, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &packet->flow.destination, sizeof(fib.ipv6_dst));
	} else {
		fib.tos = packet->traffic_class;
		fib.ipv4_src = packet->sender.word[3];
		fib.ipv4_dst = packet->flow.destination.word[3];
	}
	long result = bpf_fib_lookup(ctx, &fib, sizeof(fib), 0);

	switch (result) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
		break;
	case BPF_FIB_LKUP_RET_BLACKHOLE:
	case BPF_FIB_LKUP_RET_UNREACHABLE:
	case BPF_FIB_LKUP_RET_PROHIBIT:
		return -DROP_NO_ROUTE;
	case BPF_FIB_LKUP_RET_NOT_FWDED:
		return TC_ACT_OK;
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
		if (is_for_the_stack(packet) || (packet->dsr && !packet->dont_fragment))
			return TC_ACT_OK;
		/* 5.10 does not tell. */
		packet->mtu = (fib.mtu_result ? fib.mtu_result : MTU_MIN) - packet->extra;
		return -DROP_TOO_BIG;
	default:
		return is_for_the_stack(packet) ? TC_ACT_OK : -DROP_NO_ROUTE;
	}
	if (fib.ifindex == ctx->ifindex && is_for_the_stack(packet))
		return TC_ACT_OK;
	int error = decrement_hop_limit(ctx, packet);

	if (error)
		return error;
	neighbour.nh_family = fib.family;
	__builtin_memcpy(neighbour.ipv6_nh, fib.ipv6_dst, sizeof(neighbour.ipv6_nh));
	return bpf_redirect_neigh(fib.ifindex, &neighbour, sizeof(neighbour), 0);
}

/* Out of the node that the packet's pod is on. A reply from a VIP goes to another node as that
 * node's packets came: its stack would not take this node's address from the overlay. */
static __always_inline int deliver_away(struct __sk_buff *ctx, struct packet *packet)
{
	const struct route *route = route_find(&packet->flow.destination);

	if (route && (route->flags & ROUTE_LOCAL))
		return -DROP_NO_ENDPOINT;
	if (tunnel && route && (route->flags & ROUTE_TUNNEL) &&
	    (is_for_the_stack(packet) || !is_node(&packet->flow.destination)))
		return deliver_to_overlay(ctx, packet);
	return deliver_by_fib(ctx, packet);
}
