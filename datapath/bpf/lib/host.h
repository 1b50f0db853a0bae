/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Packets that this node's own processes send to other machines: answers of sockets that are
 * backends, and what asks for a service past the socket hooks (raw sockets, SCTP). */
#pragma once

#include "lib/frontend.h"

/* What is forwarded, or has been redirected here, came in by some device. */
static __always_inline bool host_made(const struct __sk_buff *ctx)
{
	return !ctx->ingress_ifindex;
}

/* The host's sockets know backends' addresses only. 0, 1 if this was an answer of one, or a drop
 * reason. */
static __always_inline int host_answers(struct __sk_buff *ctx, struct packet *packet)
{
	if (!runtime_has(RUNTIME_HOST_BACKENDS))
		return 0;
	int error = fragment_resolve(packet);

	if (error)
		return error;
	struct ct_entry *entry = ct_find(packet);

	if (!entry || !(entry->flags & CT_REV_NAT) || ct_from_origin(packet, entry->flags))
		return 0;
	if (!packet->quoted_l3_offset)
		packet->refreshed = ct_refresh(packet, entry);
	error = service_from_backend(ctx, packet, entry);
	return error ? error : 1;
}

/* To a backend, with a port of its own on the node's address: by that the answer is told from
 * all else that the host receives. */
static __always_inline int host_to_backend(struct __sk_buff *ctx, struct packet *packet)
{
	struct ct_entry *entry = ct_find(packet);
	int verdict = ct_admit(ctx, packet, entry, true);

	if (verdict < 0)
		return verdict;
	verdict = snat_masquerade(ctx, packet, entry && ct_is_closing(entry->flags));
	if (verdict < 0)
		return verdict;
	const struct endpoint *destination = endpoint_find(&packet->flow.destination);

	if (!destination)
		return is_local_host(&packet->flow.destination) ? -DROP_NO_ROUTE :
								  frontend_pass_on(ctx, packet);
	if (bpf_skb_store_bytes(ctx, 0, destination->mac, 2 * ETH_ALEN, 0))
		return -DROP_REWRITE;
	return bpf_redirect(destination->ifindex, 0);
}

/* Tells the host's own process. */
static __always_inline int host_refuse(struct __sk_buff *ctx, struct packet *packet, int reason)
{
	return refuse(ctx, packet, reason) ? frontend_answer(ctx, BPF_F_INGRESS) : TC_ACT_SHOT;
}

static __always_inline int host_asks(struct __sk_buff *ctx, struct packet *packet)
{
	const struct tuple *flow = &packet->flow;

	if (fragment_resolve(packet) ||
	    !service_find(&flow->destination, flow->destination_port, flow->l4_proto,
			  SCOPE_INTERNAL))
		return TC_ACT_OK;
	int verdict = service_to_backend(ctx, packet, ct_find(packet));

	if (!verdict)
		verdict = packet->service ? host_to_backend(ctx, packet) : TC_ACT_OK;
	return verdict < 0 ? host_refuse(ctx, packet, verdict) : verdict;
}

static __always_inline int host_sends(struct __sk_buff *ctx, struct packet *packet)
{
	packet->place = PLACE_HOST;
	int verdict = host_answers(ctx, packet);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	return verdict ? TC_ACT_OK : host_asks(ctx, packet);
}
