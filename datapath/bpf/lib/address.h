/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* struct ip_addr: comparing, telling families apart, checksum differences. */
#pragma once

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "lib/subprogram.h"
#include "weir/abi.h"

static __always_inline void address_set_ipv4(struct ip_addr *address, __be32 ipv4)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = bpf_htonl(0xffff);
	address->word[3] = ipv4;
}

static __always_inline bool address_is_ipv4(const struct ip_addr *address)
{
	return address->word[0] == 0 && address->word[1] == 0 &&
	       address->word[2] == bpf_htonl(0xffff);
}

static __always_inline bool address_is_unset(const struct ip_addr *address)
{
	return !(address->word[0] | address->word[1] | address->word[2] | address->word[3]);
}

static __always_inline bool address_is_loopback(const struct ip_addr *address)
{
	if (address_is_ipv4(address))
		return bpf_ntohl(address->word[3]) >> 24 == 127;
	return !(address->word[0] | address->word[1] | address->word[2]) &&
	       address->word[3] == bpf_htonl(1);
}

static __always_inline bool address_equal(const struct ip_addr *a, const struct ip_addr *b)
{
	return a->word[3] == b->word[3] && a->word[2] == b->word[2] &&
	       a->word[1] == b->word[1] && a->word[0] == b->word[0];
}

/* Like memcmp: the order of the keys is visible to user space. */
static __always_inline int address_order(const struct ip_addr *a, const struct ip_addr *b)
{
	for (int i = 0; i < 4; i++) {
		if (a->word[i] != b->word[i])
			return bpf_ntohl(a->word[i]) < bpf_ntohl(b->word[i]) ? -1 : 1;
	}
	return 0;
}

/* Multicast, broadcast, unspecified, link-local and loopback: never routed. */
static __always_inline bool address_is_link_scope(const struct ip_addr *address)
{
	if (address_is_ipv4(address)) {
		__u32 ipv4 = bpf_ntohl(address->word[3]);

		return ipv4 == 0 || ipv4 >= 0xe0000000 || (ipv4 >> 16) == 0xa9fe ||
		       (ipv4 >> 24) == 127;
	}
	__u32 first = bpf_ntohl(address->word[0]);

	return (first >> 24) == 0xff || (first >> 22) == (0xfe800000 >> 22) ||
	       address_is_unset(address) || address_is_loopback(address);
}

/* The difference that replacing one address by the other makes in a ones' complement sum.
 * The ::ffff: of mapped addresses cancels out, so this serves both families. */
static __always_inline __s64 address_csum_diff(const struct ip_addr *from,
					       const struct ip_addr *to)
{
	return bpf_csum_diff((__be32 *)from->word, sizeof(from->word), (__be32 *)to->word,
			     sizeof(to->word), 0);
}
