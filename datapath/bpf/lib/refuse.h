/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What cannot go on, and its sender is told: how the answer gets there is the hook's to know. */
#pragma once

#include "lib/drop.h"
#include "lib/reply.h"

/* Drops the packet. True: it has become the answer that says why, and is to be sent back. */
static __always_inline bool refuse(struct __sk_buff *ctx, struct packet *packet, int reason)
{
	int error = reason;

	switch (-reason) {
	case DROP_NO_BACKEND:
		error = reply_refused(ctx, packet);
		break;
	case DROP_TOO_BIG:
		rewrite_as_sent(ctx, packet);
		error = reply_too_big(ctx, packet, packet->mtu);
		break;
	case DROP_TTL_EXCEEDED:
		rewrite_as_sent(ctx, packet);
		error = reply_time_exceeded(ctx, packet);
		break;
	}
	drop(ctx, packet, reason);
	return !error;
}
