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

/* From an address that is never routed, so nobody's that a backend could answer. The host's
 * neighbours may have one, and routers that report errors. */
static __always_inline bool arrive_is_unrouted(const struct packet *packet)
{
	return !packet->quoted_l3_offset && address_is_link_scope(&packet->sender);
}

/* What asks for a service may take over the flow that the pod itself opened between the same ports
 * (ct_own()), but not one that policy denies by now. 0 or a drop reason. */
static __always_inline int arrive_takes_over(struct __sk_buff *ctx, const struct packet *packet,
					     const struct ct_entry *entry)
{
	if (!packet->service || packet->quoted_l3_offset || !entry ||
	    ct_from_origin(packet, entry->flags) || (entry->flags & CT_UNJUDGED) ||
	    entry->generation == policy_generation())
		return 0;
	int verdict = judge(ctx, true, false);

	return verdict < 0 ? verdict : 0;
}

static __always_inline int arrive_at_pod(struct __sk_buff *ctx, struct packet *packet,
					 const struct endpoint *destination)
{
	int verdict = !packet->service && dsr_may_be_there(packet) ? dsr_take(ctx, packet) : 0;

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	struct ct_entry *entry = ct_find(packet);

	verdict = arrive_takes_over(ctx, packet, entry);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
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
