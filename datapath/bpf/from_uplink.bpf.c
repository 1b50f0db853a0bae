// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc ingress of the uplink: replies to masqueraded pods, and native routing to pods. All that
 * is not for a pod is the host's. */
#include "lib/announce.h"
#include "lib/arrive.h"
#include "lib/blocked_tc.h"
#include "lib/snat.h"

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
	if (blocked_drops(ctx, packet))
		return TC_ACT_SHOT;
	int verdict = parse(ctx);
	int answer = announce_answer(ctx, packet);

	if (answer)
		return answer < 0 ? drop(ctx, packet, answer) : bpf_redirect(ctx->ifindex, 0);
	/* What we cannot read may be the host's; to_pod sees what is not. */
	if (verdict <= 0 || address_is_link_scope(&packet->flow.destination))
		return TC_ACT_OK;
	if (arrive_is_spoofed(packet))
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);

	int fragment = fragment_resolve(packet);

	if (masquerade && fragment == 0) {
		verdict = snat_reply(ctx, packet);
		if (verdict < 0)
			return drop(ctx, packet, verdict);
	}
	const struct endpoint *destination = endpoint_find(&packet->flow.destination);

	if (!destination)
		return arrive_is_stray(packet) ? drop(ctx, packet, DROP_NO_ENDPOINT) : TC_ACT_OK;
	if (fragment < 0)
		return drop(ctx, packet, fragment);
	if (bypasses_overlay(packet))
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);
	return arrive_at_pod(ctx, packet, destination);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
