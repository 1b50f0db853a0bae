/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Conntrack: one entry for both directions of a flow. */
#pragma once

#include "lib/policy.h"

/* Seconds without a packet after which a flow is forgotten. */
#define CT_SECONDS_TCP_OPENING 60
#define CT_SECONDS_TCP_ESTABLISHED 21600
#define CT_SECONDS_TCP_HALF_CLOSED 3600
#define CT_SECONDS_TCP_CLOSED 30
#define CT_SECONDS_SCTP 210		/* heartbeats come every 30 s */
#define CT_SECONDS_UNREPLIED 60
#define CT_SECONDS_REPLIED 180

/* LRU_HASH: when full, the flows idle for longest are forgotten; their next packet is judged
 * like the first of a new flow. 157 B an entry, 41 MB. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct ct_key);
	__type(value, struct ct_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} ct SEC(".maps");

/* Builds the packet's key. */
static __always_inline void ct_make_key(struct packet *packet)
{
	const struct tuple *flow = &packet->flow;
	struct ct_key *key = &packet->ct_key;
	int order = address_order(&flow->source, &flow->destination);
	bool source_is_low = order < 0 || (order == 0 && bpf_ntohs(flow->source_port) <=
							 bpf_ntohs(flow->destination_port));

	if (source_is_low) {
		key->low = flow->source;
		key->high = flow->destination;
		key->low_port = flow->source_port;
		key->high_port = flow->destination_port;
	} else {
		key->low = flow->destination;
		key->high = flow->source;
		key->low_port = flow->destination_port;
		key->high_port = flow->source_port;
	}
	key->protocol = flow->l4_proto;
	__builtin_memset(key->pad, 0, sizeof(key->pad));
	packet->source_is_low = source_is_low;
}

/* TCP and SCTP say when a flow opens and closes. */
static __always_inline bool is_connection(const struct packet *packet)
{
	return packet->flow.l4_proto == IPPROTO_TCP || packet->flow.l4_proto == IPPROTO_SCTP;
}

