/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Direct server return: the backend's node answers the client itself. The packet that opens a
 * flow carries what the client asked for, behind its IP header; the backend's node takes that
 * out, remembers it as it does for clients of its own, and the backend never sees it. */
#pragma once

#include "lib/reply.h"
#include "lib/service.h"
#include "lib/settings.h"

/* RFC 4727 keeps these for experiments. Copied into fragments; skipped by who does not know it. */
#define DSR_IPV4_OPTION 158
#define DSR_IPV6_OPTION 0x1e

/* packet->service and ct_entry.service where the id is another node's. */
#define DSR_SERVICE 0xffffffff

struct dsr_ipv4 {
	__u8 type;
	__u8 length;
	__be16 port;
	__be32 address;
};
_Static_assert(sizeof(struct dsr_ipv4) == 8, "dsr_ipv4");

struct dsr_ipv6 {
	__u8 next;
	__u8 length;			/* in units of 8 bytes, without the first */
	__u8 type;
	__u8 option_length;
	__be16 port;
	__be16 address[8];
	__u8 padding;			/* PadN of no bytes */
	__u8 padding_length;
};
_Static_assert(sizeof(struct dsr_ipv6) == 24, "dsr_ipv6");

static __always_inline __u32 dsr_size(const struct packet *packet)
{
	return packet->ipv6 ? sizeof(struct dsr_ipv6) : sizeof(struct dsr_ipv4);
}

/* IPv4 options of the client's own would leave no place that is sure. */
static __always_inline bool dsr_has_room(const struct packet *packet)
{
	return !has_ipv4_options(packet);
}

/* A client in the cluster may be on the backend's node, which takes what comes from there with an
 * address of its own for a lie. */
static __always_inline bool dsr_client_is_outside(const struct ip_addr *client)
{
	const struct route *route = route_find(client);

	return !(route && (route->flags & ROUTE_POD_CIDR)) && !is_node(client);
}

/* A pod's node takes the option out; a node's own sockets would not know what to do with it. */
static __always_inline bool dsr_is_possible(const struct packet *packet,
					    const struct ip_addr *backend)
{
	const struct address *known = bpf_map_lookup_elem(&addresses, backend);

	return packet->place == PLACE_UPLINK && dsr_has_room(packet) && known &&
	       !(known->flags & (ADDRESS_LOCAL_HOST | ADDRESS_REMOTE_NODE)) &&
	       dsr_client_is_outside(&packet->flow.source);
}

/* Whether this packet of such a flow says it: of a connection the first does. */
static __always_inline bool dsr_is_told(const struct packet *packet)
{
	return !packet->quoted_l3_offset && packet->fragment != FRAGMENT_LATER &&
	       (packet->flow.l4_proto != IPPROTO_TCP || (packet->tcp_flags & TCP_SYN));
}

/* Bytes that this packet of such a flow gets. */
static __always_inline __u32 dsr_bytes(const struct packet *packet)
{
	return dsr_is_told(packet) && dsr_has_room(packet) ? dsr_size(packet) : 0;
}

static __always_inline int dsr_resize(struct __sk_buff *ctx, __s32 bytes)
{
	return bpf_skb_adjust_room(ctx, bytes, BPF_ADJ_ROOM_NET, 0) ? -DROP_REWRITE : 0;
}

static __always_inline int dsr_put_ipv4(struct __sk_buff *ctx, const struct packet *packet)
{
	struct {
		struct iphdr ip;
		struct dsr_ipv4 option;
	} header = {
		.option = {
			.type = DSR_IPV4_OPTION,
			.length = sizeof(header.option),
			.port = packet->vip_port,
			.address = packet->vip.word[3],
		},
	};

	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &header.ip, sizeof(header.ip)))
		return -DROP_REWRITE;
	header.ip.ihl = sizeof(header) / 4;
	header.ip.tot_len = bpf_htons(bpf_ntohs(header.ip.tot_len) + sizeof(header.option));
	header.ip.check = 0;
	header.ip.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&header, sizeof(header), 0));
	if (dsr_resize(ctx, sizeof(header.option)) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &header, sizeof(header), BPF_F_RECOMPUTE_CSUM))
		return -DROP_REWRITE;
	return 0;
}

static __always_inline int dsr_put_ipv6(struct __sk_buff *ctx, const struct packet *packet)
{
	struct dsr_ipv6 option = {
		.length = sizeof(option) / 8 - 1,
		.type = DSR_IPV6_OPTION,
		.option_length = sizeof(option.port) + sizeof(option.address),
		.port = packet->vip_port,
		.padding = 1,
	};
	struct ipv6hdr ip;

	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &ip, sizeof(ip)))
		return -DROP_REWRITE;
	__builtin_memcpy(option.address, &packet->vip, sizeof(option.address));
	option.next = ip.nexthdr;
	ip.nexthdr = EXTENSION_DESTINATION;
	ip.payload_len = bpf_htons(bpf_ntohs(ip.payload_len) + sizeof(option));
	if (dsr_resize(ctx, sizeof(option)) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN + sizeof(ip), &option, sizeof(option),
				BPF_F_RECOMPUTE_CSUM))
		return -DROP_REWRITE;
	return 0;
}

