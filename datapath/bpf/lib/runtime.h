/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* State that the agent changes while programs run, and the clock of conntrack. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "weir/abi.h"

#define NANOSECONDS 1000000000ull

/* One entry, an array: lookups are inlined. 16 bytes. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct runtime);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} runtime SEC(".maps");

static __always_inline __u32 policy_generation(void)
{
	__u32 zero = 0;
	const struct runtime *state = bpf_map_lookup_elem(&runtime, &zero);

	return state ? state->policy_generation : 0;
}

static __always_inline bool runtime_has(enum runtime_feature feature)
{
	__u32 zero = 0;
	const struct runtime *state = bpf_map_lookup_elem(&runtime, &zero);

	return state && (state->features & feature);
}

static __always_inline bool event_is_wanted(enum event_kind kind)
{
	__u32 zero = 0;
	const struct runtime *state = bpf_map_lookup_elem(&runtime, &zero);

	return state && (state->event_mask & (1u << kind));
}

/* CLOCK_MONOTONIC; 32 bits of seconds last 136 years. */
static __always_inline __u32 seconds_now(void)
{
	return bpf_ktime_get_ns() / NANOSECONDS;
}
