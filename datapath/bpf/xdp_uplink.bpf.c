// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* XDP of the uplink: the blocklist, and with native routing NodePort and LoadBalancer with
 * backends on other nodes. What it cannot do wholly is tc's, unchanged. */
#include "lib/blocked.h"
#include "lib/frame_forward.h"

static __always_inline int drop_blocked(const struct xdp_md *ctx, const struct frame *frame,
					const struct ip_addr *source, const struct blocked *by)
{
	__u32 length = ctx->data_end - ctx->data;
	struct packet *packet;

	if (!blocked_count(length))
		return XDP_DROP;
	packet = packet_new(DIR_INGRESS);
	if (!packet)
		return XDP_DROP;
	frame_parse(frame, packet);
	packet->flow.source = *source;	/* also of what could not be read further */
	packet->judgement.rule = by->rule;
	notify_from(ctx->ingress_ifindex, length, packet, DROP_BLOCKED, EVENT_DROP);
	return XDP_DROP;
}

SEC("xdp")
int xdp_uplink(struct xdp_md *ctx)
{
	struct frame frame = frame_of(ctx);
	struct ip_addr source;
	int tags = frame_ethernet(&frame);

	if (tags < 0 || !frame_source(&frame, &source))
		return XDP_PASS;
	const struct blocked *by = blocked_find(&source);

	if (by)
		return drop_blocked(ctx, &frame, &source, by);
	/* The overlay's frames get their outer headers in tc. */
	if (!xdp_services || tunnel || tags)
		return XDP_PASS;
	struct packet *packet = packet_new(DIR_INGRESS);

	if (!packet)
		return XDP_PASS;
	packet->place = PLACE_UPLINK;
	return frame_parse(&frame, packet) == PARSED_IP ? forward(ctx, packet) : XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
