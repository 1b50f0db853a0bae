/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The parser: one Ethernet frame into struct packet. Reads through a cursor that checks
 * bounds, also in non-linear packets; ports and addresses stay in network order, lengths
 * and offsets are host order. */
#pragma once

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <stddef.h>

#include "lib/address.h"
#include "lib/icmp.h"
#include "lib/sctp.h"

#define EXTENSION_HEADERS_MAX 6

enum extension_header {
	EXTENSION_HOP_BY_HOP = 0,
	EXTENSION_ROUTING = 43,
	EXTENSION_FRAGMENT = 44,
	EXTENSION_AUTHENTICATION = 51,
	EXTENSION_DESTINATION = 60,
};

enum tcp_flag {
	TCP_FIN = 1,
	TCP_SYN = 2,
	TCP_RST = 4,
	TCP_ACK = 16,
};

enum fragment_part {
	FRAGMENT_NONE = 0,
	FRAGMENT_FIRST = 1,
	FRAGMENT_LATER = 2,		/* has no ports: lib/fragment.h finds them */
};

/* Where a program met its packet. */
enum place {
	PLACE_POD = 0,			/* comes from a pod of this node, or goes to it */
	PLACE_UPLINK = 1,
	PLACE_OVERLAY = 2,
	PLACE_HOST = 3,			/* made by this node's own processes */
};

enum parsed {
	PARSED_NOT_IP = 0,
	PARSED_IP = 1,
};

struct tuple {
	struct ip_addr source;
	struct ip_addr destination;
	__be16 source_port;		/* ICMP echo: both ports are the identifier */
	__be16 destination_port;
	__u8 l4_proto;
	__u8 pad[3];
};

/* What policy said about a packet, for events. */
struct judgement {
	__u32 source_class;
	__u32 destination_class;
	__u32 rule;
	__u32 rule_set;
	__u32 order;			/* of the lowest hit so far, in an ordered rule set */
	__u32 verdict;			/* that hit's */
};

struct packet {
	struct ct_key ct_key;		/* of .flow: lib/ct.h */
	struct tuple flow;		/* of an ICMP error: the flow it is about, in the error's direction */
	struct ip_addr sender;		/* source of the IP header; of an ICMP error maybe a router */
	struct judgement judgement;

	struct ip_addr vip;		/* with .service: what the destination was before translation */
	__u32 service;			/* service.id, 0: not translated */
	__be16 vip_port;
	__u8 direction;			/* enum direction */
	__u8 ipv6;

	__be32 fragment_id;
	__u32 l3_length;		/* of the IP packet, headers included */
	__u32 l4_offset;
	__u32 l4_header;		/* length of the TCP, UDP, SCTP or ICMP header */
	__u32 quoted_l3_offset;		/* ICMP error: the packet quoted in it; 0: no error */
	__u32 quoted_l4_offset;
	__u8 fragment;			/* enum fragment_part */
	__u8 fragment_proto;		/* what the fragment header names, the same in all parts */
	__u8 dont_fragment;
	__u8 tcp_flags;			/* SCTP: those that its first chunk amounts to */
	__u8 hop_limit;
	__u8 traffic_class;
	__u8 l3_proto;			/* transport of the IP packet itself, also in ICMP errors */
	__u8 source_is_low;		/* in .ct_key */
	__u32 now;			/* seconds of CLOCK_MONOTONIC */
	__u32 mtu;			/* with DROP_TOO_BIG: what fits */
	__u8 place;			/* enum place */
	__u8 rewritten;			/* .flow is no longer struct scratch's .sent */
	__u8 restored;			/* a reply: its source is the VIP now */
	__u8 snat;			/* with .service: the backend must see this node's address */
	__u8 refreshed;			/* its flow's entry lives longer now, or shorter */
	__u8 dsr;			/* with .service: the backend's node answers the client */
	__u8 extra;			/* bytes that the packet gets on its way out */
	__u8 pad;
};

struct cursor {
	__u32 offset;
	__u32 end;			/* of the IP packet: padding is never read as a header */
};

/* What a program knows of its packet lies in a map and not on the stack: the verifier tracks
 * every value on the stack, and the walk through extension headers and quoted packets then
 * takes over a million instructions. Programs of one CPU never interrupt each other. */
struct scratch {
	struct packet packet;
	struct packet quoted;
	struct cursor cursor;
	struct tuple sent;		/* packet.flow as it came, once that is .rewritten */
	struct ip_addr fresh;		/* lib/rewrite.h: what an end of the packet becomes */
};

