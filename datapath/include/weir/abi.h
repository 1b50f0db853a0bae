/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The contract between the BPF programs and user space: every shared layout and
 * number is written here and nowhere else. User space reads it from the BTF of the
 * loaded objects (weir.datapath.codec), never from a copy.
 *
 * Rules: fixed-width types, explicit pad members, no bitfields, one _Static_assert a
 * struct. A pinned map's layout never changes: a new layout is a new map name.
 * Byte order: __be16/__be32 are network order, all others host order.
 */
#pragma once

#include <linux/types.h>

/* An IPv6 address, or an IPv4 one as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2). One key shape
 * for both families: the algorithms are written once, only the parsers differ. */
struct ip_addr {
	__be32 word[4];
};
_Static_assert(sizeof(struct ip_addr) == 16, "ip_addr");

/* ---- numbers ---------------------------------------------------------- */

/* Append-only: dashboards read these. A retired number is never used again. */
enum drop_reason {
	DROP_NONE = 0,
	DROP_MALFORMED = 1,		/* headers truncated or contradictory */
	DROP_UNSUPPORTED_L2 = 2,	/* neither IPv4 nor IPv6, from a pod */
	DROP_SPOOFED_SOURCE = 3,	/* the source is not the sending pod's, or is one of ours from outside */
	DROP_POLICY_EGRESS = 4,		/* isolated, and no egress rule allows it; or one denies it */
	DROP_POLICY_INGRESS = 5,	/* isolated, and no ingress rule allows it; or one denies it */
	DROP_UNKNOWN_PEER = 6,		/* a pod address whose class is not known here yet */
	DROP_NO_BACKEND = 7,		/* the service has no endpoint (the client is told so) */
	DROP_INVALID_CT = 8,		/* ICMP error that belongs to no flow */
	DROP_CT_FULL = 9,		/* the flow could not be recorded */
	DROP_SNAT_NO_PORT = 10,		/* no free port for masquerading */
	DROP_NO_ROUTE = 11,		/* no route or neighbour for the destination */
	DROP_TOO_BIG = 12,		/* larger than the overlay carries (the sender is told so) */
	DROP_FRAGMENT = 13,		/* a later fragment whose first one was not seen; SCTP that cannot get another port */
	DROP_NO_ENDPOINT = 14,		/* an address of this node's pod CIDR that no pod has */
	DROP_TTL_EXCEEDED = 15,		/* hop limit reached zero while forwarding */
	DROP_REWRITE = 16,		/* the kernel refused to change or redirect the packet */
	DROP_NOT_UNICAST = 17,		/* multicast, broadcast, link-local or loopback, from a pod: not routed (no event) */
	DROP_NO_LOCAL_BACKEND = 18,	/* traffic policy Local, and the service has no endpoint on this node */
	DROP_SOURCE_RANGE = 19,		/* not in the service's loadBalancerSourceRanges */
	DROP_BLOCKED = 20,		/* the source is in a blocked prefix */
	DROP_AUDIT = 21,		/* in counters only: policy denies it, and audit mode let it pass */
	DROP_REASON_COUNT
};

enum direction {
	DIR_EGRESS = 0,			/* leaves a pod */
	DIR_INGRESS = 1,		/* reaches a pod */
};

/* Policy class numbers below CLASS_FIRST have a fixed meaning; the agent hands out the rest. */
enum class_number {
	CLASS_ANY = 0,			/* in policy keys only: every peer */
	CLASS_UNKNOWN = 1,		/* in a pod CIDR, not known here yet */
	CLASS_WORLD = 2,		/* outside the cluster, in no ipBlock */
	CLASS_HOST = 3,			/* this node itself, in no selector of nodes and in no ipBlock */
	CLASS_FIRST = 16,
};

enum verdict {
	VERDICT_DENY = 0,
	VERDICT_ALLOW = 1,
	VERDICT_PASS = 2,		/* on to the next tier */
};

