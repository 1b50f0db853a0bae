/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services asked for by uplink or overlay: this node passes on what is for a backend elsewhere,
 * under its own address, and what such a backend answers. */
#pragma once

#include "lib/arrive.h"
#include "lib/refuse.h"
#include "lib/snat.h"

/* On packets that the host's stack cuts up before they get the node's address as their source:
 * what comes in with that, it would take for a lie. */
#define MARK_CUT_FIRST 0x57490000

static __always_inline bool frontend_exists(const struct packet *packet)
{
	const struct tuple *flow = &packet->flow;

	return service_find(&flow->destination, flow->destination_port, flow->l4_proto,
			    SCOPE_INTERNAL);
}

/* A connection outlives its service, and an error comes from anybody. */
static __always_inline bool frontend_may_be_gone(const struct packet *packet)
{
	return packet->quoted_l3_offset ||
	       (is_connection(packet) && packet->fragment != FRAGMENT_LATER &&
		!(packet->tcp_flags & TCP_SYN));
}

/* Whether the packet can be for a service. Of most of the host's other packets one lookup says
 * that they are its own. */
static __always_inline bool frontend_is_asked(const struct packet *packet)
{
	return frontend_exists(packet) || frontend_may_be_gone(packet);
}

/* To a node by the underlay, where that node's own packets come from. */
static __always_inline int frontend_pass_on(struct __sk_buff *ctx, struct packet *packet)
{
	const struct route *route = route_find(&packet->flow.destination);

	if (!tunnel || !route || !(route->flags & ROUTE_TUNNEL) ||
	    is_node(&packet->flow.destination))
		return deliver_by_fib(ctx, packet);

	int verdict = deliver_to_overlay(ctx, packet);

	if (verdict < 0)
		return verdict;
	int error = decrement_hop_limit(ctx, packet);

	return error ? error : verdict;
}

/* Whether the packet is too big for the overlay and may be cut up, which only the stack can. */
static __always_inline bool frontend_must_be_cut(const struct __sk_buff *ctx,
						 const struct packet *packet)
{
	if (!tunnel || packet->dont_fragment || wire_length(ctx, packet) <= overlay_mtu ||
	    is_node(&packet->flow.destination))
		return false;
	const struct route *route = route_find(&packet->flow.destination);

	return route && (route->flags & ROUTE_TUNNEL);
}

/* Through the stack, and then frontend_after_cut(). */
static __always_inline int frontend_cut(struct __sk_buff *ctx)
{
	ctx->mark = MARK_CUT_FIRST;
	return TC_ACT_OK;
}

/* On the way into the overlay, each part. 0 or a drop reason. */
static __always_inline int frontend_after_cut(struct __sk_buff *ctx, struct packet *packet)
{
	int error = fragment_resolve(packet);

	ctx->mark = 0;
	if (error)
		return error;
	const struct ct_entry *entry = ct_find(packet);

	return snat_masquerade(ctx, packet, entry && ct_is_closing(entry->flags));
}

/* To a backend whose node answers: what this node would remember, that one does. */
static __always_inline int frontend_hand_over(struct __sk_buff *ctx, struct packet *packet)
{
	packet->extra = dsr_bytes(packet);

	int verdict = frontend_must_be_cut(ctx, packet) ? TC_ACT_OK :
							  frontend_pass_on(ctx, packet);

	if (verdict < 0 || !packet->extra)
		return verdict;
	int error = dsr_put(ctx, packet);

	return error ? error : verdict;
}

/* To a backend that is no pod of this node. No policy here is about it. */
static __always_inline int frontend_to_backend(struct __sk_buff *ctx, struct packet *packet)
{
	if (packet->dsr)
		return frontend_hand_over(ctx, packet);

	struct ct_entry *entry = ct_find(packet);
	int verdict = ct_admit(ctx, packet, entry, true);

	if (verdict < 0)
		return verdict;
	if (!packet->snat)
		return is_local_host(&packet->flow.destination) ? TC_ACT_OK : -DROP_NO_ENDPOINT;
	/* Its other parts may be cut up, and meet to_overlay by this address. */
	if (tunnel && packet->fragment == FRAGMENT_FIRST)
		fragment_track(packet);
	if (frontend_must_be_cut(ctx, packet))
		return frontend_cut(ctx);
	verdict = snat_masquerade(ctx, packet, entry && ct_is_closing(entry->flags));
	return verdict ? verdict : frontend_pass_on(ctx, packet);
}

/* What a backend elsewhere answered, or is told about its answers. */
static __always_inline int frontend_to_client(struct __sk_buff *ctx, struct packet *packet)
{
	struct ct_entry *entry = ct_find(packet);

	if (!entry)
		return -DROP_INVALID_CT;
	/* Of a masqueraded pod that is gone. */
	if (!(entry->flags & CT_REV_NAT))
		return -DROP_NO_ENDPOINT;
	int verdict = ct_admit(ctx, packet, entry, true);

	if (verdict < 0)
		return verdict;
	verdict = service_from_backend(ctx, packet, entry);
	if (verdict < 0)
		return verdict;
	return is_local_host(&packet->flow.destination) ? TC_ACT_OK : frontend_pass_on(ctx, packet);
}

