/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Answers to the sender about a packet that goes no further: TCP RST, ICMP errors. The packet is
 * turned into the answer in place. */
#pragma once

#include "lib/rewrite.h"
#include "lib/settings.h"

#define QUOTE_WORDS_MAX 32		/* IP header with options or extension headers, and 20 bytes */
#define ANSWER_HOP_LIMIT 64

struct pseudo_header {
	struct ip_addr source;
	struct ip_addr destination;
	__be32 length;
	__be32 protocol;
};
_Static_assert(sizeof(struct pseudo_header) == 40, "pseudo_header");

/* One for both families: the ::ffff: of mapped addresses does not change the sum. */
static __always_inline __s64 pseudo_header_sum(const struct ip_addr *source,
					       const struct ip_addr *destination, __u32 length,
					       __u8 protocol)
{
	struct pseudo_header pseudo = {
		.source = *source,
		.destination = *destination,
		.length = bpf_htonl(length),
		.protocol = bpf_htonl(protocol),
	};

	return bpf_csum_diff(NULL, 0, (__be32 *)&pseudo, sizeof(pseudo), 0);
}

static __always_inline __u16 csum_fold(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

/* Whether the sender may be told: never about an ICMP error or a later fragment. */
static __always_inline bool reply_is_due(const struct packet *packet)
{
	return !packet->quoted_l3_offset && packet->fragment != FRAGMENT_LATER;
}

static __always_inline int store_ipv4_header(struct __sk_buff *ctx, const struct ip_addr *source,
					     const struct ip_addr *destination, __u32 length)
{
	struct iphdr ip = {
		.version = 4,
		.ihl = 5,
		.tot_len = bpf_htons(length),
		.ttl = ANSWER_HOP_LIMIT,
		.protocol = IPPROTO_ICMP,
		.saddr = source->word[3],
		.daddr = destination->word[3],
	};

	ip.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&ip, sizeof(ip), 0));
	return bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), 0);
}

static __always_inline int store_ipv6_header(struct __sk_buff *ctx, const struct ip_addr *source,
					     const struct ip_addr *destination, __u32 length)
{
	struct ipv6hdr ip = {
		.version = 6,
		.payload_len = bpf_htons(length - sizeof(ip)),
		.nexthdr = IPPROTO_ICMPV6,
		.hop_limit = ANSWER_HOP_LIMIT,
	};

	__builtin_memcpy(&ip.saddr, source, sizeof(ip.saddr));
	__builtin_memcpy(&ip.daddr, destination, sizeof(ip.daddr));
	return bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), 0);
}

struct icmp_error {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 info;			/* MTU, in the place that both families read it from */
};
_Static_assert(sizeof(struct icmp_error) == 8, "icmp_error");

/* The kernel does not cut before a checksum that the device is to fill in: TCP's and SCTP's are
 * past the 8 bytes that an error must quote. */
static __always_inline __u32 l4_quote(const struct packet *packet)
{
	__u32 length = packet->l3_length - (packet->l4_offset - ETH_HLEN);

	switch (packet->l3_proto) {
	case IPPROTO_TCP:
		return sizeof(struct tcphdr);
	case IPPROTO_SCTP:
		return length < SCTP_QUOTE ? sizeof(struct sctp_header) : SCTP_QUOTE;
	default:
		return 8;
	}
}

/* Makes the packet an ICMP error from @source that quotes it. 0 or a drop reason. */
__subprogram int reply_icmp(struct __sk_buff *ctx, const struct packet *packet,
				 const struct ip_addr *source, struct icmp_error *icmp)
{
	__u32 quote = packet->l4_offset - ETH_HLEN + l4_quote(packet);
	__u32 ip_header = packet->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	__u32 room = ip_header + sizeof(*icmp);
	__s64 sum = 0;

	if (!reply_is_due(packet) || quote > QUOTE_WORDS_MAX * 4)
		return -DROP_REWRITE;
	if (bpf_skb_change_tail(ctx, ETH_HLEN + quote, 0) ||
	    bpf_skb_adjust_room(ctx, room, BPF_ADJ_ROOM_MAC, 0))
		return -DROP_REWRITE;

	for (__u32 i = 0; i < QUOTE_WORDS_MAX && i * 4 < quote; i++) {
		__be32 word;

		if (bpf_skb_load_bytes(ctx, ETH_HLEN + room + i * 4, &word, sizeof(word)))
			return -DROP_REWRITE;
		sum = bpf_csum_diff(NULL, 0, &word, sizeof(word), sum);
	}
	icmp->checksum = 0;
	sum = bpf_csum_diff(NULL, 0, (__be32 *)icmp, sizeof(*icmp), sum);
	if (packet->ipv6)
		sum += pseudo_header_sum(source, &packet->flow.source, sizeof(*icmp) + quote,
					 IPPROTO_ICMPV6);
	icmp->checksum = csum_fold(sum);

	__u32 length = room + quote;
	int error = packet->ipv6 ?
			    store_ipv6_header(ctx, source, &packet->flow.source, length) :
			    store_ipv4_header(ctx, source, &packet->flow.source, length);

	if (error || bpf_skb_store_bytes(ctx, ETH_HLEN + ip_header, icmp, sizeof(*icmp), 0))
		return -DROP_REWRITE;
	return 0;
}

