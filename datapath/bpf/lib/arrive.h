/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What uplink and overlay share: a packet from another node or from outside, for a pod. */
#pragma once

#include "lib/deliver.h"
#include "lib/fragment.h"
#include "lib/service_tc.h"

/* This node and its pods send nothing from outside. */
static __always_inline bool arrive_is_spoofed(const struct packet *packet)
{
	return is_local_host(&packet->sender) || endpoint_find(&packet->sender);
}

/* An address of this node's pod CIDR that is nobody's. The host has no route for it, and would
 * send it back to where it came from. */
static __always_inline bool arrive_is_stray(const struct packet *packet)
{
	const struct route *route = route_find(&packet->flow.destination);

	return route && (route->flags & ROUTE_LOCAL) && !is_local_host(&packet->flow.destination);
}

static __always_inline int arrive_at_pod(struct __sk_buff *ctx, struct packet *packet,
					 const struct endpoint *destination)
{
	int verdict = !packet->service && dsr_may_be_there(packet) ? dsr_take(ctx, packet) : 0;

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	struct ct_entry *entry = ct_find(packet);

	verdict = ct_admit(ctx, packet, entry, false);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	verdict = service_from_backend(ctx, packet, entry);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	verdict = deliver_to_pod(ctx, destination);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	count(ctx, DROP_NONE, DIR_INGRESS);
	return verdict;
}