/* Back to where the packet came from, which it has been made the answer for. */
static __always_inline int frontend_answer(struct __sk_buff *ctx, __u64 redirect_flags)
{
	struct ethhdr ethernet;
	__u8 mac[ETH_ALEN];

	if (bpf_skb_load_bytes(ctx, 0, &ethernet, sizeof(ethernet)))
		return TC_ACT_SHOT;
	__builtin_memcpy(mac, ethernet.h_dest, ETH_ALEN);
	__builtin_memcpy(ethernet.h_dest, ethernet.h_source, ETH_ALEN);
	__builtin_memcpy(ethernet.h_source, mac, ETH_ALEN);
	if (bpf_skb_store_bytes(ctx, 0, &ethernet, sizeof(ethernet), 0))
		return TC_ACT_SHOT;
	return bpf_redirect(ctx->ifindex, redirect_flags);
}

static __always_inline int frontend_refuse(struct __sk_buff *ctx, struct packet *packet,
					   int reason)
{
	return refuse(ctx, packet, reason) ? frontend_answer(ctx, 0) : TC_ACT_SHOT;
}

/* With an overlay, pods of other nodes come through it alone. */
static __always_inline bool bypasses_overlay(const struct packet *packet)
{
	if (!tunnel || packet->place != PLACE_UPLINK)
		return false;
	const struct route *route = route_find(&packet->sender);

	return route && (route->flags & ROUTE_POD_CIDR);
}

static __always_inline bool frontend_is_lied_to(const struct packet *packet)
{
	return bypasses_overlay(packet) || arrive_is_unrouted(packet);
}

/* Whether a pod elsewhere may have answered past the overlay: what is too big for that and may be
 * cut up its node's stack sends, which knows this node's address by the underlay. */
static __always_inline bool frontend_was_too_big(const struct __sk_buff *ctx,
						 const struct packet *packet)
{
	return !packet->dont_fragment && (packet->fragment != FRAGMENT_NONE ||
					  wire_length(ctx, packet) > overlay_mtu);
}

/* Sends what asks for a service to a backend: packet->service is set then. 0 or a drop reason. */
static __always_inline int frontend_ask(struct __sk_buff *ctx, struct packet *packet)
{
	bool exists = frontend_exists(packet);

	if (!exists && !frontend_may_be_gone(packet))
		return 0;
	struct ct_entry *entry = ct_find(packet);

	if (!exists && !(entry && service_is_asked(packet, entry)))
		return 0;
	/* Before anything is chosen or said in the name of whom it is not from. */
	return frontend_is_lied_to(packet) ? -DROP_SPOOFED_SOURCE :
					     service_to_backend(ctx, packet, entry);
}

/* What is for no pod of this node: to the backend, or back to the client. */
static __always_inline int frontend_forward(struct __sk_buff *ctx, struct packet *packet,
					    bool returns)
{
	int verdict = returns ? frontend_to_client(ctx, packet) : frontend_to_backend(ctx, packet);

	if (verdict < 0)
		return frontend_refuse(ctx, packet, verdict);
	count(ctx, DROP_NONE, DIR_INGRESS);
	return verdict;
}

/* Of who reached the host's own socket by a VIP before, and by its own address now: the answers
 * are not to come from the VIP any more (as ct_own() says of pods). */
static __always_inline void frontend_forget_vip(struct packet *packet)
{
	if (!runtime_has(RUNTIME_HOST_BACKENDS) || !ct_may_open(packet))
		return;
	ct_make_key(packet);

	const struct ct_entry *entry = bpf_map_lookup_elem(&ct, &packet->ct_key);

	if (entry && ct_is_asked_past_vip(packet, entry))
		bpf_map_delete_elem(&ct, &packet->ct_key);
}

/* What came in: for a pod, a service, a client of one, or the host, which is TC_ACT_OK. */
static __always_inline int frontend_receive(struct __sk_buff *ctx, struct packet *packet)
{
	int fragment = fragment_resolve(packet);
	int returns = fragment == 0 ? snat_reply(ctx, packet) : 0;

	if (returns < 0)
		return drop(ctx, packet, returns);
	const struct endpoint *destination = endpoint_find(&packet->flow.destination);

	if (!destination && !returns && fragment == 0) {
		int verdict = frontend_ask(ctx, packet);

		if (verdict < 0)
			return frontend_refuse(ctx, packet, verdict);
		destination = endpoint_find(&packet->flow.destination);
	}
	if (destination && !packet->service && frontend_is_lied_to(packet))
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);
	if (returns && bypasses_overlay(packet) && !frontend_was_too_big(ctx, packet))
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);
	if (destination)
		return fragment < 0 ? drop(ctx, packet, fragment) :
				      arrive_at_pod(ctx, packet, destination);
	if (!returns && !packet->service) {
		if (arrive_is_stray(packet))
			return drop(ctx, packet, DROP_NO_ENDPOINT);
		if (dsr_is_forged(ctx, packet))
			return drop(ctx, packet, DROP_SPOOFED_SOURCE);
		if (!fragment)
			frontend_forget_vip(packet);
		return TC_ACT_OK;
	}
	return frontend_forward(ctx, packet, returns);
}
