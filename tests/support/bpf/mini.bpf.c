// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* The smallest programs that have every map of abi.h: the loader's tests need programs
 * whose behaviour they choose. Each run counts a metric under the reason VARIANT. */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#include "weir/abi.h"

#ifndef VARIANT
#define VARIANT 0
#endif

#define TABLE(name, kind, flags, size, key_type, value_type)		\
	struct {							\
		__uint(type, BPF_MAP_TYPE_##kind);			\
		__uint(map_flags, flags);				\
		__uint(max_entries, size);				\
		__type(key, key_type);					\
		__type(value, value_type);				\
		__uint(pinning, LIBBPF_PIN_BY_NAME);			\
	} name SEC(".maps")

#ifdef OTHER_LAYOUT
/* As large as struct address: only the layout tells. */
struct other_address {
	__u16 class;
	__u16 zone;
	__u32 flags;
};
TABLE(addresses, HASH, 0, 4096, struct ip_addr, struct other_address);
#else
TABLE(addresses, HASH, 0, 4096, struct ip_addr, struct address);
#endif
TABLE(services, HASH, 0, 4096, struct service_key, struct service);
TABLE(backends, HASH, 0, 262144, struct backend_key, struct backend);
TABLE(endpoints, HASH, 0, 256, struct ip_addr, struct endpoint);
TABLE(prefixes, LPM_TRIE, BPF_F_NO_PREALLOC, 131072, struct prefix_key, struct prefix);
TABLE(routes, LPM_TRIE, BPF_F_NO_PREALLOC, 4096, struct prefix_key, struct route);
TABLE(policy, HASH, BPF_F_NO_PREALLOC, 4096, struct policy_key, struct policy_verdict);
TABLE(denials, LRU_HASH, 0, 4096, struct denial_key, struct denial);
TABLE(ct, LRU_HASH, 0, 4096, struct ct_key, struct ct_entry);
TABLE(snat, LRU_HASH, 0, 4096, struct snat_key, struct snat_entry);
TABLE(sock_nat, LRU_HASH, 0, 4096, struct sock_nat_key, struct sock_nat);
TABLE(maglev, HASH, 0, 256, struct maglev_key, struct maglev_block);
TABLE(affinity, LRU_HASH, 0, 4096, struct affinity_key, struct affinity);
TABLE(netns_addresses, HASH, 0, 256, __u64, struct netns_addresses);
TABLE(source_ranges, LPM_TRIE, BPF_F_NO_PREALLOC, 4096, struct source_range_key, __u8);
TABLE(announced, HASH, 0, 256, struct ip_addr, struct announced);
TABLE(blocked, LPM_TRIE, BPF_F_NO_PREALLOC, 4096, struct prefix_key, struct blocked);
TABLE(runtime, ARRAY, 0, 1, __u32, struct runtime);
TABLE(metrics, PERCPU_HASH, 0, 64, struct metric_key, struct metric);

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 262144);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events SEC(".maps");

/* Not pinned: of this object alone, made anew with the programs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} passing SEC(".maps");

const volatile struct ip_addr node_ipv4 = {};
const volatile struct ip_addr node_ipv6 = {};
const volatile __u32 overlay_ifindex = 0;
const volatile __u32 overlay_mtu = 0;
const volatile __u8 tunnel = 0;
const volatile __u8 masquerade = 0;
const volatile __u16 snat_port_first = 0;
const volatile __u16 snat_port_last = 0;
const volatile __u64 host_netns_cookie = 0;
const volatile __u32 maglev_table_size = 0;
const volatile __u16 overlay_port = 0;
const volatile __u8 xdp_services = 0;
const volatile __u8 has_set_retval = 0;

/* Nothing else would put the struct of the ring buffer into BTF. */
struct event shape_of_events;

static __always_inline void count(__u32 length)
{
	struct metric_key key = { .reason = VARIANT };
	struct metric fresh = { .packets = 1, .bytes = length };
	struct metric *found = bpf_map_lookup_elem(&metrics, &key);

	if (found) {
		found->packets++;
		found->bytes += length;
	} else {
		bpf_map_update_elem(&metrics, &key, &fresh, BPF_NOEXIST);
	}
}

/* The source port's place says who sent the event: tests run it with a mark. */
static __always_inline void tell(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct runtime *state = bpf_map_lookup_elem(&runtime, &zero);
	struct event *event;

	if (!state || !(state->event_mask & (1 << EVENT_ALLOW)))
		return;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = bpf_ktime_get_ns();
	event->source_port = __builtin_bswap16(1234);
	event->kind = EVENT_ALLOW;
	event->reason = VARIANT;
	event->rule = skb->mark;
	event->length = skb->len;
	bpf_ringbuf_submit(event, 0);
}

SEC("tc")
int from_pod(struct __sk_buff *skb)
{
	count(skb->len);
	tell(skb);
#ifdef BROKEN
	return *(volatile int *)(long)(skb->len);
#else
	return TC_ACT_OK;
#endif
}

SEC("tc")
int to_pod(struct __sk_buff *skb)
{
	__u32 zero = 0;
	__u32 *passed = bpf_map_lookup_elem(&passing, &zero);

	if (passed)
		skb->priority = ++*passed;
	/* The test reads it back. */
	skb->mark = overlay_mtu;
	return TC_ACT_OK;
}

#ifndef WITHOUT_SOCKETS
SEC("cgroup/connect4")
int sock_connect4(struct bpf_sock_addr *ctx)
{
	/* Port 4791 is for nobody. */
	return ctx->user_port != __builtin_bswap16(4791);
}
#endif

char _license[] SEC("license") = "Dual BSD/GPL";
