/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* CRC32c as SCTP uses it (RFC 9260, appendix A), kept right when two bytes of a packet change.
 * The CRC is linear: the change's own CRC, followed by as many zeros as the packet has bytes
 * after it, is XORed in, and the packet is not walked. Appending a zero byte multiplies by x^8
 * modulo the polynomial, so that n of them are four multiplications at most. */
#pragma once

#include <bpf/bpf_endian.h>
#include <linux/types.h>

/* Polynomials are bit-reversed: bit 0 is the factor of x^31. */
#define CRC32C_POLYNOMIAL 0x82f63b78u

/* [k][d]: x^(8 * d * 16^k), what d in digit k of a number of bytes multiplies by. */
static const __u32 crc32c_powers[4][16] = {
	{ 0x80000000, 0x00800000, 0x00008000, 0x00000080, 0x82f63b78, 0xfbc3faf9, 0x8b277743,
	  0x52a0c93f, 0x6ea2d55c, 0x1c08b7d6, 0xf56e0ef4, 0x34019664, 0xa66805eb, 0x7a1f6b24,
	  0xe75d06aa, 0xc94ec098 },
	{ 0x80000000, 0x18b8ea18, 0x510ac59a, 0xb2dea967, 0xb82be955, 0x36c41f1c, 0x19b29a35,
	  0xc9e90b9e, 0xb8fdb1e7, 0xe55ef1f3, 0x1fe0b5c3, 0xe0553f1e, 0x18e4a304, 0x2b830011,
	  0x56993a31, 0x0246e2e6 },
	{ 0x80000000, 0x88e56f72, 0x74c360a4, 0x631bb273, 0xe4172b16, 0x71892b1b, 0x835305c9,
	  0x196b1eae, 0x0d65762a, 0xafc81338, 0xb5a50ab7, 0xf373c3ac, 0x5f60970f, 0xd46d3063,
	  0x3a5275ea, 0x02331c01 },
	{ 0x80000000, 0x35d73a62, 0x28461564, 0x43eefc9f, 0xbf455269, 0x5edcdeb9, 0x65059450,
	  0x4e6f41a4, 0xe2ea32dc, 0xf5b95b32, 0x695a4c87, 0xf204502c, 0x9a4f01b6, 0x941a0916,
	  0x4303cb97, 0x4c3d3d65 },
};

/* What the lowest four bits leave when they are shifted out. */
static const __u32 crc32c_remainders[16] = {
	0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362,
	0x7198540d, 0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab,
	0xe330a81a, 0xf36e6f75,
};

/* Product without carries. Bits four apart leave room for the sums of ordinary multiplication,
 * of which the lowest bit is that of the product. Bit by bit it would take longer, and the
 * verifier of 6.18 follows both values of each bit's mask: "BPF program is too large". */
static __always_inline __u64 crc32c_product(__u64 a, __u64 b)
{
	const __u64 hole = 0x1111111111111111;
	__u64 a0 = a & hole, a1 = a & hole << 1, a2 = a & hole << 2, a3 = a & hole << 3;
	__u64 b0 = b & hole, b1 = b & hole << 1, b2 = b & hole << 2, b3 = b & hole << 3;

	return ((a0 * b0 ^ a1 * b3 ^ a2 * b2 ^ a3 * b1) & hole) |
	       ((a0 * b1 ^ a1 * b0 ^ a2 * b3 ^ a3 * b2) & hole << 1) |
	       ((a0 * b2 ^ a1 * b1 ^ a2 * b0 ^ a3 * b3) & hole << 2) |
	       ((a0 * b3 ^ a1 * b2 ^ a2 * b1 ^ a3 * b0) & hole << 3);
}

static __always_inline __u32 crc32c_multiply(__u32 a, __u32 b)
{
	__u64 product = crc32c_product(a, b) << 1;
	__u32 high = product;		/* powers of 32 and more: they lie in the low bits */

	for (int i = 0; i < 8; i++)
		high = high >> 4 ^ crc32c_remainders[high & 15];
	return high ^ product >> 32;
}

/* Global, so that the verifier walks it once and not at each call. */
__attribute__((noinline)) __u32 crc32c_append_zeros(__u32 crc, __u32 bytes)
{
	for (int digit = 0; digit < 4; digit++) {
		__u32 value = bytes >> 4 * digit & 15;

		if (value)
			crc = crc32c_multiply(crc, crc32c_powers[digit][value]);
	}
	return crc;
}

/* What to XOR into a CRC in a packet, where it is little-endian, when two bytes change from
 * @from to @to, the first of which is the first of @bytes up to the packet's end (65535 at
 * most). */
static __always_inline __be32 crc32c_difference(__be16 from, __be16 to, __u32 bytes)
{
	__u32 change = __builtin_bswap16(bpf_ntohs(from ^ to));

	return bpf_htonl(__builtin_bswap32(crc32c_append_zeros(change, bytes)));
}
