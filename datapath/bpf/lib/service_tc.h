/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Services in packets: of clients outside, and of those that the socket hooks do not see. */
#pragma once

#include "lib/ct.h"
#include "lib/dsr.h"
#include "lib/maglev.h"
#include "lib/rewrite.h"
#include "lib/service.h"

/* Whether what goes to the backend must come back by this node, and the backend would not send
 * it here: it gets an address of the node as its source. */
static __always_inline bool backend_needs_snat(const struct packet *packet,
					       const struct ip_addr *backend)
{
	switch (packet->place) {
	case PLACE_POD:
		return address_equal(backend, &packet->flow.source);
	case PLACE_HOST:
		return true;
	default:
		return !endpoint_find(backend) && !is_local_host(backend);
	}
}

static __always_inline const struct service *service_of(const struct packet *packet)
{
	const struct tuple *flow = &packet->flow;
	const struct service *service = service_find(&flow->destination, flow->destination_port,
						     flow->l4_proto, SCOPE_INTERNAL);

	/* To a node, clients of other nodes are outside as well. */
	if (service && (service->flags & SERVICE_EXTERNAL_ROW) &&
	    (packet->place == PLACE_UPLINK || packet->place == PLACE_OVERLAY))
		return service_find(&flow->destination, flow->destination_port, flow->l4_proto,
				    SCOPE_EXTERNAL);
	return service;
}

static __always_inline __u32 service_slot(const struct packet *packet,
					  const struct service *service)
{
	__u32 slot;

	if (packet->place != PLACE_UPLINK || !(service->flags & SERVICE_MAGLEV))
		return slot_any(service);
	slot = slot_by_maglev(service, &packet->flow);
	return slot < service->count ? slot : slot_any(service);
}

/* What the packet asked for, before its destination is the backend. */
static __always_inline void service_note(struct packet *packet, const struct ct_entry *chosen)
{
	packet->service = chosen->service;
	packet->snat = !!(chosen->flags & CT_SNAT);
	packet->dsr = !!(chosen->flags & CT_DSR);
	packet->vip = packet->flow.destination;
	packet->vip_port = packet->flow.destination_port;
}

static __always_inline int service_redirect(struct __sk_buff *ctx, struct packet *packet,
					    const struct ct_entry *chosen)
{
	struct ip_addr backend = chosen->nat_address;

	service_note(packet, chosen);
	return rewrite(ctx, packet, END_DESTINATION, &backend, chosen->nat_port);
}

/* Whether the packet is the client's: what claims to come from the VIP is not for a backend. */
static __always_inline bool service_is_asked(const struct packet *packet,
					     const struct ct_entry *entry)
{
	return (entry->flags & CT_SERVICE) && ct_from_origin(packet, entry->flags);
}

/* Whether the client stays on its backend: a TCP connection does for its life, datagrams while
 * the service is there. The agent deletes the entries of backends that are gone. */
static __always_inline bool service_is_current(const struct packet *packet)
{
	const struct tuple *flow = &packet->flow;

	if (flow->l4_proto != IPPROTO_UDP || packet->quoted_l3_offset)
		return true;
	return service_find(&flow->destination, flow->destination_port, flow->l4_proto,
			    SCOPE_INTERNAL);
}

/* Chooses the backend of a flow that is new here, and records it. 1; 0: it asks for no service;
 * or a drop reason. */
static __always_inline int service_choose(struct packet *packet, struct ct_entry *entry)
{
	const struct service *service = service_of(packet);
	struct backend backend;

	if (!service || packet->quoted_l3_offset)
		return 0;
	int error = backend_choose(service, &packet->flow.source, service_slot(packet, service),
				   &backend);

	if (error)
		return error;
	entry->flags = CT_SERVICE;
	entry->service = service->id;
	entry->nat_address = backend.address;
	entry->nat_port = backend.port;
	if (backend_needs_snat(packet, &backend.address))
		entry->flags |= (service->flags & SERVICE_DSR) &&
						dsr_is_possible(packet, &backend.address) ?
					CT_DSR :
					CT_SNAT;
	error = ct_create(packet, entry);
	return error ? error : 1;
}

__verified_once int service_open(struct __sk_buff *ctx)
{
	struct packet *packet = packet_current();

	if (!packet)
		return -DROP_MALFORMED;
	struct ct_entry entry = {};
	int found = service_choose(packet, &entry);

	return found > 0 ? service_redirect(ctx, packet, &entry) : found;
}

/* Sends what goes to a VIP to a backend; then the packet's flow is the one to judge, and
 * packet->service is set. @entry: of the flow as it came. 0 or a drop reason. */
static __always_inline int service_to_backend(struct __sk_buff *ctx, struct packet *packet,
					      struct ct_entry *entry)
{
	if (!entry)
		return service_open(ctx);
	if (!service_is_asked(packet, entry))
		return 0;
	if (!service_is_current(packet))
		return service_open(ctx);
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

/* What a backend says is to the client's flow with the VIP, too: it stays as long as somebody
 * talks, and ends with the connection. Once a second, so replies pay one lookup no more often. */
__subprogram int service_touch(struct packet *packet)
{
	struct ct_entry *entry = ct_find(packet);

	if (entry && (entry->flags & CT_SERVICE))
		ct_refresh(packet, entry);
	return 0;
}

/* Replies of a backend, and errors about what was sent to it, come from the VIP. */
static __always_inline int service_from_backend(struct __sk_buff *ctx, struct packet *packet,
						const struct ct_entry *entry)
{
	if (!entry || !(entry->flags & CT_REV_NAT) || ct_from_origin(packet, entry->flags))
		return 0;
	struct ip_addr vip = entry->nat_address;
	int error = rewrite(ctx, packet, END_SOURCE, &vip, entry->nat_port);

	packet->restored = 1;
	if (!error && packet->refreshed)
		service_touch(packet);
	return error;
}
