/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The logarithm of histograms. Also for the programs that argdist generates, which have no vmlinux.h. */
#ifndef TCPOBS_LOG2_BPF_H
#define TCPOBS_LOG2_BPF_H

/* The number of a value's highest bit; 0 for 0. Without a branch: the verifier would go both ways at each. */
static __always_inline __u32 highest_bit(__u64 value)
{
	/* All bits below the highest are set, and counted. */
	value >>= 1;
#pragma unroll
	for (__u32 width = 1; width < 64; width <<= 1)
		value |= value >> width;
	value -= value >> 1 & 0x5555555555555555;
	value = (value & 0x3333333333333333) + (value >> 2 & 0x3333333333333333);
	value = (value + (value >> 4)) & 0x0f0f0f0f0f0f0f0f;
	value = value * 0x0101010101010101 >> 56;
	barrier_var(value); /* or clang leaves out the limit, which the verifier wants to see */
	return value & 63;
}

#endif
