// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc ingress of the overlay device: what other nodes sent, decapsulated. */
#include "lib/frontend.h"
#include "lib/overlay.h"

/* Only nodes send here, each only what is its own: its pods and its addresses. */
static __always_inline int check_sender(struct __sk_buff *ctx, const struct packet *packet)
{
	struct ip_addr node = {};
	int error = overlay_sender(ctx, &node);

	if (error)
		return error;
	const struct route *route = route_find(&packet->sender);

	if (arrive_is_spoofed(packet) || !is_node(&node) || is_local_host(&node))
		return -DROP_SPOOFED_SOURCE;
	if (route && (route->flags & ROUTE_TUNNEL) && !address_equal(&route->node, &node))
		return -DROP_SPOOFED_SOURCE;
	return 0;
}

/* The device resolves no neighbours: what it decapsulates counts as another host's. */
static __always_inline int pass_up(struct __sk_buff *ctx)
{
	bpf_skb_change_type(ctx, 0);
	return TC_ACT_OK;
}

SEC("tc")
int from_overlay(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_INGRESS);

	if (!packet)
		return TC_ACT_SHOT;
	packet->place = PLACE_OVERLAY;
	int verdict = parse(ctx);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	if (verdict == PARSED_NOT_IP)
		return drop(ctx, packet, DROP_UNSUPPORTED_L2);
	verdict = check_sender(ctx, packet);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	verdict = frontend_receive(ctx, packet);
	return verdict == TC_ACT_OK ? pass_up(ctx) : verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
