// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc egress of the overlay device: says to which node, for pods and for the host alike. */
#include "lib/host.h"
#include "lib/overlay.h"

SEC("tc")
int to_overlay(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_EGRESS);

	if (!packet)
		return TC_ACT_SHOT;
	int verdict = parse(ctx);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	if (verdict == PARSED_NOT_IP)
		return drop(ctx, packet, DROP_UNSUPPORTED_L2);
	if (address_is_link_scope(&packet->flow.destination))
		return drop(ctx, packet, DROP_NOT_UNICAST);

	if (host_made(ctx)) {
		verdict = host_answers(ctx, packet);
		if (verdict < 0)
			return drop(ctx, packet, verdict);
	}
	if (ctx->mark == MARK_CUT_FIRST) {
		verdict = frontend_after_cut(ctx, packet);
		if (verdict < 0)
			return drop(ctx, packet, verdict);
	}
	const struct route *route = route_find(&packet->flow.destination);

	if (!route || !(route->flags & ROUTE_TUNNEL))
		return drop(ctx, packet, DROP_NO_ROUTE);
	verdict = overlay_send_to(ctx, packet, &route->node);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