static __always_inline int reply_port_unreachable(struct __sk_buff *ctx,
						  const struct packet *packet)
{
	struct icmp_error icmp = {
		.type = packet->ipv6 ? ICMPV6_DEST_UNREACH : ICMP_DEST_UNREACH,
		.code = packet->ipv6 ? ICMPV6_PORT_UNREACH : ICMP_PORT_UNREACH,
	};
	struct ip_addr source = packet->flow.destination;

	return reply_icmp(ctx, packet, &source, &icmp);
}

/* Errors of a router come from this node, if it has the family, and is not the one that is told:
 * no host takes its own address from a device. */
static __always_inline void router_address(const struct packet *packet, struct ip_addr *address)
{
	node_address(packet->ipv6, address);
	if (packet->place == PLACE_HOST || address_is_unset(address))
		*address = packet->flow.destination;
}

static __always_inline int reply_too_big(struct __sk_buff *ctx, const struct packet *packet,
					 __u32 mtu)
{
	struct icmp_error icmp = {
		.type = packet->ipv6 ? ICMPV6_PKT_TOOBIG : ICMP_DEST_UNREACH,
		.code = packet->ipv6 ? 0 : ICMP_FRAG_NEEDED,
		.info = bpf_htonl(mtu),
	};
	struct ip_addr source;

	router_address(packet, &source);
	return reply_icmp(ctx, packet, &source, &icmp);
}

static __always_inline int reply_time_exceeded(struct __sk_buff *ctx, const struct packet *packet)
{
	struct icmp_error icmp = {
		.type = packet->ipv6 ? ICMPV6_TIME_EXCEED : ICMP_TIME_EXCEEDED,
	};
	struct ip_addr source;

	router_address(packet, &source);
	return reply_icmp(ctx, packet, &source, &icmp);
}

/* Makes the segment a RST that answers it (RFC 9293, 3.5.2). 0 or a drop reason. */
__subprogram int reply_reset(struct __sk_buff *ctx, const struct packet *packet)
{
	__u32 length = packet->l4_offset - ETH_HLEN + sizeof(struct tcphdr);
	struct tcphdr tcp;

	if (!reply_is_due(packet) || (packet->tcp_flags & TCP_RST) ||
	    bpf_skb_load_bytes(ctx, packet->l4_offset, &tcp, sizeof(tcp)) ||
	    bpf_skb_change_tail(ctx, ETH_HLEN + length, 0))
		return -DROP_REWRITE;

	struct tcphdr reset = {
		.source = tcp.dest,
		.dest = tcp.source,
		.doff = sizeof(reset) / 4,
		.rst = 1,
	};

	if (tcp.ack) {
		reset.seq = tcp.ack_seq;
	} else {
		__u32 data = packet->l3_length - (packet->l4_offset - ETH_HLEN) - packet->l4_header;

		reset.ack = 1;
		reset.ack_seq = bpf_htonl(bpf_ntohl(tcp.seq) + data + tcp.syn + tcp.fin);
	}
	__s64 sum = pseudo_header_sum(&packet->flow.source, &packet->flow.destination,
				      sizeof(reset), IPPROTO_TCP);

	reset.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&reset, sizeof(reset), sum));
	if (bpf_skb_store_bytes(ctx, packet->l4_offset, &reset, sizeof(reset), 0))
		return -DROP_REWRITE;

	/* Swapping the addresses leaves the header's sum as it is. */
	__u32 field = packet->ipv6 ? offsetof(struct ipv6hdr, payload_len) :
				     offsetof(struct iphdr, tot_len);
	__be16 from = bpf_htons(packet->l3_length);
	__be16 to = bpf_htons(packet->ipv6 ? length - sizeof(struct ipv6hdr) : length);

	if (!packet->ipv6 &&
	    bpf_l3_csum_replace(ctx, ETH_HLEN + offsetof(struct iphdr, check), from, to, sizeof(to)))
		return -DROP_REWRITE;
	if (bpf_skb_store_bytes(ctx, ETH_HLEN + field, &to, sizeof(to), 0) ||
	    store_address(ctx, packet, ETH_HLEN, END_SOURCE, &packet->flow.destination) ||
	    store_address(ctx, packet, ETH_HLEN, END_DESTINATION, &packet->flow.source))
		return -DROP_REWRITE;
	return 0;
}

/* Refused as a closed port does. */
static __always_inline int reply_refused(struct __sk_buff *ctx, const struct packet *packet)
{
	return packet->flow.l4_proto == IPPROTO_TCP ? reply_reset(ctx, packet) :
						      reply_port_unreachable(ctx, packet);
}
