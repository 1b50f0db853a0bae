/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services in XDP: to a backend elsewhere and back, out of the device that the frame came in by.
 * The steps are tc's and change the packet's flow alone; the frame is written once all of them
 * went well. Whatever does not is left to tc, which finds the same entries and decides the same. */
#pragma once

#include "lib/frame.h"
#include "lib/frontend.h"
#include "lib/overlay.h"

/* To the backend. False: tc's. */
static __always_inline bool forward_to_backend(struct packet *packet)
{
	struct ct_entry *entry = ct_find(packet);
	struct ct_entry chosen = {};
	struct snat_entry source = {};

	if (entry && !service_is_asked(packet, entry))
		return false;
	if (entry && service_is_current(packet)) {
		ct_refresh(packet, entry);
		chosen = *entry;
	} else if (event_is_wanted(EVENT_ALLOW) || service_choose(packet, &chosen) <= 0) {
		return false;	/* tc tells of new flows */
	}
	if (!(chosen.flags & (CT_SNAT | CT_DSR)))
		return false;
	service_note(packet, &chosen);
	packet_set_end(packet, END_DESTINATION, &chosen.nat_address, chosen.nat_port);
	if (packet->dsr)
		return !dsr_bytes(packet);	/* tc writes what the first packet carries */

	entry = ct_own(packet, ct_find(packet));
	if (entry)
		ct_refresh(packet, entry);
	else if (ct_record(packet, policy_generation(), true))
		return false;
	if (snat_take(packet, entry && ct_is_closing(entry->flags), &source))
		return false;
	packet_set_end(packet, END_SOURCE, &source.address, source.port);
	return true;
}

/* What a backend elsewhere answered, to its @receiver. False: tc's. */
static __always_inline bool forward_to_client(struct packet *packet,
					      const struct snat_entry *receiver)
{
	struct ip_addr address = receiver->address;

	if (endpoint_find(&address))
		return false;
	packet_set_end(packet, END_DESTINATION, &address, receiver->port);

	struct ct_entry *entry = ct_find(packet);

	if (!entry || !(entry->flags & CT_REV_NAT) || ct_from_origin(packet, entry->flags))
		return false;
	packet->refreshed = ct_refresh(packet, entry);
	address = entry->nat_address;
	packet_set_end(packet, END_SOURCE, &address, entry->nat_port);
	if (packet->refreshed)
		service_touch(packet);
	return true;
}

/* Changes the packet's flow to what is to leave. False: tc's, also what has no business here. */
__subprogram bool forward_decide(struct packet *packet)
{
	const struct tuple *flow = &packet->flow;
	const struct snat_entry *receiver;

	if (packet->hop_limit <= 1 || address_is_link_scope(&flow->destination) ||
	    overlay_is_outer(packet))
		return false;
	receiver = snat_receiver(packet);
	if (!receiver && (endpoint_find(&flow->destination) || !frontend_is_asked(packet)))
		return false;
	if (arrive_is_spoofed(packet) || arrive_is_unrouted(packet))
		return false;
	return receiver ? forward_to_client(packet, receiver) : forward_to_backend(packet);
}

/* The neighbour for the packet's flow. False: tc's, also if it is at another device. */
__subprogram bool forward_route(struct xdp_md *ctx, const struct packet *packet,
				struct ethhdr *ethernet)
{
	const struct tuple *flow = &packet->flow;
	struct bpf_fib_lookup fib = {
		.family = packet->ipv6 ? FAMILY_IPV6 : FAMILY_IPV4,
		.l4_protocol = flow->l4_proto,
		.tot_len = packet->l3_length,
		.ifindex = ctx->ingress_ifindex,
	};

	if (packet->ipv6) {
		__builtin_memcpy(fib.ipv6_src, &flow->source, sizeof(fib.ipv6_src));
		__builtin_memcpy(fib.ipv6_dst, &flow->destination, sizeof(fib.ipv6_dst));
	} else {
		fib.tos = packet->traffic_class;
		fib.ipv4_src = flow->source.word[3];
		fib.ipv4_dst = flow->destination.word[3];
	}
	if (bpf_fib_lookup(ctx, &fib, sizeof(fib), 0) != BPF_FIB_LKUP_RET_SUCCESS ||
	    fib.ifindex != ctx->ingress_ifindex)
		return false;
	__builtin_memcpy(ethernet->h_dest, fib.dmac, ETH_ALEN);
	__builtin_memcpy(ethernet->h_source, fib.smac, ETH_ALEN);
	return true;
}

