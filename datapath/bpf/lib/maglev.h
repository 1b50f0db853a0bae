/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Maglev tables: clients from outside the cluster find the same backend at every node, and a
 * backend that goes moves few of the others' clients. The agent computes them. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "lib/settings.h"

/* HASH without preallocation, no eviction: 568 B an entry, which is 256 slots; 37 MB full (2 MB
 * empty). Full: the service chooses at random, and the agent reports it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 65536);
	__type(key, struct maglev_key);
	__type(value, struct maglev_block);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} maglev SEC(".maps");