/* Which lookups a rule set needs: bit n (0..16) says that it has rules for one protocol
 * and a port prefix of n bits, LEVEL_ANY_PROTOCOL that it has rules for all traffic.
 * LEVEL_ADMIN is no bit: it is added to policy_key.port_bits in rows of the Admin tier. */
enum policy_level {
	LEVEL_PORT_BITS_MAX = 16,
	LEVEL_ANY_PROTOCOL = 17,
	LEVEL_COUNT = 18,
	LEVEL_ADMIN = 32,
};

/* What else isolation.levels says, in bits above those of enum policy_level. */
enum isolation_flag {
	ISOLATION_ORDERED = 1 << 24,		/* has rules of ClusterNetworkPolicies */
	ISOLATION_DEFAULT_ALLOW = 1 << 25,	/* ordered, and no NetworkPolicy isolates: what no rule matches passes */
	ISOLATION_AUDIT = 1 << 26,		/* what is denied is reported and passes */
	ISOLATION_SHUT = 1 << 27,		/* ordered, and a row that denies has no room: all is denied */
};

/* policy_verdict.order: 0 to 0x7fff in the Admin tier, from ORDER_BASELINE in the Baseline tier. */
enum policy_order {
	ORDER_NETWORK_POLICY = 0x8000,
	ORDER_BASELINE = 0x8001,
};

enum address_flag {
	ADDRESS_LOCAL_HOST = 1,		/* an address of this node */
	ADDRESS_REMOTE_NODE = 2,	/* an address of another node */
};

enum route_flag {
	ROUTE_POD_CIDR = 1,		/* pod addresses: unknown ones are CLASS_UNKNOWN */
	ROUTE_LOCAL = 2,		/* this node's own pod CIDR */
	ROUTE_TUNNEL = 4,		/* encapsulate to .node */
	ROUTE_NO_MASQUERADE = 8,	/* keep the pod's source address */
};

/* Whose traffic a row of `services` is for. */
enum service_scope {
	SCOPE_INTERNAL = 0,		/* this node's pods and processes; all, without SERVICE_EXTERNAL_ROW */
	SCOPE_EXTERNAL = 1,		/* what comes from elsewhere: externalTrafficPolicy Local */
};

enum service_flag {
	SERVICE_EXTERNAL_ROW = 1,	/* what comes from elsewhere uses the row of SCOPE_EXTERNAL */
	SERVICE_LOCAL = 2,		/* traffic policy Local: with no backend here, drop without a word */
	SERVICE_SOURCE_RANGES = 4,	/* clients must be in `source_ranges` */
	SERVICE_MAGLEV = 8,		/* what comes by the uplink: by the table in `maglev` */
	SERVICE_DSR = 16,		/* backends elsewhere answer the client themselves */
};

enum ct_flag {
	CT_ORIGIN_IS_LOW = 1,		/* the side that opened the flow is .low of the key */
	CT_REPLIED = 2,			/* seen in both directions */
	CT_FIN_ORIGIN = 4,
	CT_FIN_REPLY = 8,
	CT_RESET = 16,
	CT_SERVICE = 32,		/* client to VIP: .nat_* is the chosen backend */
	CT_REV_NAT = 64,		/* client to backend: replies get .nat_* (the VIP) as source */
	CT_SNAT = 256,			/* with CT_SERVICE: the backend sees this node's address (`snat`) */
	CT_DSR = 512,			/* with CT_SERVICE: the backend's node answers the client */
	/* 128 was set on what a pod opens to its node, too; flows with it are judged. */
	CT_UNJUDGED = 1024,		/* opened by this node itself: allowed by the spec, never judged */
};

enum event_kind {
	EVENT_DROP = 1,
	EVENT_ALLOW = 2,		/* a new flow that a policy allowed, or that none judged */
	EVENT_AUDIT = 3,		/* what would have been dropped for .reason, without audit mode */
};

/* ---- services: (address, port, protocol, scope) -> backends ------------- */

