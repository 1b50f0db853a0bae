/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* NetworkPolicy and ClusterNetworkPolicy: is a flow allowed, seen from the side that opened it? */
#pragma once

#include "lib/denials.h"
#include "lib/where.h"

/* HASH without preallocation, no eviction: 72 B an entry, 22 MB full (4 MB empty). Full: rows
 * that do not fit are left out, so what they would allow is denied; the agent names the policy.
 * Rule sets of which a row that denies is left out get ISOLATION_SHUT. */
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
	JUDGED_OWN_NODE = 1,		/* opened by this node: never judged */
	JUDGED_AUDITED = 2,		/* denied, and let through */
};

/* Above every policy_verdict.order. */
#define ORDER_NONE 0x10000

/* What a key needs of a flow, in one number. */
static __always_inline __u32 policy_l4(const struct tuple *flow)
{
	return (__u32)bpf_ntohs(flow->destination_port) << 8 | flow->l4_proto;
}

static __always_inline struct policy_key policy_key_at(__u32 rule_set, __u32 peer, __u32 l4,
						       __u32 level)
{
	struct policy_key key = {
		.rule_set = rule_set,
		.peer = peer,
		.port_bits = level,
	};

	if (level != LEVEL_ANY_PROTOCOL) {
		key.protocol = l4;
		key.port = (l4 >> 8) & ~(0xffffu >> level);
	}
	return key;
}

/* Beside the number of a rule that allows. */
#define POLICY_ALLOWS (1ull << 32)

static __always_inline __u64 policy_hit(const struct policy_key *key)
{
	const struct policy_verdict *hit = bpf_map_lookup_elem(&policy, key);

	return hit && hit->verdict == VERDICT_ALLOW ? POLICY_ALLOWS | hit->rule : 0;
}

/* Any rule that matches allows; there is no order among them. Its number and POLICY_ALLOWS, or 0.
 * @l4: as policy_l4() gives it. */
__verified_once __u64 policy_any(__u32 rule_set, __u32 levels, __u32 peer, __u32 l4)
{
	for (__u32 level = 0; level < LEVEL_COUNT; level++) {
		if (!(levels & (1u << level)))
			continue;
		struct policy_key key = policy_key_at(rule_set, peer, l4, level);
		__u64 hit = peer != CLASS_UNKNOWN ? policy_hit(&key) : 0;

		if (hit)
			return hit;
		key.peer = CLASS_ANY;
		hit = policy_hit(&key);
		if (hit)
			return hit;
	}
	return 0;
}

static __always_inline void policy_compare(const struct policy_key *key,
					   struct judgement *judgement)
{
	const struct policy_verdict *hit = bpf_map_lookup_elem(&policy, key);

	if (!hit || hit->order >= judgement->order)
		return;
	judgement->order = hit->order;
	judgement->verdict = hit->verdict;
	judgement->rule = hit->rule;
}

/* The verdict of the first rule that matches, in the rows with @tier (LEVEL_ADMIN or 0) in their
 * keys; VERDICT_PASS: none does. What it compares with lies in the packet and not on the stack,
 * where the verifier would walk every order of hits. */
__verified_once int policy_first(__u32 rule_set, __u32 levels, __u32 peer, __u32 l4, __u32 tier)
{
	struct packet *packet = packet_current();

	if (!packet)
		return VERDICT_DENY;
	struct judgement *judgement = &packet->judgement;

	judgement->order = ORDER_NONE;
	judgement->verdict = VERDICT_PASS;
	judgement->rule = 0;
	for (__u32 level = 0; level < LEVEL_COUNT; level++) {
		if (!(levels & (1u << level)))
			continue;
		struct policy_key key = policy_key_at(rule_set, peer, l4, level);

		key.port_bits |= tier;
		policy_compare(&key, judgement);
		key.peer = CLASS_ANY;
		policy_compare(&key, judgement);
	}
	return judgement->verdict;
}

