// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc egress of the uplink: masquerading of what pods send out of the cluster, and services of
 * the host's own processes. */
#include "lib/host.h"

static __always_inline int masquerade_pod(struct __sk_buff *ctx, struct packet *packet)
{
	if (!snat_has_address(packet) || !snat_leaves_cluster(&packet->flow.destination))
		return TC_ACT_OK;
	int verdict = fragment_resolve(packet);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	/* Who asked the pod by its own address wants the answer from it. */
	const struct ct_entry *entry = ct_find(packet);

	if (entry && !ct_from_origin(packet, entry->flags))
		return TC_ACT_OK;
	verdict = snat_masquerade(ctx, packet, entry && ct_is_closing(entry->flags));
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	return TC_ACT_OK;
}

SEC("tc")
int to_uplink(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_EGRESS);

	if (!packet)
		return TC_ACT_OK;
	int verdict = parse(ctx);

	/* A pod's packet has been read before: this one is the host's. */
	if (verdict <= 0)
		return TC_ACT_OK;
	if (endpoint_find(&packet->sender))
		return masquerade ? masquerade_pod(ctx, packet) : TC_ACT_OK;
	return host_made(ctx) ? host_sends(ctx, packet) : TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
