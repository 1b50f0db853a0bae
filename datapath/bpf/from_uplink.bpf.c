// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc ingress of the uplink: services for clients outside, replies to what left with this node's
 * address, and native routing to pods. All else is the host's. */
#include "lib/announce.h"
#include "lib/blocked_tc.h"
#include "lib/frontend.h"
#include "lib/overlay.h"

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
	return frontend_receive(ctx, packet);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