/* One direction. NetworkPolicies never come between a pod and its node, the other tiers do. */
static __always_inline bool policy_permits(const struct isolation *isolation, __u32 peer,
					   const struct tuple *flow, struct judgement *judgement)
{
	bool own_node = peer & CLASS_OF_OWN_NODE;
	__u32 levels = isolation->levels;
	__u32 l4 = policy_l4(flow);

	peer &= ~CLASS_OF_OWN_NODE;
	if (levels & ISOLATION_ORDERED) {
		if ((levels & ISOLATION_SHUT) || peer == CLASS_UNKNOWN)
			return false;
		int verdict = policy_first(isolation->rule_set, levels, peer, l4, LEVEL_ADMIN);

		if (verdict != VERDICT_PASS)
			return verdict == VERDICT_ALLOW;
		if (levels & ISOLATION_DEFAULT_ALLOW)
			return policy_first(isolation->rule_set, levels, peer, l4, 0) !=
			       VERDICT_DENY;
	}
	if (own_node)
		return true;
	__u64 hit = policy_any(isolation->rule_set, levels, peer, l4);

	judgement->rule = hit;
	return hit & POLICY_ALLOWS;
}

/* What policy says to the packet's direction of the flow @opened. enum judged, or a drop reason. */
__subprogram int judge_end(struct __sk_buff *ctx, struct packet *packet,
			   const struct isolation *isolation, __u32 peer,
			   const struct tuple *opened)
{
	struct judgement *judgement = &packet->judgement;
	__u32 reason = packet->direction == DIR_EGRESS ? DROP_POLICY_EGRESS : DROP_POLICY_INGRESS;
	bool audited = isolation->levels & ISOLATION_AUDIT;

	judgement->rule_set = isolation->rule_set;
	judgement->rule = 0;
	if (policy_permits(isolation, peer, opened, judgement))
		return JUDGED_ALLOWED;
	if ((peer & ~CLASS_OF_OWN_NODE) == CLASS_UNKNOWN)
		reason = DROP_UNKNOWN_PEER;
	denial_remember(packet, opened, reason, audited);
	if (!audited)
		return -(int)reason;
	count(ctx, DROP_AUDIT, packet->direction);
	if (event_is_wanted(EVENT_AUDIT))
		notify(ctx, packet, reason, EVENT_AUDIT);
	return JUDGED_AUDITED;
}

/* Judges the current packet's flow; @reversed when the packet's destination opened it, @own_node
 * when this node did. Both ends are judged if they are here. enum judged, or a drop reason. */
__verified_once int judge(struct __sk_buff *ctx, bool reversed, bool own_node)
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

	judgement->source_class = (reversed ? target_class : opener_class) & ~CLASS_OF_OWN_NODE;
	judgement->destination_class = (reversed ? opener_class : target_class) &
				       ~CLASS_OF_OWN_NODE;
	judgement->rule = 0;
	judgement->rule_set = 0;
	if (own_node || (opener_class & CLASS_OF_OWN_NODE))
		return JUDGED_OWN_NODE;
	/* A pod always reaches itself. */
	if (opener && target && opener->ifindex == target->ifindex)
		return JUDGED_ALLOWED;

	__u8 direction = packet->direction;
	int egress = JUDGED_ALLOWED;
	int ingress = JUDGED_ALLOWED;

	if (opener && opener->egress.rule_set) {
		packet->direction = DIR_EGRESS;
		egress = judge_end(ctx, packet, &opener->egress, target_class, &opened);
		if (egress < 0)
			return egress;
	}
	if (target && target->ingress.rule_set) {
		packet->direction = DIR_INGRESS;
		ingress = judge_end(ctx, packet, &target->ingress, opener_class, &opened);
		if (ingress < 0)
			return ingress;
	}
	packet->direction = direction;
	return egress == JUDGED_AUDITED || ingress == JUDGED_AUDITED ? JUDGED_AUDITED :
								       JUDGED_ALLOWED;
}
