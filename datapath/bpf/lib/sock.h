/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services at the socket: a client that connects to a VIP is connected to a backend, once,
 * and its packets need nothing more. */
#pragma once

#include "lib/service.h"
#include "lib/settings.h"

#define SOCK_REFUSED 111		/* ECONNREFUSED */

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

/* Puts a backend in place of a VIP. @sticky: an unconnected socket, which names the VIP in
 * every call and must keep its backend while the service stays as it is. */
static __always_inline int sock_translate(struct bpf_sock_addr *ctx, struct sock_peer *peer,
					  bool sticky, bool *translated)
{
	const struct service *service = service_find(&peer->address, peer->port, peer->protocol);
	const struct sock_peer vip = *peer;

	if (!service)
		return SOCK_ALLOW;
	if (sticky) {
		struct sock_nat_key key = sock_key(ctx, &vip);
		const struct sock_nat *known = bpf_map_lookup_elem(&sock_nat, &key);

		if (known && known->service == service->id) {
			peer->address = known->address;
			peer->port = known->port;
			*translated = true;
			return SOCK_ALLOW;
		}
	}
	const struct backend *backend = backend_choose(service);

	if (!backend)
		return sock_refuse();
	peer->address = backend->address;
	peer->port = backend->port;
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
