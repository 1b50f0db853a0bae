/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses of load balancers on the local segment: this node answers ARP and ND for them. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "lib/reply.h"
#include "lib/runtime.h"

/* HASH without preallocation, no eviction: 72 B an entry, 0.3 MB full. Full: the agent reports
 * the address, which nobody answers for. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct ip_addr);
	__type(value, struct announced);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} announced SEC(".maps");

struct arp_ethernet {
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_length;
	__u8 protocol_length;
	__be16 operation;
	__u8 sender_mac[ETH_ALEN];
	__be16 sender[2];		/* an IPv4 address, at an odd multiple of two bytes */
	__u8 target_mac[ETH_ALEN];
	__be16 target[2];
};
_Static_assert(sizeof(struct arp_ethernet) == 28, "arp_ethernet");

struct neighbour_solicitation {
	__u8 icmp_type;
	__u8 code;
	__be16 checksum;
	__be32 reserved;
	struct ip_addr target;
};
_Static_assert(sizeof(struct neighbour_solicitation) == 24, "neighbour_solicitation");

struct neighbour_advertisement {
	__u8 icmp_type;
	__u8 code;
	__be16 checksum;
	__be32 flags;
	struct ip_addr target;
	__u8 option;
	__u8 option_length;		/* in units of 8 bytes */
	__u8 mac[ETH_ALEN];
};
_Static_assert(sizeof(struct neighbour_advertisement) == 32, "neighbour_advertisement");

#define ARP_REQUEST 1
#define ARP_REPLY 2
#define ARP_ETHERNET 1
#define NEIGHBOUR_SOLICITATION 135
#define NEIGHBOUR_ADVERTISEMENT 136
#define NEIGHBOUR_SOLICITED 0x40000000
#define NEIGHBOUR_OVERRIDE 0x20000000
#define NEIGHBOUR_TARGET_MAC 2
#define NEIGHBOUR_HOP_LIMIT 255		/* anything less came through a router (RFC 4861, 7.1) */

enum announce_answer {
	ANNOUNCE_NOT_ASKED = 0,
	ANNOUNCE_ANSWERED = 1,		/* the packet is the answer now, for the device it came by */
};

/* Turns a request into its reply. enum announce_answer, or a drop reason. */
__verified_once int announce_by_arp(struct __sk_buff *ctx)
{
	struct arp_ethernet arp;
	struct ip_addr target;
	__be32 ipv4;

	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &arp, sizeof(arp)) ||
	    arp.hardware != bpf_htons(ARP_ETHERNET) || arp.protocol != bpf_htons(ETH_P_IP) ||
	    arp.hardware_length != ETH_ALEN || arp.protocol_length != sizeof(ipv4) ||
	    arp.operation != bpf_htons(ARP_REQUEST))
		return ANNOUNCE_NOT_ASKED;
	/* About itself: another node tells that it has the address now. */
	if (arp.sender[0] == arp.target[0] && arp.sender[1] == arp.target[1])
		return ANNOUNCE_NOT_ASKED;
	__builtin_memcpy(&ipv4, arp.target, sizeof(ipv4));
	address_set_ipv4(&target, ipv4);

	const struct announced *row = bpf_map_lookup_elem(&announced, &target);

	if (!row)
		return ANNOUNCE_NOT_ASKED;
	struct ethhdr ethernet = { .h_proto = bpf_htons(ETH_P_ARP) };
	struct arp_ethernet reply = arp;

	__builtin_memcpy(ethernet.h_dest, arp.sender_mac, ETH_ALEN);
	__builtin_memcpy(ethernet.h_source, row->mac, ETH_ALEN);
	reply.operation = bpf_htons(ARP_REPLY);
	__builtin_memcpy(reply.sender_mac, row->mac, ETH_ALEN);
	__builtin_memcpy(reply.sender, arp.target, sizeof(ipv4));
	__builtin_memcpy(reply.target_mac, arp.sender_mac, ETH_ALEN);
	__builtin_memcpy(reply.target, arp.sender, sizeof(ipv4));
	if (bpf_skb_store_bytes(ctx, 0, &ethernet, sizeof(ethernet), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &reply, sizeof(reply), BPF_F_RECOMPUTE_CSUM))
		return -DROP_REWRITE;
	return ANNOUNCE_ANSWERED;
}

