/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Session affinity ClientIP: a client's next connections go where its last one went. Packets
 * and sockets share the entries. */
#pragma once

#include "lib/runtime.h"
#include "lib/where.h"

/* LRU_HASH: when full, the clients idle for longest choose anew. 116 B an entry, 15 MB. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct affinity_key);
	__type(value, struct affinity);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} affinity SEC(".maps");

/* The backend that the client had. It counts from the last connection, not the last packet. */
static __always_inline bool affinity_find(const struct service *service,
					  const struct ip_addr *client, struct backend *chosen)
{
	struct affinity_key key = { .identity = service->identity, .client = *client };
	struct affinity *known = bpf_map_lookup_elem(&affinity, &key);
	__u32 now = seconds_now();

	if (!known || now - known->last_used > service->affinity_seconds)
		return false;
	/* Another address of the port may have led to all nodes. */
	if ((service->flags & SERVICE_LOCAL) && !endpoint_find(&known->address) &&
	    !is_local_host(&known->address))
		return false;
	chosen->address = known->address;
	chosen->port = known->port;
	if (known->last_used != now)
		known->last_used = now;
	return true;
}

static __always_inline void affinity_remember(const struct service *service,
					      const struct ip_addr *client,
					      const struct backend *chosen)
{
	struct affinity_key key = { .identity = service->identity, .client = *client };
	struct affinity row = {
		.address = chosen->address,
		.port = chosen->port,
		.last_used = seconds_now(),
	};

	bpf_map_update_elem(&affinity, &key, &row, BPF_ANY);
}
