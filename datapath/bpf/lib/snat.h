/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Packets that go on with this node's address: of pods that leave the cluster, and of a
 * service's clients whose backend is elsewhere. */
#pragma once

#include "lib/drop.h"
#include "lib/rewrite.h"
#include "lib/runtime.h"
#include "lib/settings.h"
#include "lib/where.h"

#define SNAT_PROBES 64
#define SNAT_SECONDS_TCP 21600
#define SNAT_SECONDS_BRIEF 120		/* of TCP, while opening and after closing */
#define SNAT_SECONDS_ONCE 30		/* of datagrams: a question and its answer */
#define SNAT_SECONDS_STREAM 200
#define SNAT_SECONDS_CALM 2

/* LRU_HASH, two entries a flow: when full, the flows idle for longest lose their port, and
 * their connections break. 138 B an entry, 36 MB. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 262144);
	__type(key, struct snat_key);
	__type(value, struct snat_entry);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} snat SEC(".maps");

static __always_inline bool snat_has_address(const struct packet *packet)
{
	struct ip_addr node;

	node_address(packet->ipv6, &node);
	return !address_is_unset(&node);
}

static __always_inline bool snat_has_ports(const struct packet *packet)
{
	return has_ports(packet->flow.l4_proto) && packet->flow.source_port;
}

static __always_inline bool snat_is_icmp(__u8 l4_proto)
{
	return l4_proto == IPPROTO_ICMP || l4_proto == IPPROTO_ICMPV6;
}

/* The identifier of an ICMP echo is the local side's; the remote side has none. */
static __always_inline void snat_forward_key(const struct tuple *flow, struct snat_key *key)
{
	key->remote = flow->destination;
	key->local = flow->source;
	key->remote_port = snat_is_icmp(flow->l4_proto) ? 0 : flow->destination_port;
	key->local_port = flow->source_port;
	key->protocol = flow->l4_proto;
	key->kind = SNAT_FORWARD;
	__builtin_memset(key->pad, 0, sizeof(key->pad));
}

static __always_inline void snat_reverse_key(const struct tuple *flow, struct snat_key *key)
{
	key->remote = flow->source;
	key->local = flow->destination;
	key->remote_port = snat_is_icmp(flow->l4_proto) ? 0 : flow->source_port;
	key->local_port = flow->destination_port;
	key->protocol = flow->l4_proto;
	key->kind = SNAT_REVERSE;
	__builtin_memset(key->pad, 0, sizeof(key->pad));
}

static __always_inline __u32 snat_lifetime(const struct packet *packet, __u8 state)
{
	if (packet->flow.l4_proto != IPPROTO_TCP)
		return state & SNAT_STREAM ? SNAT_SECONDS_STREAM : SNAT_SECONDS_ONCE;
	return (state & SNAT_CLOSING) || (packet->tcp_flags & TCP_SYN) ? SNAT_SECONDS_BRIEF :
									 SNAT_SECONDS_TCP;
}

/* The reverse entry's state after a packet in either direction. Datagrams are a stream when they
 * still come two seconds after the last that was a question alone (as nf_conntrack counts them).
 * @closing: both sides have said so. */
