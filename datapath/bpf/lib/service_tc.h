/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services for clients that the socket hooks do not see: translation of packets. */
#pragma once

#include "lib/ct.h"
#include "lib/maglev.h"
#include "lib/rewrite.h"
#include "lib/service.h"

static __always_inline int service_redirect(struct __sk_buff *ctx, struct packet *packet,
					    const struct ct_entry *chosen)
{
	struct ip_addr backend = chosen->nat_address;

	packet->service = chosen->service;
	packet->vip = packet->flow.destination;
	packet->vip_port = packet->flow.destination_port;
	return rewrite(ctx, packet, END_DESTINATION, &backend, chosen->nat_port);
}

/* Whether the client stays on its backend. A TCP connection does for its life; datagrams do
 * until the backends change. */
static __always_inline bool service_is_current(const struct packet *packet,
					       const struct ct_entry *entry)
{
	if (packet->flow.l4_proto != IPPROTO_UDP || packet->quoted_l3_offset)
		return true;
	const struct service *service = service_find(&packet->flow.destination,
						     packet->flow.destination_port, IPPROTO_UDP);

	return service && service->id == entry->service;
}

__subprogram int service_open(struct __sk_buff *ctx, struct packet *packet)
{
	const struct service *service = service_find(&packet->flow.destination,
						     packet->flow.destination_port,
						     packet->flow.l4_proto);

	if (!service || packet->quoted_l3_offset)
		return 0;
	const struct backend *backend = backend_choose(service);

	if (!backend)
		return -DROP_NO_BACKEND;
	struct ct_entry entry = {
		.flags = CT_SERVICE,
		.service = service->id,
		.nat_address = backend->address,
		.nat_port = backend->port,
	};
	int error = ct_create(packet, &entry);

	return error ? error : service_redirect(ctx, packet, &entry);
}

/* Sends what goes to a VIP to a backend; then the packet's flow is the one to judge, and
 * packet->service is set. @entry: of the flow as it came. 0 or a drop reason. */
static __always_inline int service_to_backend(struct __sk_buff *ctx, struct packet *packet,
					      struct ct_entry *entry)
{
	if (!entry)
		return service_open(ctx, packet);
	if (!(entry->flags & CT_SERVICE))
		return 0;
	if (!service_is_current(packet, entry))
		return service_open(ctx, packet);
	if (!packet->quoted_l3_offset)
		ct_refresh(packet, entry);
	return service_redirect(ctx, packet, entry);
}

/* The entry to judge, after service_to_backend(). A datagram to a VIP that is no service any
 * more opens a flow like any other. */
static __always_inline struct ct_entry *service_flow(struct packet *packet, struct ct_entry *entry)
{
	if (packet->service)
		return ct_find(packet);
	return entry && (entry->flags & CT_SERVICE) ? NULL : entry;
}

/* Replies of a backend, and errors about what was sent to it, come from the VIP. */
static __always_inline int service_from_backend(struct __sk_buff *ctx, struct packet *packet,
						const struct ct_entry *entry)
{
	if (!entry || !(entry->flags & CT_REV_NAT) || ct_from_origin(packet, entry->flags))
		return 0;
	struct ip_addr vip = entry->nat_address;

	return rewrite(ctx, packet, END_SOURCE, &vip, entry->nat_port);
}