/* The map's own type, so that a changed struct packet is no changed map. */
struct scratch_room {
	__u8 bytes[512];
};
_Static_assert(sizeof(struct scratch) <= sizeof(struct scratch_room), "scratch_room");

/* PERCPU_ARRAY of one entry, 512 B a CPU. Private to the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch_room);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} scratch SEC(".maps");

static __always_inline struct scratch *scratch_get(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

/* An empty packet. NULL never happens, but the verifier cannot know. */
static __always_inline struct packet *packet_new(enum direction direction)
{
	struct scratch *mine = scratch_get();

	if (!mine)
		return NULL;
	__builtin_memset(&mine->packet, 0, sizeof(mine->packet));
	mine->packet.direction = direction;
	return &mine->packet;
}

/* The packet that packet_new() gave, for steps that cannot be told. */
static __always_inline struct packet *packet_current(void)
{
	struct scratch *mine = scratch_get();

	return mine ? &mine->packet : NULL;
}

/* Copies the next bytes without moving. */
static __always_inline int cursor_peek(struct __sk_buff *ctx, const struct cursor *cursor,
				       void *to, __u32 length)
{
	if (cursor->offset + length > cursor->end ||
	    bpf_skb_load_bytes(ctx, cursor->offset, to, length))
		return -DROP_MALFORMED;
	return 0;
}

static __always_inline int parse_ipv4(struct __sk_buff *ctx, struct cursor *cursor,
				      struct packet *packet, bool quoted)
{
	struct iphdr ip;

	if (cursor_peek(ctx, cursor, &ip, sizeof(ip)))
		return -DROP_MALFORMED;
	__u32 header = ip.ihl * 4;
	__u32 length = bpf_ntohs(ip.tot_len);
	__u16 fragment = bpf_ntohs(ip.frag_off);

	if (ip.version != 4 || header < sizeof(ip))
		return -DROP_MALFORMED;
	/* A quote is cut short, and a GSO packet may be longer than 16 bits can say. */
	if (quoted || ctx->gso_segs)
		length = cursor->end - cursor->offset;
	if (length < header || cursor->offset + length > cursor->end)
		return -DROP_MALFORMED;

	address_set_ipv4(&packet->flow.source, ip.saddr);
	address_set_ipv4(&packet->flow.destination, ip.daddr);
	packet->flow.l4_proto = ip.protocol;
	packet->fragment_id = ip.id;
	packet->fragment_proto = ip.protocol;
	packet->dont_fragment = !!(fragment & 0x4000);
	if (fragment & 0x1fff)
		packet->fragment = FRAGMENT_LATER;
	else if (fragment & 0x2000)
		packet->fragment = FRAGMENT_FIRST;
	packet->hop_limit = ip.ttl;
	packet->traffic_class = ip.tos;
	packet->l3_length = length;
	cursor->end = cursor->offset + length;
	cursor->offset += header;
	return 0;
}

/* Moves past the extension headers. More than a handful is nothing that a real sender does. */
__subprogram int skip_extension_headers(struct __sk_buff *ctx, struct cursor *cursor,
					struct packet *packet, __u8 next)
{
	for (int i = 0; i <= EXTENSION_HEADERS_MAX; i++) {
		struct {
			__u8 next;
			__u8 length;
			__be16 fragment;
			__be32 id;
		} extension;

		if (next != EXTENSION_HOP_BY_HOP && next != EXTENSION_ROUTING &&
		    next != EXTENSION_FRAGMENT && next != EXTENSION_AUTHENTICATION &&
		    next != EXTENSION_DESTINATION) {
			packet->flow.l4_proto = next;
			return 0;
		}
		if (cursor_peek(ctx, cursor, &extension, sizeof(extension)))
			return -DROP_MALFORMED;
		if (next == EXTENSION_FRAGMENT) {
			packet->fragment_id = extension.id;
			packet->fragment_proto = extension.next;
			cursor->offset += sizeof(extension);
			if (bpf_ntohs(extension.fragment) & 0xfff8) {
				packet->fragment = FRAGMENT_LATER;
				packet->flow.l4_proto = extension.next;
				return 0;
			}
			if (bpf_ntohs(extension.fragment) & 1)
				packet->fragment = FRAGMENT_FIRST;
		} else if (next == EXTENSION_AUTHENTICATION) {
			cursor->offset += (extension.length + 2) * 4;
		} else {
			cursor->offset += (extension.length + 1) * 8;
		}
		next = extension.next;
	}
	return -DROP_MALFORMED;
}

