/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Addresses of load balancers on the local segment: this node answers ARP and ND for them. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "weir/abi.h"

/* HASH without preallocation, no eviction: 72 B an entry, 0.3 MB full. Full: the agent reports
 * the address, which nobody answers for. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct ip_addr);
	__type(value, struct announced);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} announced SEC(".maps");