/* The difference that other words make in a ones' complement sum: up to 2^36, for csum_fold(). */
static __always_inline __u64 words_diff(const struct ip_addr *from, const struct ip_addr *to)
{
	__u64 sum = 0;

	for (int i = 0; i < 4; i++)
		sum += (__u64)(__u32)~from->word[i] + to->word[i];
	return sum;
}

static __always_inline __u64 half_diff(__u16 from, __u16 to)
{
	return (__u64)(__u16)~from + to;
}

/* Adds @diff to a checksum. */
static __always_inline __u16 csum_change(__u16 check, __u64 diff)
{
	return csum_fold((__u16)~check + diff);
}

static __always_inline bool forward_write_l3(const struct frame *frame,
					     const struct packet *packet, __u64 diff)
{
	const struct tuple *flow = &packet->flow;

	if (packet->ipv6) {
		struct ipv6hdr *ip = frame->at;

		if (frame->at + sizeof(*ip) > frame->end)
			return false;
		__builtin_memcpy(&ip->saddr, &flow->source, sizeof(ip->saddr));
		__builtin_memcpy(&ip->daddr, &flow->destination, sizeof(ip->daddr));
		ip->hop_limit--;
		return true;
	}
	struct iphdr *ip = frame->at;

	if (frame->at + sizeof(*ip) > frame->end)
		return false;
	__u16 before = *(__u16 *)&ip->ttl;

	ip->saddr = flow->source.word[3];
	ip->daddr = flow->destination.word[3];
	ip->ttl--;
	ip->check = csum_change(ip->check, diff + half_diff(before, *(__u16 *)&ip->ttl));
	return true;
}

static __always_inline bool forward_write_l4(const struct frame *frame,
					     const struct packet *packet, __u64 diff)
{
	const struct tuple *flow = &packet->flow;

	if (flow->l4_proto == IPPROTO_TCP) {
		struct tcphdr *tcp = frame->at;

		if (frame->at + sizeof(*tcp) > frame->end)
			return false;
		diff += half_diff(tcp->source, flow->source_port) +
			half_diff(tcp->dest, flow->destination_port);
		tcp->source = flow->source_port;
		tcp->dest = flow->destination_port;
		tcp->check = csum_change(tcp->check, diff);
		return true;
	}
	struct udphdr *udp = frame->at;

	if (frame->at + sizeof(*udp) > frame->end)
		return false;
	diff += half_diff(udp->source, flow->source_port) +
		half_diff(udp->dest, flow->destination_port);
	udp->source = flow->source_port;
	udp->dest = flow->destination_port;
	if (udp->check) {	/* zero: there is none */
		__u16 check = csum_change(udp->check, diff);

		udp->check = check ? check : 0xffff;
	}
	return true;
}

/* The frame becomes what its flow is. False: it does not have the bytes that were read before. */
static __always_inline bool forward_write(struct xdp_md *ctx, const struct packet *packet,
					  const struct ethhdr *ethernet)
{
	const struct scratch *mine = scratch_get();
	struct frame frame = frame_of(ctx);
	struct ethhdr *head = frame.at;

	if (!mine || frame.at + sizeof(*head) > frame.end)
		return false;
	__u64 diff = words_diff(&mine->sent.source, &packet->flow.source) +
		     words_diff(&mine->sent.destination, &packet->flow.destination);

	__builtin_memcpy(head->h_dest, ethernet->h_dest, ETH_ALEN);
	__builtin_memcpy(head->h_source, ethernet->h_source, ETH_ALEN);
	frame.at += sizeof(*head);
	if (!forward_write_l3(&frame, packet, diff))
		return false;
	frame.at += packet->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	return forward_write_l4(&frame, packet, diff);
}

/* Sends the packet on if all of that can be done here: XDP_TX. XDP_PASS: it is unchanged. */
static __always_inline int forward(struct xdp_md *ctx, struct packet *packet)
{
	struct ethhdr ethernet = {};

	if (!forward_decide(packet) || !forward_route(ctx, packet, &ethernet))
		return XDP_PASS;
	if (!forward_write(ctx, packet, &ethernet))
		return XDP_ABORTED;
	count_bytes(ctx->data_end - ctx->data, DROP_NONE, DIR_INGRESS);
	return XDP_TX;
}