struct service_key {
	struct ip_addr address;
	__be16 port;
	__u8 protocol;
	__u8 scope;			/* enum service_scope */
};
_Static_assert(sizeof(struct service_key) == 20, "service_key");

/* A change of backends is written under a new id, then published by one update of
 * this value: no packet sees a mixture. Rows with the same backends share an id.
 * count 0: refuse. */
struct service {
	__u32 id;
	__u32 count;
	__u32 flags;			/* enum service_flag */
	__u32 affinity_seconds;		/* 0: none */
	__u32 identity;			/* the agent's number of the service's port, on all its addresses */
};
_Static_assert(sizeof(struct service) == 20, "service");

struct backend_key {
	__u32 service;			/* service.id */
	__u32 slot;			/* 0 .. service.count - 1 */
};
_Static_assert(sizeof(struct backend_key) == 8, "backend_key");

struct backend {
	struct ip_addr address;
	__be16 port;
	__u8 pad[2];
};
_Static_assert(sizeof(struct backend) == 20, "backend");

/* Maglev tables, in blocks so that one map serves tables of any size: entry n of a
 * service's table is .slot[n % MAGLEV_BLOCK] of block n / MAGLEV_BLOCK. */
#define MAGLEV_BLOCK 256

struct maglev_key {
	__u32 service;			/* service.id */
	__u32 block;
};
_Static_assert(sizeof(struct maglev_key) == 8, "maglev_key");

struct maglev_block {
	__u16 slot[MAGLEV_BLOCK];	/* backend_key.slot */
};
_Static_assert(sizeof(struct maglev_block) == 512, "maglev_block");

/* Session affinity ClientIP: a client keeps its backend on all addresses of a port. The
 * agent deletes the rows of backends that are gone. */
struct affinity_key {
	__u32 identity;			/* service.identity */
	struct ip_addr client;		/* of a node's own processes: the node's address */
};
_Static_assert(sizeof(struct affinity_key) == 20, "affinity_key");

struct affinity {
	struct ip_addr address;		/* of the backend */
	__be16 port;
	__u8 pad[2];
	__u32 last_used;		/* seconds of CLOCK_MONOTONIC */
};
_Static_assert(sizeof(struct affinity) == 24, "affinity");

/* Whose sockets a network namespace has, by its cookie: the socket hooks know no address. */
struct netns_addresses {
	struct ip_addr ipv4;
	struct ip_addr ipv6;
};
_Static_assert(sizeof(struct netns_addresses) == 32, "netns_addresses");

/* Prefixes of clients that may use a service with SERVICE_SOURCE_RANGES. */
struct source_range_key {
	__u32 bits;			/* 32 of the identity, then those of the 128: IPv4 /n is 128 + n */
	__u32 identity;			/* service.identity */
	struct ip_addr address;
};
_Static_assert(sizeof(struct source_range_key) == 24, "source_range_key");

/* An address of a LoadBalancer service that this node answers ARP and ND requests for. */
struct announced {
	__u8 mac[6];			/* of the uplink */
	__u8 pad[2];
};
_Static_assert(sizeof(struct announced) == 8, "announced");

/* Sources that XDP drops ahead of everything. Key: struct prefix_key. */
struct blocked {
	__u32 rule;			/* the agent's number of the object that says so */
};
_Static_assert(sizeof(struct blocked) == 4, "blocked");

/* Socket translation, both ways: (cookie, VIP) -> backend keeps a datagram socket on
 * its backend, (cookie, backend) -> VIP gives replies and getpeername their name. */
struct sock_nat_key {
	__u64 cookie;
	struct ip_addr address;
	__be16 port;
	__u8 protocol;
	__u8 pad[5];
};
_Static_assert(sizeof(struct sock_nat_key) == 32, "sock_nat_key");

struct sock_nat {
	struct ip_addr address;
	__be16 port;
	__u8 pad[2];
	__u32 service;			/* service.id it was chosen under */
};
_Static_assert(sizeof(struct sock_nat) == 24, "sock_nat");

