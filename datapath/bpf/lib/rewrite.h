/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Changing one end of a packet, with all checksums, also inside ICMP errors. */
#pragma once

#include "lib/crc32c.h"
#include "lib/packet.h"

enum packet_end {
	END_SOURCE = 0,
	END_DESTINATION = 1,
};

static __always_inline int store_address(struct __sk_buff *ctx, const struct packet *packet,
					 __u32 l3_offset, enum packet_end end,
					 const struct ip_addr *address)
{
	if (packet->ipv6) {
		__u32 field = end == END_SOURCE ? offsetof(struct ipv6hdr, saddr) :
						  offsetof(struct ipv6hdr, daddr);

		return bpf_skb_store_bytes(ctx, l3_offset + field, address, 16, 0);
	}
	__u32 field = end == END_SOURCE ? offsetof(struct iphdr, saddr) :
					  offsetof(struct iphdr, daddr);

	return bpf_skb_store_bytes(ctx, l3_offset + field, &address->word[3], 4, 0);
}

/* The address in the IP header at @l3_offset, and its checksum if it has one. */
static __always_inline int rewrite_l3(struct __sk_buff *ctx, const struct packet *packet,
				      __u32 l3_offset, enum packet_end end,
				      const struct ip_addr *address, __s64 diff)
{
	if (!packet->ipv6 &&
	    bpf_l3_csum_replace(ctx, l3_offset + offsetof(struct iphdr, check), 0, diff, 0))
		return -DROP_REWRITE;
	return store_address(ctx, packet, l3_offset, end, address) ? -DROP_REWRITE : 0;
}

/* Where the transport's Internet checksum is; 0: it has none, or another one. */
static __always_inline __u32 checksum_field(__u8 l4_proto)
{
	switch (l4_proto) {
	case IPPROTO_TCP:
		return offsetof(struct tcphdr, check);
	case IPPROTO_UDP:
		return offsetof(struct udphdr, check);
	case IPPROTO_ICMP:
	case IPPROTO_ICMPV6:
		return offsetof(struct icmp_header, checksum);
	default:
		return 0;
	}
}

/* Where the port is; of ICMP echo, the identifier. */
static __always_inline __u32 port_field(__u8 l4_proto, enum packet_end end)
{
	if (l4_proto == IPPROTO_ICMP || l4_proto == IPPROTO_ICMPV6)
		return offsetof(struct icmp_header, identifier);
	return end == END_SOURCE ? 0 : 2;
}

/* The address is part of the pseudo header, except for IPv4's ICMP. */
static __always_inline int update_pseudo_header(struct __sk_buff *ctx, const struct packet *packet,
						__s64 diff)
{
	__u32 field = checksum_field(packet->l3_proto);
	__u64 flags = BPF_F_PSEUDO_HDR;

	if (!field || packet->l3_proto == IPPROTO_ICMP)
		return 0;
	if (packet->l3_proto == IPPROTO_UDP)
		flags |= BPF_F_MARK_MANGLED_0;
	if (bpf_l4_csum_replace(ctx, packet->l4_offset + field, 0, diff, flags))
		return -DROP_REWRITE;
	/* With CHECKSUM_COMPLETE the kernel takes the difference off skb->csum. IPv4's header
	 * checksum makes up for that, IPv6 has none (the kernel's BPF_F_IPV6 of 6.16 says so):
	 * put it back. Fails harmlessly where the sum is not COMPLETE. */
	if (packet->ipv6)
		bpf_csum_update(ctx, diff);
	return 0;
}

static __always_inline bool has_ports(__u8 l4_proto)
{
	return checksum_field(l4_proto) || l4_proto == IPPROTO_SCTP;
}

/* Where a packet of SCTP ends, in bytes of the frame. The first part of a fragmented one says it:
 * only a chunk that is too long for the path, and last, makes a packet too long. 0: unknown. */
