// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc ingress of the uplink: services for clients outside, replies to what left with this node's
 * address, and native routing to pods. All else is the host's. */
#include "lib/announce.h"
#include "lib/blocked_tc.h"
#include "lib/frontend.h"
#include "lib/overlay.h"

/* With an overlay, pods of other nodes come through it alone. */
static __always_inline bool bypasses_overlay(const struct packet *packet)
{
	const struct route *route;

	if (!tunnel)
		return false;
	route = route_find(&packet->sender);
	return route && (route->flags & ROUTE_POD_CIDR);
}

SEC("tc")
int from_uplink(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_INGRESS);

	if (!packet)
		return TC_ACT_SHOT;
	packet->place = PLACE_UPLINK;
	if (blocked_drops(ctx, packet))
		return TC_ACT_SHOT;
	int verdict = parse(ctx);
	int answer = announce_answer(ctx, packet);

	if (answer)
		return answer < 0 ? drop(ctx, packet, answer) : bpf_redirect(ctx->ifindex, 0);
	/* What we cannot read may be the host's; to_pod sees what is not. */
	if (verdict <= 0 || address_is_link_scope(&packet->flow.destination) ||
	    overlay_is_outer(packet))
		return TC_ACT_OK;
	if (arrive_is_spoofed(packet))
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);

	int fragment = fragment_resolve(packet);
	int returns = fragment == 0 ? snat_reply(ctx, packet) : 0;

	if (returns < 0)
		return drop(ctx, packet, returns);
	const struct endpoint *destination = endpoint_find(&packet->flow.destination);

	if (!destination && !returns && fragment == 0) {
		verdict = frontend_ask(ctx, packet);
		if (verdict < 0)
			return frontend_refuse(ctx, packet, verdict);
		destination = endpoint_find(&packet->flow.destination);
	}
	if ((destination || packet->service) && bypasses_overlay(packet))
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);
	if (destination)
		return fragment < 0 ? drop(ctx, packet, fragment) :
				      arrive_at_pod(ctx, packet, destination);
	if (!returns && !packet->service)
		return arrive_is_stray(packet) ? drop(ctx, packet, DROP_NO_ENDPOINT) : TC_ACT_OK;
	return frontend_forward(ctx, packet, returns);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
