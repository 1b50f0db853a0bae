/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Who has an address: pods here, pods and nodes anywhere, ipBlocks, routes. All of these maps
 * are written by the agent alone; when one is full, the agent says so and the object that
 * did not fit is not served. */
#pragma once

#include "lib/address.h"

#define PREFIX_BITS_ALL 128

/* HASH without preallocation, no eviction: 100 B an entry, 0.4 MB full. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct ip_addr);
	__type(value, struct endpoint);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} endpoints SEC(".maps");

/* HASH without preallocation, no eviction: 72 B an entry, 22 MB full (4 MB empty). */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct ip_addr);
	__type(value, struct address);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} addresses SEC(".maps");

/* LPM_TRIE (never preallocated), no eviction: 64 B a node, two nodes a prefix, 8 MB full. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct prefix_key);
	__type(value, struct prefix);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} prefixes SEC(".maps");

/* LPM_TRIE (never preallocated), no eviction: 80 B a node, two nodes a prefix, 5 MB full. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 32768);
	__type(key, struct prefix_key);
	__type(value, struct route);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} routes SEC(".maps");

static __always_inline const struct endpoint *endpoint_find(const struct ip_addr *address)
{
	return bpf_map_lookup_elem(&endpoints, address);
}

static __always_inline const struct route *route_find(const struct ip_addr *address)
{
	struct prefix_key key = { .bits = PREFIX_BITS_ALL, .address = *address };

	return bpf_map_lookup_elem(&routes, &key);
}

static __always_inline bool is_local_host(const struct ip_addr *address)
{
	const struct address *known = bpf_map_lookup_elem(&addresses, address);

	return known && (known->flags & ADDRESS_LOCAL_HOST);
}

static __always_inline bool is_node(const struct ip_addr *address)
{
	const struct address *known = bpf_map_lookup_elem(&addresses, address);

	return known && (known->flags & (ADDRESS_LOCAL_HOST | ADDRESS_REMOTE_NODE));
}

/* Beside the class: the address is this node's. */
#define CLASS_OF_OWN_NODE (1u << 31)

/* The policy class of an address that is no pod's on this node, and CLASS_OF_OWN_NODE. */
__subprogram __u32 class_of(const struct ip_addr *address)
{
	struct prefix_key key = { .bits = PREFIX_BITS_ALL, .address = *address };
	const struct address *known = bpf_map_lookup_elem(&addresses, address);

	if (known)
		return known->class | (known->flags & ADDRESS_LOCAL_HOST ? CLASS_OF_OWN_NODE : 0);

	const struct route *route = bpf_map_lookup_elem(&routes, &key);

	if (route && (route->flags & ROUTE_POD_CIDR))
		return CLASS_UNKNOWN;

	const struct prefix *prefix = bpf_map_lookup_elem(&prefixes, &key);

	return prefix ? prefix->class : CLASS_WORLD;
}
