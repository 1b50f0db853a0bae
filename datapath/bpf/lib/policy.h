/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* NetworkPolicy: is a flow allowed, seen from the side that opened it? */
#pragma once

#include "lib/drop.h"
#include "lib/where.h"

/* HASH without preallocation, no eviction: 72 B an entry, 22 MB full (4 MB empty). Full: rows
 * that do not fit are left out, so what they would allow is denied; the agent names the policy. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 262144);
	__type(key, struct policy_key);
	__type(value, struct policy_verdict);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} policy SEC(".maps");

enum judged {
	JUDGED_ALLOWED = 0,
	JUDGED_OWN_NODE = 1,		/* between a pod and its node: never judged */
};

static __always_inline bool policy_hit(const struct policy_key *key, struct judgement *judgement)
{
	const struct policy_verdict *hit = bpf_map_lookup_elem(&policy, key);

	if (!hit || hit->verdict != VERDICT_ALLOW)
		return false;
	judgement->rule = hit->rule;
	return true;
}

/* Any rule that matches allows; there is no order among them. */
__subprogram bool policy_allows(const struct isolation *isolation, __u32 peer,
				     const struct tuple *flow, struct judgement *judgement)
{
	__u16 port = bpf_ntohs(flow->destination_port);
	__u32 levels = isolation->levels;

	for (__u32 level = 0; level < LEVEL_COUNT; level++) {
		if (!(levels & (1u << level)))
			continue;
		struct policy_key key = {
			.rule_set = isolation->rule_set,
			.peer = peer,
			.port_bits = level,
		};

		if (level != LEVEL_ANY_PROTOCOL) {
			key.protocol = flow->l4_proto;
			key.port = port & ~(0xffffu >> level);
		}
		if (peer != CLASS_UNKNOWN && policy_hit(&key, judgement))
			return true;
		key.peer = CLASS_ANY;
		if (policy_hit(&key, judgement))
			return true;
	}
	return false;
}

/* Judges the current packet's flow; @reversed when the packet's destination opened it. Both ends are
 * judged if they are here. enum judged, or a drop reason. */
__verified_once int judge(bool reversed)
{
	struct packet *packet = packet_current();

	if (!packet)
		return -DROP_MALFORMED;
	struct judgement *judgement = &packet->judgement;
	struct tuple opened = packet->flow;

	if (reversed)
		tuple_reverse(&packet->flow, &opened);

	const struct endpoint *opener = endpoint_find(&opened.source);
	const struct endpoint *target = endpoint_find(&opened.destination);
	__u32 opener_class = opener ? opener->class : class_of(&opened.source);
	__u32 target_class = target ? target->class : class_of(&opened.destination);

	judgement->source_class = reversed ? target_class : opener_class;
	judgement->destination_class = reversed ? opener_class : target_class;
	judgement->rule = 0;
	judgement->rule_set = 0;
	if (opener_class == CLASS_HOST || target_class == CLASS_HOST)
		return JUDGED_OWN_NODE;
	/* A pod always reaches itself. */
	if (opener && target && opener->ifindex == target->ifindex)
		return JUDGED_ALLOWED;

	if (opener && opener->egress.rule_set) {
		judgement->rule_set = opener->egress.rule_set;
		if (!policy_allows(&opener->egress, target_class, &opened, judgement)) {
			packet->direction = DIR_EGRESS;
			return target_class == CLASS_UNKNOWN ? -DROP_UNKNOWN_PEER :
							       -DROP_POLICY_EGRESS;
		}
	}
	if (target && target->ingress.rule_set) {
		judgement->rule_set = target->ingress.rule_set;
		judgement->rule = 0;
		if (!policy_allows(&target->ingress, opener_class, &opened, judgement)) {
			packet->direction = DIR_INGRESS;
			return opener_class == CLASS_UNKNOWN ? -DROP_UNKNOWN_PEER :
							       -DROP_POLICY_INGRESS;
		}
	}
	return JUDGED_ALLOWED;
}
