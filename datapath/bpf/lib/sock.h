/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services at the socket: a client that connects to a VIP is connected to a backend, once,
 * and its packets need nothing more. */
#pragma once

#include "lib/service.h"
#include "lib/settings.h"

#define SOCK_REFUSED 111		/* ECONNREFUSED */
#define SOCK_IPV4 2			/* AF_INET */

enum sock_verdict {
	SOCK_DENY = 0,
	SOCK_ALLOW = 1,
};

/* LRU_HASH: when full, the sockets idle for longest lose their entries: getpeername then
 * names the backend, and an unconnected datagram socket may change its backend. 146 B an
 * entry, 19 MB. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 131072);
	__type(key, struct sock_nat_key);
	__type(value, struct sock_nat);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} sock_nat SEC(".maps");

/* HASH without preallocation, no eviction: a pod each, 96 B an entry, 0.4 MB full. Full: the
 * agent reports it, and what depends on a pod's address is left to the packet programs. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct netns_addresses);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} netns_addresses SEC(".maps");

/* Address and port that a socket call names. */
struct sock_peer {
	struct ip_addr address;
	__be16 port;
	__u8 protocol;
	__u8 pad;
};

static __always_inline struct sock_nat_key sock_key(struct bpf_sock_addr *ctx,
						    const struct sock_peer *peer)
{
	struct sock_nat_key key = {
		.cookie = bpf_get_socket_cookie(ctx),
		.address = peer->address,
		.port = peer->port,
		.protocol = peer->protocol,
	};

	return key;
}

static __always_inline void sock_remember(struct bpf_sock_addr *ctx, const struct sock_peer *from,
					  const struct ip_addr *address, __be16 port, __u32 service)
{
	struct sock_nat_key key = sock_key(ctx, from);
	struct sock_nat value = { .address = *address, .port = port, .service = service };

	bpf_map_update_elem(&sock_nat, &key, &value, BPF_ANY);
}

/* 5.10 to 5.17 cannot choose the errno, and EPERM would be misleading: there the packet goes
 * out as it is, and from_pod answers it. */
static __always_inline int sock_refuse(void)
{
	if (!has_set_retval)
		return SOCK_ALLOW;
	bpf_set_retval(-SOCK_REFUSED);
	return SOCK_DENY;
}

static __always_inline bool sock_is_hosts(struct bpf_sock_addr *ctx)
{
	__u64 host = host_netns_cookie ? host_netns_cookie : bpf_get_netns_cookie(NULL);

	return bpf_get_netns_cookie(ctx) == host;
}

/* The address that the socket's packets would come from. */
static __always_inline bool sock_client(struct bpf_sock_addr *ctx, bool ipv4,
					struct ip_addr *client)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	const struct netns_addresses *known;

	if (sock_is_hosts(ctx)) {
		node_address(!ipv4, client);
		return true;
	}
	known = bpf_map_lookup_elem(&netns_addresses, &cookie);
	if (!known)
		return false;
	*client = ipv4 ? known->ipv4 : known->ipv6;
	return true;
}

/* For the host's own processes a node port answers on the loopback address too, if no host port
 * is there. */
static __always_inline const struct service *sock_service(struct bpf_sock_addr *ctx,
							  const struct sock_peer *peer)
{
	struct ip_addr address = peer->address;

	if (address_is_loopback(&address)) {
		if (!sock_is_hosts(ctx))
			return NULL;
		const struct service *own = service_find(&address, peer->port, peer->protocol,
							 SCOPE_INTERNAL);

		if (own)
			return own;
		node_address(!address_is_ipv4(&address), &address);
	}
	return service_find(&address, peer->port, peer->protocol, SCOPE_INTERNAL);
}

/* Puts a backend in place of a VIP. @sticky: an unconnected socket, which names the VIP in
 * every call and must keep its backend while the service is there. What is not allowed, or must
 * vanish without a word, goes out as it is: the packet programs drop it and say why. */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx, struct sock_peer *peer,
					  bool sticky, bool *translated)
{
	const struct service *service = sock_service(ctx, peer);
	const struct sock_peer vip = *peer;
	struct ip_addr client = {};
	struct backend backend;

	if (!service)
		return SOCK_ALLOW;
	if (sticky) {
		struct sock_nat_key key = sock_key(ctx, &vip);
		const struct sock_nat *known = bpf_map_lookup_elem(&sock_nat, &key);

		if (known) {
			peer->address = known->address;
			peer->port = known->port;
			*translated = true;
			return SOCK_ALLOW;
		}
	}
	if (service_knows_clients(service) &&
	    !sock_client(ctx, address_is_ipv4(&peer->address), &client))
		return SOCK_ALLOW;
	int error = backend_choose(service, &client, slot_any(service), &backend);

	if (error)
		return error == -DROP_NO_BACKEND ? sock_refuse() : SOCK_ALLOW;
	peer->address = backend.address;
	peer->port = backend.port;
	*translated = true;
	sock_remember(ctx, peer, &vip.address, vip.port, service->id);
	if (sticky)
		sock_remember(ctx, &vip, &peer->address, peer->port, service->id);
	return SOCK_ALLOW;
}

/* Puts the VIP back in place of a backend that this socket got for it. */
static __always_inline bool sock_restore(struct bpf_sock_addr *ctx, struct sock_peer *peer)
{
	struct sock_nat_key key = sock_key(ctx, peer);
	const struct sock_nat *known = bpf_map_lookup_elem(&sock_nat, &key);

	if (!known)
		return false;
	peer->address = known->address;
	peer->port = known->port;
	return true;
}
