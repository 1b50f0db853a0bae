// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc egress of the uplink: masquerading of what pods send out of the cluster. */
#include "lib/ct.h"
#include "lib/drop.h"
#include "lib/fragment.h"
#include "lib/snat.h"

SEC("tc")
int to_uplink(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_EGRESS);

	if (!packet || !masquerade)
		return TC_ACT_OK;
	int verdict = parse(ctx);

	/* A pod's packet has been read before: this one is the host's. */
	if (verdict <= 0 || !endpoint_find(&packet->sender))
		return TC_ACT_OK;
	if (!snat_leaves_cluster(&packet->flow.destination))
		return TC_ACT_OK;
	verdict = fragment_resolve(packet);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	/* Who asked the pod by its own address wants the answer from it. */
	const struct ct_entry *entry = ct_find(packet);

	if (entry && !ct_from_origin(packet, entry->flags))
		return TC_ACT_OK;
	verdict = snat_masquerade(ctx, packet);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
