/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Metrics, events, and the one way to drop a packet. */
#pragma once

#include <linux/pkt_cls.h>

#include "lib/packet.h"
#include "lib/runtime.h"

/* PERCPU_HASH, no eviction; holds every (reason, direction) there is, so it cannot fill up.
 * 24 B an entry and CPU. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 256);
	__type(key, struct metric_key);
	__type(value, struct metric);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} metrics SEC(".maps");

/* RINGBUF of 1 MiB. Full: the newest events are lost, packets are not affected. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events SEC(".maps");

/* Ring buffers have no value type: this one only makes BTF carry the record and the enums. */
const volatile struct event event_layout = {};
const volatile enum drop_reason drop_reason_layout = DROP_NONE;
const volatile enum direction direction_layout = DIR_EGRESS;
const volatile enum class_number class_number_layout = CLASS_ANY;
const volatile enum verdict verdict_layout = VERDICT_DENY;
const volatile enum policy_level policy_level_layout = LEVEL_PORT_BITS_MAX;
const volatile enum policy_order policy_order_layout = ORDER_NETWORK_POLICY;
const volatile enum isolation_flag isolation_flag_layout = ISOLATION_ORDERED;
const volatile enum denial_flag denial_flag_layout = DENIAL_AUDITED;
const volatile enum address_flag address_flag_layout = ADDRESS_LOCAL_HOST;
const volatile enum route_flag route_flag_layout = ROUTE_POD_CIDR;
const volatile enum service_scope service_scope_layout = SCOPE_INTERNAL;
const volatile enum service_flag service_flag_layout = SERVICE_LOCAL;
const volatile enum ct_flag ct_flag_layout = CT_ORIGIN_IS_LOW;
const volatile enum snat_kind snat_kind_layout = SNAT_FORWARD;
const volatile enum snat_state snat_state_layout = SNAT_REPLIED;
const volatile enum runtime_feature runtime_feature_layout = RUNTIME_ANNOUNCES;
const volatile enum event_kind event_kind_layout = EVENT_DROP;

static __always_inline void count_bytes(__u32 length, __u32 reason, __u32 direction)
{
	struct metric_key key = { .reason = reason, .direction = direction };
	struct metric *metric = bpf_map_lookup_elem(&metrics, &key);

	if (metric) {
		metric->packets++;
		metric->bytes += length;
		return;
	}
	struct metric first = { .packets = 1, .bytes = length };

	bpf_map_update_elem(&metrics, &key, &first, BPF_ANY);
}

static __always_inline void count(const struct __sk_buff *ctx, __u32 reason, __u32 direction)
{
	count_bytes(ctx->len, reason, direction);
}

__subprogram int notify_from(__u32 ifindex, __u32 length, const struct packet *packet,
			     __u32 reason, __u8 kind)
{
	struct event *event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);

	if (!event)
		return 0;
	event->time_ns = bpf_ktime_get_ns();
	event->source = packet->flow.source;
	event->destination = packet->flow.destination;
	event->source_port = packet->flow.source_port;
	event->destination_port = packet->flow.destination_port;
	event->protocol = packet->flow.l4_proto;
	event->kind = kind;
	event->direction = packet->direction;
	event->tcp_flags = packet->tcp_flags;
	event->reason = reason;
	event->source_class = packet->judgement.source_class;
	event->destination_class = packet->judgement.destination_class;
	event->rule = packet->judgement.rule;
	event->rule_set = packet->judgement.rule_set;
	event->ifindex = ifindex;
	event->length = length;
	__builtin_memset(event->pad, 0, sizeof(event->pad));
	bpf_ringbuf_submit(event, 0);
	return 0;
}

static __always_inline int notify(const struct __sk_buff *ctx, const struct packet *packet,
				  __u32 reason, __u8 kind)
{
	return notify_from(ctx->ifindex, ctx->len, packet, reason, kind);
}

/* The only way out for a packet that goes no further. @reason is positive or, as the steps
 * return it, negative. What every pod's kernel sends by itself is counted without an event. */
static __always_inline int drop(struct __sk_buff *ctx, const struct packet *packet, int reason)
{
	__u32 number = reason < 0 ? -reason : reason;

	count(ctx, number, packet->direction);
	if (number != DROP_NOT_UNICAST && number != DROP_UNSUPPORTED_L2 &&
	    event_is_wanted(EVENT_DROP))
		notify(ctx, packet, number, EVENT_DROP);
	return TC_ACT_SHOT;
}