/* ---- conntrack ---------------------------------------------------------- */

/* Both directions of a flow have one key: the lower (address, port) first, compared as
 * bytes in network order. ICMP echo: both ports are the identifier. */
struct ct_key {
	struct ip_addr low;
	struct ip_addr high;
	__be16 low_port;
	__be16 high_port;
	__u8 protocol;
	__u8 pad[3];
};
_Static_assert(sizeof(struct ct_key) == 40, "ct_key");

struct ct_entry {
	__u32 expires;			/* seconds of CLOCK_MONOTONIC */
	__u32 generation;		/* runtime.policy_generation that allowed it */
	__u32 flags;			/* enum ct_flag */
	__u32 service;			/* service.id, with CT_SERVICE or CT_REV_NAT */
	struct ip_addr nat_address;
	__be16 nat_port;
	__u8 pad[2];
};
_Static_assert(sizeof(struct ct_entry) == 36, "ct_entry");

/* ---- masquerading --------------------------------------------------------- */

enum snat_kind {
	SNAT_FORWARD = 0,		/* local = pod: gives the address and port on the wire */
	SNAT_REVERSE = 1,		/* local = node: gives the pod's address and port */
};

/* Of the reverse entry. */
enum snat_state {
	SNAT_REPLIED = 1,		/* the remote end has answered */
	SNAT_STREAM = 2,		/* and has been asked again since */
	SNAT_CLOSING = 4,		/* both ends have ended the connection: the port may be taken */
};

struct snat_key {
	struct ip_addr remote;
	struct ip_addr local;
	__be16 remote_port;
	__be16 local_port;
	__u8 protocol;
	__u8 kind;			/* enum snat_kind */
	__u8 pad[2];
};
_Static_assert(sizeof(struct snat_key) == 40, "snat_key");

struct snat_entry {
	struct ip_addr address;
	__be16 port;
	__u8 state;			/* enum snat_state */
	__u8 pad;
	__u32 expires;			/* seconds of CLOCK_MONOTONIC */
};
_Static_assert(sizeof(struct snat_entry) == 24, "snat_entry");

/* ---- who is where --------------------------------------------------------- */

/* One direction of a pod's policy. rule_set 0: no policy isolates it, no lookup. */
struct isolation {
	__u32 rule_set;
	__u32 levels;			/* bit mask of enum policy_level, and enum isolation_flag */
};
_Static_assert(sizeof(struct isolation) == 8, "isolation");

/* A pod on this node, by each of its addresses. */
struct endpoint {
	__u32 ifindex;			/* host end of the veth pair */
	__u32 class;
	struct isolation egress;
	struct isolation ingress;
	__u8 mac[6];			/* the pod's end */
	__u8 host_mac[6];		/* the host's end: the pod's gateway */
};
_Static_assert(sizeof(struct endpoint) == 36, "endpoint");

/* Pods anywhere in the cluster and nodes' own addresses, exact. */
struct address {
	__u32 class;
	__u32 flags;			/* enum address_flag */
};
_Static_assert(sizeof(struct address) == 8, "address");

struct prefix_key {
	__u32 bits;			/* of the 128: an IPv4 /n is 96 + n */
	struct ip_addr address;
};
_Static_assert(sizeof(struct prefix_key) == 20, "prefix_key");

/* Longest ipBlock prefix that contains an address that is no pod's. */
struct prefix {
	__u32 class;
};
_Static_assert(sizeof(struct prefix) == 4, "prefix");

/* Pod CIDRs, nodes and what keeps its source address. */
struct route {
	struct ip_addr node;		/* underlay address of the node, with ROUTE_TUNNEL */
	__u32 flags;			/* enum route_flag */
};
_Static_assert(sizeof(struct route) == 20, "route");

/* ---- policy ------------------------------------------------------------------ */