/* Writes into the packet what its client asked for. 0 or a drop reason. */
__subprogram int dsr_put(struct __sk_buff *ctx, const struct packet *packet)
{
	return packet->ipv6 ? dsr_put_ipv6(ctx, packet) : dsr_put_ipv4(ctx, packet);
}

/* Whether something lies between the IP header and the transport's: almost never. */
static __always_inline bool dsr_may_be_there(const struct packet *packet)
{
	__u32 header = packet->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);

	return packet->l4_offset != ETH_HLEN + header;
}

/* 1 with the frontend if the packet carries one, 0 if not. */
static __always_inline int dsr_read(struct __sk_buff *ctx, const struct packet *packet,
				    struct ip_addr *vip, __be16 *port)
{
	if (packet->ipv6) {
		struct dsr_ipv6 option;
		__u8 next;

		if (bpf_skb_load_bytes(ctx, ETH_HLEN + offsetof(struct ipv6hdr, nexthdr), &next, 1) ||
		    next != EXTENSION_DESTINATION ||
		    bpf_skb_load_bytes(ctx, ETH_HLEN + sizeof(struct ipv6hdr), &option,
				       sizeof(option)) ||
		    option.length != sizeof(option) / 8 - 1 || option.type != DSR_IPV6_OPTION)
			return 0;
		__builtin_memcpy(vip, option.address, sizeof(*vip));
		*port = option.port;
		return 1;
	}
	struct dsr_ipv4 option;

	if (packet->l4_offset != ETH_HLEN + sizeof(struct iphdr) + sizeof(option) ||
	    bpf_skb_load_bytes(ctx, ETH_HLEN + sizeof(struct iphdr), &option, sizeof(option)) ||
	    option.type != DSR_IPV4_OPTION || option.length != sizeof(option))
		return 0;
	address_set_ipv4(vip, option.address);
	*port = option.port;
	return 1;
}

static __always_inline int dsr_cut_ipv4(struct __sk_buff *ctx)
{
	struct iphdr ip;

	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &ip, sizeof(ip)))
		return -DROP_REWRITE;
	ip.ihl = sizeof(ip) / 4;
	ip.tot_len = bpf_htons(bpf_ntohs(ip.tot_len) - sizeof(struct dsr_ipv4));
	ip.check = 0;
	ip.check = csum_fold(bpf_csum_diff(NULL, 0, (__be32 *)&ip, sizeof(ip), 0));
	if (dsr_resize(ctx, -(__s32)sizeof(struct dsr_ipv4)) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM))
		return -DROP_REWRITE;
	return 0;
}

static __always_inline int dsr_cut_ipv6(struct __sk_buff *ctx)
{
	struct ipv6hdr ip;

	if (bpf_skb_load_bytes(ctx, ETH_HLEN, &ip, sizeof(ip)) ||
	    bpf_skb_load_bytes(ctx, ETH_HLEN + sizeof(ip), &ip.nexthdr, 1))
		return -DROP_REWRITE;
	ip.payload_len = bpf_htons(bpf_ntohs(ip.payload_len) - sizeof(struct dsr_ipv6));
	if (dsr_resize(ctx, -(__s32)sizeof(struct dsr_ipv6)) ||
	    bpf_skb_store_bytes(ctx, ETH_HLEN, &ip, sizeof(ip), BPF_F_RECOMPUTE_CSUM))
		return -DROP_REWRITE;
	return 0;
}

/* Whether a node may have written it. What comes through the overlay a node sent, and pods send
 * from their own addresses alone; dsr_is_forged() keeps others' from being passed on. Natively
 * routed packets do not say who sent them: there, who can send to pods' addresses by the uplink
 * can do the same as a client of the frontend. */
static __always_inline bool dsr_is_a_nodes(const struct packet *packet)
{
	return (!tunnel || packet->place == PLACE_OVERLAY) &&
	       dsr_client_is_outside(&packet->flow.source);
}

/* Whether the packet, for no pod of this node, is to tell a pod's node what only we would. Nodes
 * send it there at once. */
static __always_inline bool dsr_is_forged(struct __sk_buff *ctx, const struct packet *packet)
{
	const struct route *route;
	struct ip_addr vip;
	__be16 port;

	if (!dsr_may_be_there(packet))
		return false;
	route = route_find(&packet->flow.destination);
	return route && (route->flags & ROUTE_POD_CIDR) && dsr_read(ctx, packet, &vip, &port);
}

/* Takes out what another node wrote: the flow is then one of a service, as if the choice had been
 * made here. Nobody is to answer as somebody that is no frontend. 0 or a drop reason. */
__subprogram int dsr_take(struct __sk_buff *ctx, struct packet *packet)
{
	struct ip_addr vip;
	__be16 port;

	if (!dsr_is_told(packet) || !dsr_is_a_nodes(packet) ||
	    !dsr_read(ctx, packet, &vip, &port))
		return 0;
	if (!is_node(&vip) && !service_find(&vip, port, packet->flow.l4_proto, SCOPE_INTERNAL))
		return 0;
	int error = packet->ipv6 ? dsr_cut_ipv6(ctx) : dsr_cut_ipv4(ctx);

	if (error)
		return error;
	packet->l4_offset -= dsr_size(packet);
	packet->l3_length -= dsr_size(packet);
	packet->service = DSR_SERVICE;
	packet->vip = vip;
	packet->vip_port = port;
	return 0;
}