/* Turns a solicitation into its advertisement. enum announce_answer, or a drop reason. */
__subprogram int announce_by_nd(struct __sk_buff *ctx, const struct packet *packet)
{
	struct neighbour_solicitation asked;
	struct ethhdr ethernet;
	struct ip_addr asker = packet->sender;
	__u32 flags = NEIGHBOUR_SOLICITED | NEIGHBOUR_OVERRIDE;

	if (bpf_skb_load_bytes(ctx, packet->l4_offset, &asked, sizeof(asked)) ||
	    bpf_skb_load_bytes(ctx, 0, &ethernet, sizeof(ethernet)) ||
	    asked.icmp_type != NEIGHBOUR_SOLICITATION || asked.code)
		return ANNOUNCE_NOT_ASKED;

	const struct announced *row = bpf_map_lookup_elem(&announced, &asked.target);

	if (!row)
		return ANNOUNCE_NOT_ASKED;
	__builtin_memcpy(ethernet.h_dest, ethernet.h_source, ETH_ALEN);
	__builtin_memcpy(ethernet.h_source, row->mac, ETH_ALEN);
	/* Who looks for duplicates has no address yet: all nodes are told (RFC 4861, 7.2.4). */
	if (address_is_unset(&asker)) {
		static const __u8 all_nodes[ETH_ALEN] = { 0x33, 0x33, 0, 0, 0, 1 };

		__builtin_memcpy(ethernet.h_dest, all_nodes, ETH_ALEN);
		asker.word[0] = bpf_htonl(0xff020000);
		asker.word[3] = bpf_htonl(1);
		flags = NEIGHBOUR_OVERRIDE;
	}
	struct ipv6hdr ip = {
		.version = 6,
		.payload_len = bpf_htons(sizeof(struct neighbour_advertisement)),
		.nexthdr = IPPROTO_ICMPV6,
		.hop_limit = NEIGHBOUR_HOP_LIMIT,
	};
	struct neighbour_advertisement told = {
		.icmp_type = NEIGHBOUR_ADVERTISEMENT,
		.flags = bpf_htonl(flags),
		.target = asked.target,
		.option = NEIGHBOUR_TARGET_MAC,
		.option_length = 1,
	};

	__builtin_memcpy(&ip.saddr, &asked.target, sizeof(ip.saddr));
	__builtin_memcpy(&ip.daddr, &asker, sizeof(ip.daddr));
	__builtin_memcpy(told.mac, row->mac, ETH_ALEN);

	__s64 sum = pseudo_header_sum(&asked.target, &asker, sizeof(told), IPPROTO_ICMPV6);

	told.checksum = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&told, sizeof(told), sum));
	if (bpf_skb_change_tail(ctx, ETH_HLEN + sizeof(ip) + sizeof(told), 0) ||
	    bpf_skb_store_bytes(ctx, 0, &ethernet, sizeof(ethernet), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN + sizeof(ip), &told, sizeof(told),
				BPF_F_RECOMPUTE_CSUM))
		return -DROP_REWRITE;
	return ANNOUNCE_ANSWERED;
}

/* Of a packet that parse() has seen, whatever it made of it. What is no question about a
 * neighbour costs two comparisons. */
static __always_inline int announce_answer(struct __sk_buff *ctx, const struct packet *packet)
{
	if (ctx->protocol == bpf_htons(ETH_P_ARP))
		return runtime_has(RUNTIME_ANNOUNCES) ? announce_by_arp(ctx) : ANNOUNCE_NOT_ASKED;
	if (packet->l3_proto != IPPROTO_ICMPV6 || !packet->ipv6 ||
	    packet->hop_limit != NEIGHBOUR_HOP_LIMIT ||
	    packet->l4_offset != ETH_HLEN + sizeof(struct ipv6hdr) ||
	    !runtime_has(RUNTIME_ANNOUNCES))
		return ANNOUNCE_NOT_ASKED;
	return announce_by_nd(ctx, packet);
}