static __always_inline int parse_ipv6(struct __sk_buff *ctx, struct cursor *cursor,
				      struct packet *packet, bool quoted)
{
	struct ipv6hdr ip;

	if (cursor_peek(ctx, cursor, &ip, sizeof(ip)))
		return -DROP_MALFORMED;
	__u32 length = sizeof(ip) + bpf_ntohs(ip.payload_len);

	if (ip.version != 6)
		return -DROP_MALFORMED;
	if (quoted || ctx->gso_segs)
		length = cursor->end - cursor->offset;
	if (cursor->offset + length > cursor->end)
		return -DROP_MALFORMED;

	__builtin_memcpy(&packet->flow.source, &ip.saddr, sizeof(packet->flow.source));
	__builtin_memcpy(&packet->flow.destination, &ip.daddr, sizeof(packet->flow.destination));
	/* Mapped addresses never go on a wire (RFC 4291, 2.5.5.2); here they would pass for IPv4. */
	if (address_is_ipv4(&packet->flow.source) || address_is_ipv4(&packet->flow.destination))
		return -DROP_MALFORMED;
	packet->ipv6 = 1;
	packet->dont_fragment = 1;
	packet->hop_limit = ip.hop_limit;
	packet->traffic_class = ip.priority << 4 | ip.flow_lbl[0] >> 4;
	packet->l3_length = length;
	cursor->end = cursor->offset + length;
	cursor->offset += sizeof(ip);
	return skip_extension_headers(ctx, cursor, packet, ip.nexthdr);
}

static __always_inline bool icmp_is_echo(const struct packet *packet, __u8 icmp_type)
{
	if (packet->ipv6)
		return icmp_type == ICMPV6_ECHO_REQUEST || icmp_type == ICMPV6_ECHO_REPLY;
	return icmp_type == ICMP_ECHO || icmp_type == ICMP_ECHOREPLY;
}

static __always_inline bool icmp_is_error(const struct packet *packet, __u8 icmp_type)
{
	if (packet->ipv6)
		return icmp_type < ICMPV6_ECHO_REQUEST;
	return icmp_type == ICMP_DEST_UNREACH || icmp_type == ICMP_TIME_EXCEEDED ||
	       icmp_type == ICMP_PARAMETERPROB || icmp_type == ICMP_SOURCE_QUENCH;
}

/* What the first chunk does to an association, in TCP's words. A SHUTDOWN ACK is the last that
 * a client says when the server ends it. */
static __always_inline __u8 sctp_flags(__u8 chunk)
{
	switch (chunk) {
	case SCTP_INIT:
		return TCP_SYN;
	case SCTP_INIT_ACK:
		return TCP_SYN | TCP_ACK;
	case SCTP_SHUTDOWN_ACK:
		return TCP_FIN | TCP_ACK;
	case SCTP_ABORT:
	case SCTP_SHUTDOWN_COMPLETE:
		return TCP_RST;
	default:
		return TCP_ACK;
	}
}

/* Only a fragment may end before the checksum. A packet without chunks is none of ours to judge. */
static __always_inline int parse_sctp(struct __sk_buff *ctx, const struct cursor *cursor,
				      struct packet *packet)
{
	__u32 chunk_offset = cursor->offset + sizeof(struct sctp_header);
	__u8 chunk = SCTP_DATA;

	if (chunk_offset > cursor->end && !packet->fragment)
		return -DROP_MALFORMED;
	if (chunk_offset < cursor->end && bpf_skb_load_bytes(ctx, chunk_offset, &chunk, 1))
		return -DROP_MALFORMED;
	packet->l4_header = sizeof(struct sctp_header);
	packet->tcp_flags = sctp_flags(chunk);
	return 0;
}

/* The transport header. Of a quoted one only the first 8 bytes are sure to be there. */
static __always_inline int parse_l4(struct __sk_buff *ctx, const struct cursor *cursor,
				    struct packet *packet, bool quoted)
{
	packet->l4_offset = cursor->offset;
	if (packet->fragment == FRAGMENT_LATER)
		return 0;

	if (packet->flow.l4_proto == IPPROTO_TCP && !quoted) {
		struct tcphdr tcp;

		if (cursor_peek(ctx, cursor, &tcp, sizeof(tcp)) || tcp.doff < 5)
			return -DROP_MALFORMED;
		packet->flow.source_port = tcp.source;
		packet->flow.destination_port = tcp.dest;
		packet->tcp_flags = ((const __u8 *)&tcp)[13];
		packet->l4_header = tcp.doff * 4;
		return 0;
	}