/* A hit for (rule set, peer class or CLASS_ANY, at any level) allows; no hit denies. In sets with
 * ISOLATION_ORDERED the hit of the lowest order decides, in the Admin tier and, if that passes or
 * has no hit, among the other rows. Rule sets are shared by all classes with the same rules. */
struct policy_key {
	__u32 rule_set;
	__u32 peer;
	__u16 port;			/* destination port, host order, masked to port_bits */
	__u8 protocol;			/* 0 at LEVEL_ANY_PROTOCOL */
	__u8 port_bits;			/* 0..16, or LEVEL_ANY_PROTOCOL; with LEVEL_ADMIN of that tier */
};
_Static_assert(sizeof(struct policy_key) == 12, "policy_key");

struct policy_verdict {
	__u32 rule;			/* the agent's number for (policy, direction, rule index) */
	__u16 order;			/* enum policy_order */
	__u8 verdict;			/* enum verdict */
	__u8 pad;
};
_Static_assert(sizeof(struct policy_verdict) == 8, "policy_verdict");

/* What policies denied lately, as the flow was opened. */
struct denial_key {
	struct ip_addr source;
	struct ip_addr destination;
	__be16 destination_port;	/* 0 with ICMP */
	__u8 protocol;
	__u8 direction;			/* enum direction */
};
_Static_assert(sizeof(struct denial_key) == 36, "denial_key");

enum denial_flag {
	DENIAL_AUDITED = 1,		/* it was let through, the last time */
};

struct denial {
	__u32 last_seen;		/* seconds of CLOCK_MONOTONIC */
	__u32 packets;			/* as far as two CPUs did not count at once */
	__u32 rule;			/* that denies it, 0: none allows it */
	__u32 rule_set;
	__u32 reason;			/* enum drop_reason */
	__u32 flags;			/* enum denial_flag */
};
_Static_assert(sizeof(struct denial) == 24, "denial");

/* ---- runtime state and observation --------------------------------------------- */

/* What this node's services need looked at; without it the packets of others pay nothing. */
enum runtime_feature {
	RUNTIME_HOST_BACKENDS = 1,	/* backends are this node's own sockets: their replies leave by the uplink */
	RUNTIME_ANNOUNCES = 2,		/* `announced` has rows */
	RUNTIME_XDP_BLOCKS = 4,		/* XDP looks at `blocked` on every uplink: tc need not */
};

/* The one entry of the runtime map: what changes without reloading a program. */
struct runtime {
	__u32 policy_generation;	/* raised by each policy change: established flows are judged again */
	__u32 event_mask;		/* bit (1 << enum event_kind): somebody listens */
	__u32 features;			/* enum runtime_feature */
	__u32 pad;
};
_Static_assert(sizeof(struct runtime) == 16, "runtime");

struct metric_key {
	__u32 reason;			/* enum drop_reason; DROP_NONE: forwarded */
	__u32 direction;		/* enum direction */
};
_Static_assert(sizeof(struct metric_key) == 8, "metric_key");

struct metric {
	__u64 packets;
	__u64 bytes;
};
_Static_assert(sizeof(struct metric) == 16, "metric");

struct event {
	__u64 time_ns;			/* CLOCK_MONOTONIC */
	struct ip_addr source;
	struct ip_addr destination;
	__be16 source_port;		/* ICMP: the identifier */
	__be16 destination_port;
	__u8 protocol;
	__u8 kind;			/* enum event_kind */
	__u8 direction;			/* enum direction */
	__u8 tcp_flags;
	__u32 reason;			/* enum drop_reason */
	__u32 source_class;
	__u32 destination_class;
	__u32 rule;			/* rule that allowed or denied it, 0: none */
	__u32 rule_set;			/* rule set that judged it, 0: none */
	__u32 ifindex;			/* where the program ran */
	__u32 length;			/* bytes, with the Ethernet header */
	__u8 pad[4];
};
_Static_assert(sizeof(struct event) == 80, "event");