__subprogram __u32 sctp_end(struct __sk_buff *ctx, const struct packet *packet)
{
	__u32 here = ETH_HLEN + packet->l3_length;
	__u32 offset = packet->l4_offset + sizeof(struct sctp_header);

	if (packet->fragment == FRAGMENT_NONE)
		return here;
	for (int i = 0; i < SCTP_CHUNKS_MAX; i++) {
		struct sctp_chunk chunk;

		if (offset + sizeof(chunk) > here ||
		    bpf_skb_load_bytes(ctx, offset, &chunk, sizeof(chunk)))
			return 0;
		offset += (bpf_ntohs(chunk.length) + 3) & ~3u;
		if (offset > here)
			return offset;
	}
	return 0;
}

/* SCTP's checksum, before @from becomes @to. 0 says that the sender's device is to fill it in,
 * so it stays; a checksum that happens to be 0 goes wrong, once in four thousand million. */
static __always_inline int update_crc(struct __sk_buff *ctx, const struct packet *packet,
				      __u32 port_offset, __be16 from, __be16 to)
{
	__u32 field = packet->l4_offset + offsetof(struct sctp_header, checksum);
	__be32 checksum;
	__u32 end;

	if (bpf_skb_load_bytes(ctx, field, &checksum, sizeof(checksum)))
		return -DROP_FRAGMENT;	/* nothing else may be so short: parse_sctp() */
	if (!checksum)
		return 0;
	end = sctp_end(ctx, packet);
	if (!end)
		return -DROP_FRAGMENT;
	checksum ^= crc32c_difference(from, to, end - port_offset);
	return bpf_skb_store_bytes(ctx, field, &checksum, sizeof(checksum),
				   BPF_F_RECOMPUTE_CSUM) ? -DROP_REWRITE : 0;
}

static __always_inline int rewrite_sctp_port(struct __sk_buff *ctx, const struct packet *packet,
					     enum packet_end end, __be16 from, __be16 to)
{
	__u32 offset = packet->l4_offset + port_field(IPPROTO_SCTP, end);
	int error = update_crc(ctx, packet, offset, from, to);

	if (error)
		return error;
	return bpf_skb_store_bytes(ctx, offset, &to, sizeof(to), BPF_F_RECOMPUTE_CSUM) ?
		       -DROP_REWRITE : 0;
}

static __always_inline int rewrite_port(struct __sk_buff *ctx, const struct packet *packet,
					enum packet_end end, __be16 from, __be16 to)
{
	__u32 field = checksum_field(packet->l3_proto);
	__u64 flags = packet->l3_proto == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;

	if (from == to)
		return 0;
	if (packet->l3_proto == IPPROTO_SCTP)
		return rewrite_sctp_port(ctx, packet, end, from, to);
	if (!field)
		return 0;
	if (bpf_l4_csum_replace(ctx, packet->l4_offset + field, from, to, flags | sizeof(to)) ||
	    bpf_skb_store_bytes(ctx, packet->l4_offset + port_field(packet->l3_proto, end), &to,
				sizeof(to), 0))
		return -DROP_REWRITE;
	return 0;
}

/* The packet quoted in an ICMP error went the other way: its other end changes. The quoted
 * IPv4 header's sum stays the same by its own checksum, IPv6's does not; the quoted transport
 * checksum is left alone, as receivers cannot check it. */
static __always_inline int rewrite_quoted(struct __sk_buff *ctx, const struct packet *packet,
					  enum packet_end end, const struct ip_addr *address,
					  __be16 from, __be16 to, __s64 diff)
{
	enum packet_end quoted_end = end == END_SOURCE ? END_DESTINATION : END_SOURCE;
	__u32 checksum = packet->l4_offset + offsetof(struct icmp_header, checksum);
	int error = rewrite_l3(ctx, packet, packet->quoted_l3_offset, quoted_end, address, diff);

	if (error)
		return error;
	if (packet->ipv6 && bpf_l4_csum_replace(ctx, checksum, 0, diff, 0))
		return -DROP_REWRITE;
	if (from == to)
		return 0;
	__u32 port = packet->quoted_l4_offset + port_field(packet->flow.l4_proto, quoted_end);

	if (bpf_l4_csum_replace(ctx, checksum, from, to, sizeof(to)) ||
	    bpf_skb_store_bytes(ctx, port, &to, sizeof(to), 0))
		return -DROP_REWRITE;
	return 0;
}

