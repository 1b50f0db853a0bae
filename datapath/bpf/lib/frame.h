/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* A frame as XDP has it: read and written by pointer, for the blocklist and services. */
#pragma once

#include "lib/packet.h"

#define FRAME_VLAN_TAGS 2
#define FRAME_VLAN_HLEN 4

/* A cursor over the frame's memory. The verifier wants pointers compared where they are used, so
 * both bounds travel together. */
struct frame {
	void *at;
	void *end;
	__be16 eth_proto;
	__u8 pad[6];
};

static __always_inline struct frame frame_of(const struct xdp_md *ctx)
{
	return (struct frame){
		.at = (void *)(unsigned long)ctx->data,
		.end = (void *)(unsigned long)ctx->data_end,
	};
}

/* Moves to what the Ethernet header carries, past VLAN tags. How many tags, or negative. */
static __always_inline int frame_ethernet(struct frame *frame)
{
	const struct ethhdr *eth = frame->at;
	int tags = 0;

	if (frame->at + sizeof(*eth) > frame->end)
		return -DROP_MALFORMED;
	frame->eth_proto = eth->h_proto;
	frame->at += sizeof(*eth);
	for (; tags < FRAME_VLAN_TAGS; tags++) {
		if (frame->eth_proto != bpf_htons(ETH_P_8021Q) &&
		    frame->eth_proto != bpf_htons(ETH_P_8021AD))
			break;
		if (frame->at + FRAME_VLAN_HLEN > frame->end)
			return -DROP_MALFORMED;
		frame->eth_proto = *(__be16 *)(frame->at + 2);
		frame->at += FRAME_VLAN_HLEN;
	}
	return tags;
}

/* The source of the IP packet at the cursor. */
static __always_inline bool frame_source(const struct frame *frame, struct ip_addr *source)
{
	if (frame->eth_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = frame->at;

		if (frame->at + sizeof(*ip) > frame->end)
			return false;
		address_set_ipv4(source, ip->saddr);
		return true;
	}
	if (frame->eth_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = frame->at;

		if (frame->at + sizeof(*ip) > frame->end)
			return false;
		__builtin_memcpy(source, &ip->saddr, sizeof(*source));
		return true;
	}
	return false;
}

/* Reads the IP packet at the cursor if it is a plain one: neither fragment, options nor extension
 * headers, and TCP or UDP. PARSED_NOT_IP: something else, which is tc's to read. */
static __always_inline int frame_parse(const struct frame *frame, struct packet *packet)
{
	void *l4;
	__u32 room = frame->end - frame->at;
	__u32 l3_header;

	if (frame->eth_proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = frame->at;

		if (frame->at + sizeof(*ip) > frame->end || ip->version != 4 || ip->ihl != 5 ||
		    (ip->frag_off & bpf_htons(0x3fff)))
			return PARSED_NOT_IP;
		address_set_ipv4(&packet->flow.source, ip->saddr);
		address_set_ipv4(&packet->flow.destination, ip->daddr);
		packet->flow.l4_proto = ip->protocol;
		packet->dont_fragment = !!(ip->frag_off & bpf_htons(0x4000));
		packet->hop_limit = ip->ttl;
		packet->traffic_class = ip->tos;
		packet->l3_length = bpf_ntohs(ip->tot_len);
		l3_header = sizeof(*ip);
		l4 = frame->at + sizeof(*ip);
	} else if (frame->eth_proto == bpf_htons(ETH_P_IPV6)) {
		const struct ipv6hdr *ip = frame->at;

		if (frame->at + sizeof(*ip) > frame->end || ip->version != 6)
			return PARSED_NOT_IP;
		__builtin_memcpy(&packet->flow.source, &ip->saddr, sizeof(packet->flow.source));
		__builtin_memcpy(&packet->flow.destination, &ip->daddr,
				 sizeof(packet->flow.destination));
		if (address_is_ipv4(&packet->flow.source) ||
		    address_is_ipv4(&packet->flow.destination))
			return PARSED_NOT_IP;
		packet->flow.l4_proto = ip->nexthdr;
		packet->ipv6 = 1;
		packet->dont_fragment = 1;
		packet->hop_limit = ip->hop_limit;
		packet->traffic_class = ip->priority << 4 | ip->flow_lbl[0] >> 4;
		packet->l3_length = sizeof(*ip) + bpf_ntohs(ip->payload_len);
		l3_header = sizeof(*ip);
		l4 = frame->at + sizeof(*ip);
	} else {
		return PARSED_NOT_IP;
	}
	packet->sender = packet->flow.source;
	packet->l3_proto = packet->flow.l4_proto;
	packet->fragment_proto = packet->flow.l4_proto;
	packet->l4_offset = ETH_HLEN + l3_header;

	if (packet->flow.l4_proto == IPPROTO_TCP) {
		const struct tcphdr *tcp = l4;

		if (l4 + sizeof(*tcp) > frame->end || tcp->doff < 5)
			return PARSED_NOT_IP;
		packet->flow.source_port = tcp->source;
		packet->flow.destination_port = tcp->dest;
		packet->tcp_flags = ((const __u8 *)tcp)[13];
		packet->l4_header = tcp->doff * 4;
	} else if (packet->flow.l4_proto == IPPROTO_UDP) {
		const struct udphdr *udp = l4;

		if (l4 + sizeof(*udp) > frame->end)
			return PARSED_NOT_IP;
		packet->flow.source_port = udp->source;
		packet->flow.destination_port = udp->dest;
		packet->l4_header = sizeof(*udp);
	} else {
		return PARSED_NOT_IP;
	}
	return packet->l3_length >= l3_header + packet->l4_header && packet->l3_length <= room ?
		       PARSED_IP :
		       PARSED_NOT_IP;
}