	switch (packet->flow.l4_proto) {
	case IPPROTO_TCP:
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		break;
	default:
		return 0;
	}
	struct {
		__be16 source_port;	/* ICMP: type and code */
		__be16 destination_port;
		__be16 identifier;	/* of an ICMP echo */
		__be16 sequence;
	} l4;

	if (cursor_peek(ctx, cursor, &l4, sizeof(l4)))
		return -DROP_MALFORMED;
	packet->l4_header = sizeof(l4);
	if (packet->flow.l4_proto == (packet->ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP)) {
		__u8 icmp_type = bpf_ntohs(l4.source_port) >> 8;

		if (icmp_is_error(packet, icmp_type)) {
			packet->quoted_l3_offset = cursor->offset + sizeof(l4);
		} else if (icmp_is_echo(packet, icmp_type)) {
			packet->flow.source_port = l4.identifier;
			packet->flow.destination_port = l4.identifier;
		}
	} else if (packet->flow.l4_proto != IPPROTO_ICMP &&
		   packet->flow.l4_proto != IPPROTO_ICMPV6) {
		packet->flow.source_port = l4.source_port;
		packet->flow.destination_port = l4.destination_port;
	}
	if (packet->flow.l4_proto == IPPROTO_SCTP && !quoted)
		return parse_sctp(ctx, cursor, packet);
	return 0;
}

static __always_inline int parse_ip(struct __sk_buff *ctx, struct cursor *cursor,
				    struct packet *packet, bool ipv6, bool quoted)
{
	int error = ipv6 ? parse_ipv6(ctx, cursor, packet, quoted) :
			   parse_ipv4(ctx, cursor, packet, quoted);

	return error ? error : parse_l4(ctx, cursor, packet, quoted);
}

static __always_inline bool has_ipv4_options(const struct packet *packet)
{
	return !packet->ipv6 && packet->l4_offset != ETH_HLEN + sizeof(struct iphdr);
}

static __always_inline void tuple_reverse(const struct tuple *from, struct tuple *to)
{
	to->source = from->destination;
	to->destination = from->source;
	to->source_port = from->destination_port;
	to->destination_port = from->source_port;
	to->l4_proto = from->l4_proto;
	__builtin_memset(to->pad, 0, sizeof(to->pad));
}

/* An ICMP error travels like a reply to the packet that it quotes: from here on its flow is
 * the quoted one turned round, so that every later step treats it like any packet. */
__subprogram int parse_quoted(struct __sk_buff *ctx, struct scratch *mine)
{
	struct packet *packet = &mine->packet;
	struct packet *quoted = &mine->quoted;

	__builtin_memset(quoted, 0, sizeof(*quoted));
	mine->cursor.offset = packet->quoted_l3_offset;
	mine->cursor.end = ETH_HLEN + packet->l3_length;

	int error = parse_ip(ctx, &mine->cursor, quoted, packet->ipv6, true);

	if (error)
		return error;
	/* An error about an error or a later fragment names no flow. */
	if (quoted->quoted_l3_offset || quoted->fragment == FRAGMENT_LATER ||
	    !address_equal(&quoted->flow.source, &packet->flow.destination))
		return -DROP_INVALID_CT;
	packet->quoted_l4_offset = quoted->l4_offset;
	tuple_reverse(&quoted->flow, &packet->flow);
	return PARSED_IP;
}

/* Reads the frame into the packet that packet_new() gave. enum parsed, or a drop reason. */
__verified_once int parse(struct __sk_buff *ctx)
{
	struct scratch *mine = scratch_get();
	int error;

	if (!mine)
		return -DROP_MALFORMED;
	struct packet *packet = &mine->packet;

	mine->cursor.offset = ETH_HLEN;
	mine->cursor.end = ctx->len;
	if (ctx->protocol == bpf_htons(ETH_P_IP))
		error = parse_ip(ctx, &mine->cursor, packet, false, false);
	else if (ctx->protocol == bpf_htons(ETH_P_IPV6))
		error = parse_ip(ctx, &mine->cursor, packet, true, false);
	else
		return PARSED_NOT_IP;
	if (error)
		return error;
	packet->sender = packet->flow.source;
	packet->l3_proto = packet->flow.l4_proto;
	if (packet->quoted_l3_offset)
		return parse_quoted(ctx, mine);
	return PARSED_IP;
}
