/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services: an address and port to one of its backends, for packets and sockets alike. */
#pragma once

#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_helpers.h>

#include "lib/address.h"
#include "lib/affinity.h"
#include "lib/source_range.h"

/* HASH without preallocation, no eviction: 88 B an entry, 6 MB full. Full: the agent reports
 * the Service, which then is not served. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct service_key);
	__type(value, struct service);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} services SEC(".maps");

/* HASH without preallocation, no eviction: 76 B an entry, 40 MB full (8 MB empty). Full: the
 * service gets the backends that fit, and the agent reports it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 524288);
	__type(key, struct backend_key);
	__type(value, struct backend);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} backends SEC(".maps");

static __always_inline const struct service *service_find(const struct ip_addr *address,
							  __be16 port, __u8 protocol,
							  enum service_scope scope)
{
	struct service_key key = {
		.address = *address,
		.port = port,
		.protocol = protocol,
		.scope = scope,
	};

	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP)
		return NULL;
	return bpf_map_lookup_elem(&services, &key);
}

/* Whether a choice depends on who asks. */
static __always_inline bool service_knows_clients(const struct service *service)
{
	return service->affinity_seconds || (service->flags & SERVICE_SOURCE_RANGES);
}

/* A slot, with equal chances. */
static __always_inline __u32 slot_any(const struct service *service)
{
	return service->count ? bpf_get_prandom_u32() % service->count : 0;
}

/* The backend of a new connection: the client's last one, or the one in this slot. 0 or a drop
 * reason. */
__subprogram int backend_choose(const struct service *service, const struct ip_addr *client,
				__u32 slot, struct backend *chosen)
{
	struct backend_key key = { .service = service->id, .slot = slot };

	if ((service->flags & SERVICE_SOURCE_RANGES) && !source_range_has(service->identity, client))
		return -DROP_SOURCE_RANGE;
	if (!service->count)
		return service->flags & SERVICE_LOCAL ? -DROP_NO_LOCAL_BACKEND : -DROP_NO_BACKEND;
	if (service->affinity_seconds && affinity_find(service, client, chosen))
		return 0;

	const struct backend *backend = bpf_map_lookup_elem(&backends, &key);

	if (!backend)
		return -DROP_NO_BACKEND;
	chosen->address = backend->address;
	chosen->port = backend->port;
	if (service->affinity_seconds)
		affinity_remember(service, client, chosen);
	return 0;
}
