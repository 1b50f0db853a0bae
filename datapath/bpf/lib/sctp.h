/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* SCTP's header and chunk types (RFC 9260, 3). UAPI headers have none. */
#pragma once

#include <linux/types.h>

struct sctp_header {
	__be16 source;
	__be16 destination;
	__be32 tag;
	__be32 checksum;		/* CRC32c, little-endian whatever its type says */
};
_Static_assert(sizeof(struct sctp_header) == 12, "sctp_header");

struct sctp_chunk {
	__u8 type;			/* enum sctp_chunk_type */
	__u8 flags;
	__be16 length;			/* with this header, without the padding to 4 bytes */
};
_Static_assert(sizeof(struct sctp_chunk) == 4, "sctp_chunk");

enum sctp_chunk_type {
	SCTP_DATA = 0,
	SCTP_INIT = 1,
	SCTP_INIT_ACK = 2,
	SCTP_ABORT = 6,
	SCTP_SHUTDOWN_ACK = 8,
	SCTP_SHUTDOWN_COMPLETE = 14,
};

/* Common header, the first chunk's header and, of an INIT, its tag: an ICMP error that quotes
 * less of an INIT is not believed (RFC 9260, 10). */
#define SCTP_QUOTE 20

/* Chunks looked at in a first fragment: authentication and the long one, and some room. */
#define SCTP_CHUNKS_MAX 4
