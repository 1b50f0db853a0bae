/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* ICMP and ICMPv6 numbers and header (RFC 792, RFC 4443). <linux/icmp.h> would bring in the C
 * library, which BPF has not. */
#pragma once

#include <linux/types.h>

enum icmp_type {
	ICMP_ECHOREPLY = 0,
	ICMP_DEST_UNREACH = 3,
	ICMP_SOURCE_QUENCH = 4,
	ICMP_ECHO = 8,
	ICMP_TIME_EXCEEDED = 11,
	ICMP_PARAMETERPROB = 12,
};

enum icmp_unreach_code {
	ICMP_PORT_UNREACH = 3,
	ICMP_FRAG_NEEDED = 4,
};

enum icmpv6_type {
	ICMPV6_DEST_UNREACH = 1,
	ICMPV6_PKT_TOOBIG = 2,
	ICMPV6_TIME_EXCEED = 3,
	ICMPV6_ECHO_REQUEST = 128,	/* below: errors */
	ICMPV6_ECHO_REPLY = 129,
};

enum icmpv6_unreach_code {
	ICMPV6_PORT_UNREACH = 4,
};

struct icmp_header {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be16 identifier;		/* of an echo */
	__be16 low;			/* echo: sequence; IPv4's next-hop MTU */
};
_Static_assert(sizeof(struct icmp_header) == 8, "icmp_header");