static __always_inline bool tcp_opens(const struct packet *packet)
{
	return (packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool ct_is_closing(__u32 flags)
{
	return (flags & CT_RESET) || (flags & (CT_FIN_ORIGIN | CT_FIN_REPLY)) ==
					     (CT_FIN_ORIGIN | CT_FIN_REPLY) ||
	       ((flags & CT_SERVICE) && (flags & CT_FIN_ORIGIN));
}

/* The entry of the packet's flow. NULL: none, expired, or closed and now opened again. */
__subprogram struct ct_entry *ct_find(struct packet *packet)
{
	ct_make_key(packet);
	packet->now = seconds_now();

	struct ct_entry *entry = bpf_map_lookup_elem(&ct, &packet->ct_key);

	if (!entry || entry->expires < packet->now ||
	    (tcp_opens(packet) && ct_is_closing(entry->flags)))
		return NULL;
	return entry;
}

static __always_inline bool ct_from_origin(const struct packet *packet, __u32 flags)
{
	return !!(flags & CT_ORIGIN_IS_LOW) == !!packet->source_is_low;
}

static __always_inline __u32 ct_lifetime(const struct packet *packet, __u32 flags)
{
	if (!is_connection(packet))
		return flags & CT_REPLIED ? CT_SECONDS_REPLIED : CT_SECONDS_UNREPLIED;
	if (ct_is_closing(flags))
		return CT_SECONDS_TCP_CLOSED;
	if (packet->flow.l4_proto == IPPROTO_SCTP)
		return flags & CT_REPLIED ? CT_SECONDS_SCTP : CT_SECONDS_TCP_OPENING;
	if (flags & (CT_FIN_ORIGIN | CT_FIN_REPLY))
		return CT_SECONDS_TCP_HALF_CLOSED;
	return flags & CT_REPLIED ? CT_SECONDS_TCP_ESTABLISHED : CT_SECONDS_TCP_OPENING;
}

/* The flags after this packet. A flow met midway, and the client's side of a service's flow
 * (of whose replies only some are told), count as replied when the handshake is over. */
static __always_inline __u32 ct_flags_after(const struct packet *packet, __u32 flags,
					    bool from_origin)
{
	if (!from_origin)
		flags |= CT_REPLIED;
	if (!is_connection(packet) || packet->fragment == FRAGMENT_LATER)
		return flags;
	if (from_origin && !(packet->tcp_flags & TCP_SYN) && (flags & CT_SERVICE))
		flags |= CT_REPLIED;
	if (packet->tcp_flags & TCP_RST)
		flags |= CT_RESET;
	if (packet->tcp_flags & TCP_FIN)
		flags |= from_origin ? CT_FIN_ORIGIN : CT_FIN_REPLY;
	return flags;
}

/* Writes only what changed: expires does so once a second. Not atomic: a flag lost to a race
 * comes back with the next packet. True if it did. */
static __always_inline bool ct_refresh(const struct packet *packet, struct ct_entry *entry)
{
	__u32 flags = ct_flags_after(packet, entry->flags, ct_from_origin(packet, entry->flags));
	__u32 expires = packet->now + ct_lifetime(packet, flags);

	if (entry->flags != flags)
		entry->flags = flags;
	if (entry->expires == expires)
		return false;
	entry->expires = expires;
	return true;
}

/* Records a flow that this packet opens. */
static __always_inline int ct_create(const struct packet *packet, struct ct_entry *entry)
{
	if (packet->source_is_low)
		entry->flags |= CT_ORIGIN_IS_LOW;
	if (is_connection(packet) && packet->fragment != FRAGMENT_LATER &&
	    !(packet->tcp_flags & TCP_SYN))
		entry->flags |= CT_REPLIED;
	entry->flags = ct_flags_after(packet, entry->flags, true);
	entry->expires = packet->now + ct_lifetime(packet, entry->flags);
	return bpf_map_update_elem(&ct, &packet->ct_key, entry, BPF_ANY) ? -DROP_CT_FULL : 0;
}

/* Records the packet's flow as allowed in this generation of policy, or as @unjudged. */
static __always_inline int ct_record(const struct packet *packet, __u32 generation, bool unjudged)
{
	struct ct_entry entry = {
		.generation = generation,
		.flags = unjudged ? CT_UNJUDGED : 0,
	};

	if (packet->service) {
		entry.flags |= CT_REV_NAT;
		entry.service = packet->service;
		entry.nat_address = packet->vip;
		entry.nat_port = packet->vip_port;
	}
	return ct_create(packet, &entry);
}

/* Whether the packet can be a flow's first. Datagrams with IPv4 options are left out: direct return
 * finds no room beside those, and does not say again what they are for. */
static __always_inline bool ct_may_open(const struct packet *packet)
{
	if (packet->quoted_l3_offset || packet->fragment == FRAGMENT_LATER)
		return false;
	if (is_connection(packet))
		return tcp_opens(packet);
	return !has_ipv4_options(packet);
}

/* Whether what the packet opens is not what the entry remembers: its client asked for a VIP then,
 * and for the backend's own address now. */
static __always_inline bool ct_is_asked_past_vip(const struct packet *packet,
						 const struct ct_entry *entry)
{
	return (entry->flags & CT_REV_NAT) && ct_from_origin(packet, entry->flags) &&
	       ct_may_open(packet);
}

/* The entry that is the flow's own. One client's port may have come to the backend before, by its
 * own address or by another VIP, whose entry lives on: the later flow takes it over, for the
 * answers are to come from the address that it knows. */
static __always_inline struct ct_entry *ct_own(const struct packet *packet, struct ct_entry *entry)
{
	if (!entry)
		return NULL;
	if (!packet->service)
		return ct_is_asked_past_vip(packet, entry) ? NULL : entry;
	if (!(entry->flags & CT_REV_NAT) || entry->nat_port != packet->vip_port ||
	    !address_equal(&entry->nat_address, &packet->vip))
		return NULL;
	return entry;
}

__verified_once int ct_open(struct __sk_buff *ctx, bool own_node)
{
	struct packet *packet = packet_current();

	if (!packet)
		return -DROP_MALFORMED;
	__u32 generation = policy_generation();
	int verdict = judge(ctx, false, own_node);

	if (verdict < 0)
		return verdict;
	int error = ct_record(packet, generation, verdict == JUDGED_OWN_NODE);

	if (!error && verdict != JUDGED_AUDITED && event_is_wanted(EVENT_ALLOW))
		notify(ctx, packet, DROP_NONE, EVENT_ALLOW);
	return error;
}

/* Lets the packet's flow pass or not. @own_node: one end is this node. 0 or a drop reason. */
static __always_inline int ct_admit(struct __sk_buff *ctx, struct packet *packet,
				    struct ct_entry *entry, bool own_node)
{
	__u32 generation = policy_generation();

	entry = ct_own(packet, entry);
	if (packet->quoted_l3_offset)
		return entry || own_node ? 0 : -DROP_INVALID_CT;
	if (!entry)
		return ct_open(ctx, own_node);
	/* Policy changed since the flow was allowed. Denied, the entry stays and says who opened
	 * the flow: without it, the other side's next packet would count as opening a new one. */
	if (entry->generation != generation && !(entry->flags & CT_UNJUDGED) && !own_node) {
		int verdict = judge(ctx, !ct_from_origin(packet, entry->flags), false);

		if (verdict < 0)
			return verdict;
		entry->generation = generation;
	}
	packet->refreshed = ct_refresh(packet, entry);
	return 0;
}
