/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Fragments: only the first has ports. It is remembered, the later ones look it up. */
#pragma once

#include "lib/packet.h"

struct fragment_key {
	struct ip_addr source;
	struct ip_addr destination;
	__be32 id;
	__u8 protocol;
	__u8 pad[3];
};
_Static_assert(sizeof(struct fragment_key) == 40, "fragment_key");

struct fragment_ports {
	__be16 source_port;
	__be16 destination_port;
	__u8 l4_proto;
	__u8 pad[3];
};
_Static_assert(sizeof(struct fragment_ports) == 8, "fragment_ports");

/* LRU_HASH: the oldest packets' fragments are forgotten, whose late ones are then dropped.
 * 112 B an entry, 0.9 MB. Private to the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct fragment_key);
	__type(value, struct fragment_ports);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} fragments SEC(".maps");

/* Gives a later fragment its ports. 0 or a drop reason. */
__subprogram int fragment_track(struct packet *packet)
{
	struct fragment_key key = {
		.source = packet->sender,
		.destination = packet->flow.destination,
		.id = packet->fragment_id,
		.protocol = packet->fragment_proto,
	};

	if (packet->fragment == FRAGMENT_FIRST) {
		struct fragment_ports ports = {
			.source_port = packet->flow.source_port,
			.destination_port = packet->flow.destination_port,
			.l4_proto = packet->flow.l4_proto,
		};

		return bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY) ? -DROP_FRAGMENT : 0;
	}
	const struct fragment_ports *ports = bpf_map_lookup_elem(&fragments, &key);

	if (!ports)
		return -DROP_FRAGMENT;
	packet->flow.source_port = ports->source_port;
	packet->flow.destination_port = ports->destination_port;
	packet->flow.l4_proto = ports->l4_proto;
	return 0;
}

static __always_inline int fragment_resolve(struct packet *packet)
{
	return packet->fragment == FRAGMENT_NONE ? 0 : fragment_track(packet);
}
