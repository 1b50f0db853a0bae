// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* cgroup root: connect, sendmsg, recvmsg and getpeername of every process on the node, and the end
 * of its sockets. The v6 hooks see v4-mapped sockets too; struct ip_addr writes both alike. */
#include "lib/sock.h"

/* One field at a time: the verifier takes no computed offsets into the context. */
static __always_inline void read_peer4(struct bpf_sock_addr *ctx, struct sock_peer *peer)
{
	address_set_ipv4(&peer->address, ctx->user_ip4);
	peer->port = ctx->user_port;
	peer->protocol = ctx->protocol;
	peer->pad = 0;
}

static __always_inline void write_peer4(struct bpf_sock_addr *ctx, const struct sock_peer *peer)
{
	ctx->user_ip4 = peer->address.word[3];
	ctx->user_port = peer->port;
}

static __always_inline void read_peer6(struct bpf_sock_addr *ctx, struct sock_peer *peer)
{
	peer->address.word[0] = ctx->user_ip6[0];
	peer->address.word[1] = ctx->user_ip6[1];
	peer->address.word[2] = ctx->user_ip6[2];
	peer->address.word[3] = ctx->user_ip6[3];
	peer->port = ctx->user_port;
	peer->protocol = ctx->protocol;
	peer->pad = 0;
}

static __always_inline void write_peer6(struct bpf_sock_addr *ctx, const struct sock_peer *peer)
{
	ctx->user_ip6[0] = peer->address.word[0];
	ctx->user_ip6[1] = peer->address.word[1];
	ctx->user_ip6[2] = peer->address.word[2];
	ctx->user_ip6[3] = peer->address.word[3];
	ctx->user_port = peer->port;
}

static __always_inline int translate4(struct bpf_sock_addr *ctx, bool sticky)
{
	struct sock_peer peer;
	bool translated = false;

	read_peer4(ctx, &peer);
	int verdict = sock_translate(ctx, &peer, sticky, &translated);

	if (translated && address_is_ipv4(&peer.address))
		write_peer4(ctx, &peer);
	return verdict;
}

static __always_inline int translate6(struct bpf_sock_addr *ctx, bool sticky)
{
	struct sock_peer peer;
	bool translated = false;

	read_peer6(ctx, &peer);
	int verdict = sock_translate(ctx, &peer, sticky, &translated);

	if (translated)
		write_peer6(ctx, &peer);
	return verdict;
}

static __always_inline int restore4(struct bpf_sock_addr *ctx)
{
	struct sock_peer peer;

	read_peer4(ctx, &peer);
	if (sock_restore(ctx, &peer))
		write_peer4(ctx, &peer);
	return SOCK_ALLOW;
}

static __always_inline int restore6(struct bpf_sock_addr *ctx)
{
	struct sock_peer peer;

	read_peer6(ctx, &peer);
	if (sock_restore(ctx, &peer))
		write_peer6(ctx, &peer);
	return SOCK_ALLOW;
}

SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	return translate4(ctx, false);
}

SEC("cgroup/connect6")
int sock_connect6(struct bpf_sock_addr *ctx)
{
	return translate6(ctx, false);
}

SEC("cgroup/sendmsg4")
int sock_sendmsg4(struct bpf_sock_addr *ctx)
{
	return translate4(ctx, true);
}

SEC("cgroup/sendmsg6")
int sock_sendmsg6(struct bpf_sock_addr *ctx)
{
	return translate6(ctx, true);
}

SEC("cgroup/recvmsg4")
int sock_recvmsg4(struct bpf_sock_addr *ctx)
{
	return restore4(ctx);
}

SEC("cgroup/recvmsg6")
int sock_recvmsg6(struct bpf_sock_addr *ctx)
{
	return restore6(ctx);
}

SEC("cgroup/getpeername4")
int sock_getpeername4(struct bpf_sock_addr *ctx)
{
	return restore4(ctx);
}

SEC("cgroup/getpeername6")
int sock_getpeername6(struct bpf_sock_addr *ctx)
{
	return restore6(ctx);
}

/* A connected socket takes its row with it: else those of closed ones would fill the map. Rows of
 * unconnected ones stay until LRU needs their room, as the socket does not know them. All fields
 * are read first: merged branches would give the verifier a computed offset into the context. */
SEC("cgroup/sock_release")
int sock_release(struct bpf_sock *ctx)
{
	struct sock_nat_key key = {
		.port = ctx->dst_port,
		.protocol = ctx->protocol,
	};
	__u32 family = *(volatile __u32 *)&ctx->family;
	__u32 ipv4 = *(volatile __u32 *)&ctx->dst_ip4;

	if (!key.port)
		return SOCK_ALLOW;
	for (int i = 0; i < 4; i++)
		key.address.word[i] = *(volatile __u32 *)&ctx->dst_ip6[i];
	if (family == SOCK_IPV4)
		address_set_ipv4(&key.address, ipv4);
	key.cookie = bpf_get_socket_cookie(ctx);
	bpf_map_delete_elem(&sock_nat, &key);
	return SOCK_ALLOW;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
