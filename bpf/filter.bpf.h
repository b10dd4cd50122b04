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
const volatile __s64 only_uid = -1; /* -1: every user */
const volatile char only_comm[16] = {}; /* empty: every name */
const volatile __u32 only_netns = 0; /* an inode number; 0: every network namespace */

/* Networks, one of which must hold either end: --net. */
struct network {
	__u32 address[4]; /* in network byte order; bits outside the mask are 0 */
	__u32 mask[4];
	__u32 family;
};

#define MAX_NETWORKS 16
const volatile struct network networks[MAX_NETWORKS];
const volatile __u32 network_count = 0; /* 0: every network */

static __always_inline bool is_within(const volatile struct network *network, const __u8 *bytes)
{
	const __u32 *address = (const __u32 *)bytes;

	return (address[0] & network->mask[0]) == network->address[0] &&
	       (address[1] & network->mask[1]) == network->address[1] &&
	       (address[2] & network->mask[2]) == network->address[2] &&
	       (address[3] & network->mask[3]) == network->address[3];
}

static __always_inline bool is_in_networks(const struct endpoints *endpoints)
{
	if (!network_count)
		return true;
	for (__u32 i = 0; i < MAX_NETWORKS && i < network_count; i++) {
		if (networks[i].family != endpoints->family)
			continue;
		if (is_within(&networks[i], endpoints->laddr) || is_within(&networks[i], endpoints->raddr))
			return true;
	}
	return false;
}

static __always_inline bool is_named(const struct task *task)
{
	for (int i = 0; i < 16; i++) {
		if (task->comm[i] != only_comm[i])
			return false;
		if (!only_comm[i])
			break;
	}
	return true;
}

/* Is this whose sessions are wanted? */
static __always_inline bool wanted_owner(const struct owner *owner, __u32 netns)
{
	return (!only_pid || only_pid == owner->task.pid) &&
	       (only_uid < 0 || (owner->task.pid && only_uid == owner->identity.uid)) &&
	       (!only_cgroup || (owner->task.pid && owner->in_cgroup)) &&
	       (!only_comm[0] || (owner->task.pid && is_named(&owner->task))) &&
	       (!only_netns || only_netns == netns);
}

#define HOLDS(ports, port) ((ports).any || (ports).bits[(port) >> 3] & 1 << ((port) & 7))

static __always_inline bool wanted(const struct endpoints *endpoints)
{
	return HOLDS(lports, endpoints->lport) && HOLDS(rports, endpoints->rport) &&
	       (!only_family || only_family == endpoints->family) && is_in_networks(endpoints);
}

#endif