static __always_inline __u8 snat_state_after(const struct packet *packet,
					     const struct snat_entry *reverse, __u32 now,
					     bool closing)
{
	__u8 state = reverse->state;

	if (packet->flow.l4_proto != IPPROTO_TCP) {
		bool later = reverse->expires + SNAT_SECONDS_CALM < now + SNAT_SECONDS_ONCE;

		return later && (state & SNAT_REPLIED) ? state | SNAT_STREAM : state;
	}
	if (packet->fragment == FRAGMENT_LATER)
		return state;
	if ((packet->tcp_flags & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		return 0;
	return closing || (packet->tcp_flags & TCP_RST) ? state | SNAT_CLOSING : state;
}

/* Whether its time starts anew: not while it is open if an answer makes a stream of datagrams. */
static __always_inline bool snat_is_waiting(const struct packet *packet, __u8 state)
{
	return packet->flow.l4_proto != IPPROTO_TCP &&
	       (state & (SNAT_REPLIED | SNAT_STREAM)) == SNAT_REPLIED;
}

static __always_inline void snat_refresh(struct snat_entry *entry, __u32 expires)
{
	if (entry->expires != expires)
		entry->expires = expires;
}

/* Takes a free port: from a random one on, a bounded number of tries. BPF_NOEXIST makes the
 * reverse entry the lock; one that has expired is taken over, and where none is free, that of a
 * connection that has ended (as the kernel's nf_nat does with what is in TIME_WAIT). Two that
 * take over one port at once: the later has it, the earlier finds at its next packet that it has
 * not. */
__subprogram int snat_open(const struct snat_key *forward_key, struct snat_entry *forward)
{
	struct snat_key key = {
		.remote = forward_key->remote,
		.remote_port = forward_key->remote_port,
		.protocol = forward_key->protocol,
		.kind = SNAT_REVERSE,
	};
	struct snat_entry reverse = {
		.address = forward_key->local,
		.port = forward_key->local_port,
		.expires = forward->expires,
	};
	__u32 first = snat_port_first;

	/* Datagrams stay above the port of the overlay: overlay_is_outer(). */
	if (key.protocol == IPPROTO_UDP && overlay_port >= first && overlay_port < snat_port_last)
		first = overlay_port + 1;
	__u32 ports = snat_port_last - first + 1;
	__u32 start = bpf_get_prandom_u32() % ports;
	__u32 now = seconds_now();
	__be16 ended = 0;

	key.local = forward->address;
	for (__u32 i = 0; i < SNAT_PROBES && i < ports; i++) {
		__u32 offset = start + i;

		if (offset >= ports)
			offset -= ports;
		key.local_port = bpf_htons(first + offset);

		const struct snat_entry *taken = bpf_map_lookup_elem(&snat, &key);

		if (taken && taken->expires >= now) {
			if (taken->state & SNAT_CLOSING)
				ended = key.local_port;
			continue;
		}
		if (bpf_map_update_elem(&snat, &key, &reverse, taken ? BPF_EXIST : BPF_NOEXIST))
			continue;
		forward->port = key.local_port;
		return bpf_map_update_elem(&snat, forward_key, forward, BPF_ANY) ?
			       -DROP_SNAT_NO_PORT : 0;
	}
	if (!ended)
		return -DROP_SNAT_NO_PORT;
	key.local_port = ended;
	forward->port = ended;
	if (bpf_map_update_elem(&snat, &key, &reverse, BPF_ANY) ||
	    bpf_map_update_elem(&snat, forward_key, forward, BPF_ANY))
		return -DROP_SNAT_NO_PORT;
	return 0;
}

/* Whether a pod's packet to this destination leaves the cluster. */
static __always_inline bool snat_leaves_cluster(const struct ip_addr *destination)
{
	const struct route *route = route_find(destination);

	if (route && (route->flags & (ROUTE_POD_CIDR | ROUTE_TUNNEL | ROUTE_NO_MASQUERADE)))
		return false;
	return !is_node(destination);
}

/* The address and port that the packet goes on with, its flow's own or new ones. 0 or a drop
 * reason. */
static __always_inline int snat_take(const struct packet *packet, bool closing,
				     struct snat_entry *fresh)
{
	struct snat_key key;

	__u32 now = seconds_now();

	fresh->expires = now + snat_lifetime(packet, 0);
	node_address(packet->ipv6, &fresh->address);
	if (address_is_unset(&fresh->address) || !snat_has_ports(packet))
		return -DROP_SNAT_NO_PORT;
	snat_forward_key(&packet->flow, &key);

	struct snat_entry *entry = bpf_map_lookup_elem(&snat, &key);

	if (entry && address_equal(&entry->address, &fresh->address)) {
		fresh->port = entry->port;
		/* The reverse entry may have been evicted alone, or lapse unseen. */
		struct snat_key reverse_key = {
			.remote = key.remote,
			.local = fresh->address,
			.remote_port = key.remote_port,
			.local_port = fresh->port,
			.protocol = key.protocol,
			.kind = SNAT_REVERSE,
		};
		struct snat_entry *reverse = bpf_map_lookup_elem(&snat, &reverse_key);

		if (reverse && address_equal(&reverse->address, &key.local) &&
		    reverse->port == key.local_port) {
			if (packet->quoted_l3_offset)
				return 0;
			__u8 state = snat_state_after(packet, reverse, now, closing);

			if (reverse->state != state)
				reverse->state = state;
			if (!snat_is_waiting(packet, state)) {
				snat_refresh(reverse, now + snat_lifetime(packet, state));
				snat_refresh(entry, now + snat_lifetime(packet, state));
			}
			return 0;
		}
	}
	if (packet->quoted_l3_offset)
		return -DROP_INVALID_CT;
	return snat_open(&key, fresh);
}

/* Gives the packet the node's address as its source. 0 or a drop reason. */
__subprogram int snat_masquerade(struct __sk_buff *ctx, struct packet *packet, bool closing)
{
	struct snat_entry fresh = {};
	int error = snat_take(packet, closing, &fresh);

	return error ? error : rewrite(ctx, packet, END_SOURCE, &fresh.address, fresh.port);
}

/* Answers keep a stream of datagrams as well as what goes on does. Of a connection only a reset
 * says something: packets that go on know the rest. */
static __always_inline void snat_reply_seen(const struct packet *packet, struct snat_key *key,
					    struct snat_entry *entry, __u32 now)
{
	if (!(entry->state & SNAT_REPLIED))
		entry->state |= SNAT_REPLIED;

	__u8 state = snat_state_after(packet, entry, now, false);

	if (entry->state != state)
		entry->state = state;
	__u32 expires = now + snat_lifetime(packet, state);

	if (!(state & (SNAT_STREAM | SNAT_CLOSING)) || entry->expires == expires)
		return;
	entry->expires = expires;
	key->local = entry->address;
	key->local_port = entry->port;
	key->kind = SNAT_FORWARD;

	struct snat_entry *forward = bpf_map_lookup_elem(&snat, key);

	if (forward)
		snat_refresh(forward, expires);
}

/* Who a reply to the node's address is really for. NULL: it is no such reply. */
static __always_inline const struct snat_entry *snat_receiver(const struct packet *packet)
{
	__u16 port = bpf_ntohs(packet->flow.destination_port);
	struct ip_addr node;
	struct snat_key key;

	if (port < snat_port_first || port > snat_port_last)
		return NULL;
	node_address(packet->ipv6, &node);
	if (!address_equal(&packet->flow.destination, &node))
		return NULL;
	snat_reverse_key(&packet->flow, &key);

	struct snat_entry *entry = bpf_map_lookup_elem(&snat, &key);
	__u32 now = seconds_now();

	if (!entry || entry->expires < now)
		return NULL;
	if (!packet->quoted_l3_offset)
		snat_reply_seen(packet, &key, entry, now);
	return entry;
}

/* Gives a reply to the node's address its real receiver back. 1 if it was one, 0, or a drop
 * reason. */
__subprogram int snat_reply(struct __sk_buff *ctx, struct packet *packet)
{
	const struct snat_entry *entry = snat_receiver(packet);

	if (!entry)
		return 0;
	struct ip_addr pod = entry->address;
	__be16 pod_port = entry->port;
	int error = rewrite(ctx, packet, END_DESTINATION, &pod, pod_port);

	if (!error && snat_is_icmp(packet->flow.l4_proto))
		packet->flow.source_port = pod_port;
	return error ? error : 1;
}
