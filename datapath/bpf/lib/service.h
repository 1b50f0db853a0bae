/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services: a VIP and port to one of its backends. */
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
							  __be16 port, __u8 protocol)
{
	struct service_key key = {
		.address = *address,
		.port = port,
		.protocol = protocol,
		.scope = SCOPE_INTERNAL,
	};

	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && protocol != IPPROTO_SCTP)
		return NULL;
	return bpf_map_lookup_elem(&services, &key);
}

/* Any backend, with equal chances. NULL: there is none. */
static __always_inline const struct backend *backend_choose(const struct service *service)
{
	__u32 count = service->count;

	if (!count)
		return NULL;
	struct backend_key key = {
		.service = service->id,
		.slot = bpf_get_prandom_u32() % count,
	};

	return bpf_map_lookup_elem(&backends, &key);
}
