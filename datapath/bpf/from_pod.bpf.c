// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc ingress of the host end of a pod's veth: all that the pod sends. */
#include "lib/deliver.h"
#include "lib/fragment.h"
#include "lib/refuse.h"
#include "lib/service_tc.h"
#include "lib/snat.h"

static __always_inline int refuse_pod(struct __sk_buff *ctx, struct packet *packet,
				      const struct endpoint *source, int reason)
{
	return refuse(ctx, packet, reason) ? deliver_to_pod(ctx, source) : TC_ACT_SHOT;
}

SEC("tc")
int from_pod(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_EGRESS);

	if (!packet)
		return TC_ACT_SHOT;
	int verdict = parse(ctx);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	if (verdict == PARSED_NOT_IP)
		return drop(ctx, packet, DROP_UNSUPPORTED_L2);
	if (address_is_link_scope(&packet->sender) || address_is_link_scope(&packet->flow.destination))
		return drop(ctx, packet, DROP_NOT_UNICAST);

	const struct endpoint *source = endpoint_find(&packet->sender);

	if (!source || source->ifindex != ctx->ifindex)
		return drop(ctx, packet, DROP_SPOOFED_SOURCE);
	verdict = fragment_resolve(packet);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	verdict = snat_reply(ctx, packet);
	if (verdict < 0)
		return drop(ctx, packet, verdict);

	struct ct_entry *entry = ct_find(packet);

	verdict = service_to_backend(ctx, packet, entry);
	if (verdict < 0)
		return refuse_pod(ctx, packet, source, verdict);
	entry = service_flow(packet, entry);
	verdict = ct_admit(ctx, packet, entry, false);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	verdict = packet->snat ? snat_masquerade(ctx, packet, entry && ct_is_closing(entry->flags)) :
				 service_from_backend(ctx, packet, entry);
	if (verdict < 0)
		return drop(ctx, packet, verdict);

	const struct endpoint *destination = endpoint_find(&packet->flow.destination);

	verdict = destination ? deliver_to_pod(ctx, destination) : deliver_away(ctx, packet);
	if (verdict < 0) {
		rewrite_as_sent(ctx, packet);
		return refuse_pod(ctx, packet, source, verdict);
	}
	count(ctx, DROP_NONE, DIR_EGRESS);
	return verdict;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