/* What the packet lies in: it comes first there. */
static __always_inline struct scratch *scratch_of(struct packet *packet)
{
	return (struct scratch *)packet;
}

/* Keeps the flow as it came, for answers to its sender. */
static __always_inline void packet_remember(struct packet *packet)
{
	if (packet->rewritten)
		return;
	scratch_of(packet)->sent = packet->flow;
	packet->rewritten = 1;
}

/* One end of the flow, without the packet itself. */
static __always_inline void packet_set_end(struct packet *packet, enum packet_end end,
					   const struct ip_addr *address, __be16 port)
{
	packet_remember(packet);
	if (end == END_SOURCE) {
		packet->flow.source = *address;
		packet->flow.source_port = port;
	} else {
		packet->flow.destination = *address;
		packet->flow.destination_port = port;
	}
}

__verified_once int rewrite_to_fresh(struct __sk_buff *ctx, enum packet_end end, __be16 port)
{
	struct packet *packet = packet_current();

	if (!packet)
		return -DROP_MALFORMED;
	const struct ip_addr *address = &scratch_of(packet)->fresh;
	struct ip_addr old = end == END_SOURCE ? packet->flow.source : packet->flow.destination;
	__be16 old_port = end == END_SOURCE ? packet->flow.source_port :
					      packet->flow.destination_port;
	__s64 diff = address_csum_diff(&old, address);
	int error = 0;

	if (address_is_ipv4(address) != !packet->ipv6)
		return -DROP_REWRITE;
	/* A router's error keeps its own source. */
	if (end == END_DESTINATION || address_equal(&old, &packet->sender)) {
		error = rewrite_l3(ctx, packet, ETH_HLEN, end, address, diff);
		if (!error && packet->fragment != FRAGMENT_LATER)
			error = update_pseudo_header(ctx, packet, diff);
		if (end == END_SOURCE)
			packet->sender = *address;
	}
	if (!error && packet->quoted_l3_offset)
		error = rewrite_quoted(ctx, packet, end, address, old_port, port, diff);
	else if (!error && packet->fragment != FRAGMENT_LATER)
		error = rewrite_port(ctx, packet, end, old_port, port);
	if (error)
		return error;

	packet_set_end(packet, end, address, port);
	return 0;
}

/* Gives one end of the packet, and of the flow, another address and port. 0 or a reason. */
static __always_inline int rewrite(struct __sk_buff *ctx, struct packet *packet,
				   enum packet_end end, const struct ip_addr *address, __be16 port)
{
	scratch_of(packet)->fresh = *address;
	return rewrite_to_fresh(ctx, end, port);
}

/* Makes the packet what it was: its sender knows no other, and an error must quote that. */
static __always_inline int rewrite_as_sent(struct __sk_buff *ctx, struct packet *packet)
{
	if (!packet->rewritten)
		return 0;
	struct tuple sent = scratch_of(packet)->sent;
	int error = rewrite(ctx, packet, END_SOURCE, &sent.source, sent.source_port);

	return error ? error :
		       rewrite(ctx, packet, END_DESTINATION, &sent.destination,
			       sent.destination_port);
}

/* One router on the way. */
__subprogram int decrement_hop_limit(struct __sk_buff *ctx, const struct packet *packet)
{
	__u8 hop_limit = packet->hop_limit - 1;

	if (packet->hop_limit <= 1)
		return -DROP_TTL_EXCEEDED;
	if (packet->ipv6) {
		if (bpf_skb_store_bytes(ctx, ETH_HLEN + offsetof(struct ipv6hdr, hop_limit),
					&hop_limit, sizeof(hop_limit), 0))
			return -DROP_REWRITE;
		return 0;
	}
	__be16 from = bpf_htons(packet->hop_limit << 8 | packet->fragment_proto);
	__be16 to = bpf_htons(hop_limit << 8 | packet->fragment_proto);

	if (bpf_l3_csum_replace(ctx, ETH_HLEN + offsetof(struct iphdr, check), from, to,
				sizeof(to)) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN + offsetof(struct iphdr, ttl), &hop_limit,
				sizeof(hop_limit), 0))
		return -DROP_REWRITE;
	return 0;
}
