// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* tc egress of the host end of a pod's veth: what reaches the pod through the host's stack.
 * What is redirected into the pod does not pass here. */
#include "lib/fragment.h"
#include "lib/service_tc.h"

/* A packet made on this host has no ingress interface, whatever address it carries. */
static __always_inline bool is_own_node(const struct __sk_buff *ctx, const struct packet *packet)
{
	return !ctx->ingress_ifindex || is_local_host(&packet->sender);
}

SEC("tc")
int to_pod(struct __sk_buff *ctx)
{
	struct packet *packet = packet_new(DIR_INGRESS);

	if (!packet)
		return TC_ACT_SHOT;
	int verdict = parse(ctx);

	if (verdict < 0)
		return drop(ctx, packet, verdict);
	if (verdict == PARSED_NOT_IP)
		return TC_ACT_OK;

	bool own_node = is_own_node(ctx, packet);

	if (own_node && address_is_link_scope(&packet->flow.destination))
		return TC_ACT_OK;
	verdict = fragment_resolve(packet);
	if (verdict < 0)
		return drop(ctx, packet, verdict);

	struct ct_entry *entry = ct_find(packet);

	verdict = ct_admit(ctx, packet, entry, own_node);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	verdict = service_from_backend(ctx, packet, entry);
	if (verdict < 0)
		return drop(ctx, packet, verdict);
	count(ctx, DROP_NONE, DIR_INGRESS);
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
