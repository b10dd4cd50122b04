/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Which events are emitted. Asked at the very end: a filter never decides what is collected. */
#ifndef TCPOBS_FILTER_BPF_H
#define TCPOBS_FILTER_BPF_H

/* A set of ports: one bit each. `any` makes the set hold every port. */
struct ports {
	bool any;
	__u8 bits[65536 / 8];
};

const volatile struct ports lports = { .any = true };
const volatile struct ports rports = { .any = true };
const volatile __u32 only_family = 0; /* AF_INET, AF_INET6; 0: both */
const volatile __u32 only_pid = 0; /* 0: every process */

#define HOLDS(ports, port) ((ports).any || (ports).bits[(port) >> 3] & 1 << ((port) & 7))

static __always_inline bool wanted(const struct endpoints *endpoints)
{
	return HOLDS(lports, endpoints->lport) && HOLDS(rports, endpoints->rport) &&
	       (!only_family || only_family == endpoints->family);
}

#endif
