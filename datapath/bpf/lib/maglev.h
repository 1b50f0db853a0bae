/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Maglev tables: clients from outside the cluster find the same backend at every node, and a
 * backend that goes moves few of the others' clients. The agent computes them. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "lib/address.h"
#include "lib/packet.h"
#include "lib/settings.h"

/* HASH without preallocation, no eviction: 568 B an entry, which is 256 slots; 37 MB full (2 MB
 * empty). Full: the service chooses at random, and the agent reports it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct maglev_key);
	__type(value, struct maglev_block);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} maglev SEC(".maps");

/* Bits of every number it gets in every bit of what it gives (the finalizer of MurmurHash3). */
static __always_inline __u32 hash_mix(__u32 hash, __u32 word)
{
	hash ^= word;
	hash ^= hash >> 16;
	hash *= 0x85ebca6b;
	hash ^= hash >> 13;
	hash *= 0xc2b2ae35;
	hash ^= hash >> 16;
	return hash;
}

/* Equal at every node. @by_client: one client has one backend, whatever its ports. */
static __always_inline __u32 flow_hash(const struct tuple *flow, bool by_client)
{
	__u32 hash = flow->l4_proto;

	for (int i = 0; i < 4; i++)
		hash = hash_mix(hash, flow->source.word[i]);
	for (int i = 0; i < 4; i++)
		hash = hash_mix(hash, flow->destination.word[i]);
	return hash_mix(hash, flow->destination_port << 16 | (by_client ? 0 : flow->source_port));
}

/* The flow's slot, or one past all: the service has no table. */
__subprogram __u32 slot_by_maglev(const struct service *service, const struct tuple *flow)
{
	if (!maglev_table_size)
		return service->count;
	__u32 entry = flow_hash(flow, service->affinity_seconds) % maglev_table_size;
	struct maglev_key key = { .service = service->id, .block = entry / MAGLEV_BLOCK };
	const struct maglev_block *block = bpf_map_lookup_elem(&maglev, &key);

	return block ? block->slot[entry % MAGLEV_BLOCK] : service->count;
}
