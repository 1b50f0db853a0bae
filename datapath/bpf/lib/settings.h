/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What is known when a program is loaded. The loader writes these into .rodata before the
 * verifier runs, so that one object serves every node and branches not taken are pruned. */
#pragma once

#include <stdbool.h>
#include <bpf/bpf_helpers.h>

#include "weir/abi.h"

/* This node's address on the wire for each family: masqueraded packets and ICMP errors get
 * it as their source. All zero: the node does not have the family. */
const volatile struct ip_addr node_ipv4 = {};
const volatile struct ip_addr node_ipv6 = {};

static __always_inline void node_address(bool ipv6, struct ip_addr *address)
{
	for (int i = 0; i < 4; i++)
		address->word[i] = ipv6 ? node_ipv6.word[i] : node_ipv4.word[i];
}

/* Interface index of the overlay device, and the largest IP packet it carries in bytes. */
const volatile __u32 overlay_ifindex = 0;
const volatile __u32 overlay_mtu = 0;

/* Non-zero: pod traffic between nodes is encapsulated, and nothing else from a pod of
 * another node is believed. Zero: native routing. */
const volatile __u8 tunnel = 0;

/* Non-zero: what a pod sends out of the cluster gets this node's address as its source. */
const volatile __u8 masquerade = 0;

/* UDP port of the overlay, host order; 0: there is none. */
const volatile __u16 overlay_port = 0;

/* First and last source port (or ICMP identifier) used for masquerading, host order. Outside
 * the node's own ip_local_port_range, else both could use the same port towards one remote
 * port. Ports that the node listens on may be among them: who connects there does not do so
 * from the very port that a pod's or a client's flow goes to. */
const volatile __u16 snat_port_first = 1024;
const volatile __u16 snat_port_last = 29999;

/* Cookie of the host's own network namespace; 0: the kernel's first one. */
const volatile __u64 host_netns_cookie = 0;

/* Slots of every service with SERVICE_MAGLEV, a prime. 0: there are none. */
const volatile __u32 maglev_table_size = 0;

/* Non-zero: XDP translates what goes to backends on other nodes, not only tc. */
const volatile __u8 xdp_services = 0;

/* Non-zero: the kernel has bpf_set_retval() (5.18), so a refused connect() can say so. */
const volatile __u8 has_set_retval = 0;
