/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Sessions that are not emitted, but summed up in here, by what they have in common. */
#ifndef TCPOBS_GROUPS_BPF_H
#define TCPOBS_GROUPS_BPF_H

#include "log2.bpf.h"

const volatile bool summarize = false;

/* What they have in common: --by. */
const volatile struct {
	bool pid, comm, uid, role, raddr, laddr, port, netns, cgroup;
} by = {};

#define GROUPS(name)                                                                                         \
	struct {                                                                                             \
		__uint(type, BPF_MAP_TYPE_HASH);                                                             \
		__uint(map_flags, BPF_F_NO_PREALLOC);                                                        \
		__uint(max_entries, 10240); /* --max-groups */                                               \
		__type(key, struct group_key);                                                               \
		__type(value, struct group_sums);                                                            \
	} name SEC(".maps")

GROUPS(groups_a);
GROUPS(groups_b);

/* Which of the two is added to; the reader changes it, waits for who is in a program, and reads the other. */
volatile int half = 0;

/* What a group begins with: too large for the stack. */
const struct group_sums no_sums = {};

/* The port of the one who was connected to; of a session whose beginning was not seen, the lower port. */
static __always_inline __u16 service_port(const struct session *session)
{
	__u16 lport = session->endpoints.lport, rport = session->endpoints.rport;

	if (session->ending.role == ROLE_UNKNOWN)
		return lport < rport ? lport : rport;
	return session->ending.role == ROLE_CONNECT ? rport : lport;
}

static __always_inline void read_key(struct group_key *key, const struct session *session)
{
	const struct endpoints *endpoints = &session->endpoints;

	if (by.pid)
		key->owner.pid = session->owner.pid;
	if (by.comm)
		__builtin_memcpy(key->owner.comm, session->owner.comm, sizeof(key->owner.comm));
	if (by.uid)
		key->uid = session->owner.pid ? session->identity.uid : UID_UNKNOWN;
	if (by.role)
		key->role = session->ending.role;
	if (by.raddr)
		__builtin_memcpy(key->endpoints.raddr, endpoints->raddr, sizeof(endpoints->raddr));
	if (by.laddr)
		__builtin_memcpy(key->endpoints.laddr, endpoints->laddr, sizeof(endpoints->laddr));
	if (by.raddr || by.laddr)
		key->endpoints.family = endpoints->family;
	if (by.port)
		key->port = service_port(session);
	if (by.netns)
		key->netns = session->netns;
	if (by.cgroup)
		key->cgroup = session->cgroup;
}

/*
 * The bucket of a value: each power of two has eight, and so each value below 16 its own. What is too large
 * is in the last.
 */
static __always_inline __u32 bucket_of(__u64 value, __u32 buckets)
{
	__u32 shift = highest_bit(value | 8) - 3;
	__u64 bucket = shift * 8 + (value >> shift);

	if (bucket >= buckets)
		bucket = buckets - 1;
	barrier_var(bucket); /* or clang leaves out what the verifier wants to see */
	return bucket < buckets ? bucket : 0;
}

/* So full is a bucket that it stays so. Not the last number: other CPUs may be adding to it. */
#define BUCKET_FULL 0xffff0000

static __always_inline void count_in(__u32 *counts, __u32 buckets, __u64 value)
{
	__u32 *count = &counts[bucket_of(value, buckets)];

	if (*count < BUCKET_FULL)
		COUNT(*count);
}

/* A function of its own: the object has it once, not in each program. */
static __noinline void add_to_group(const struct session *session)
{
	void *groups = half ? &groups_b : (void *)&groups_a;
	struct group_key key = {};
	struct group_sums *sums;

	read_key(&key, session);
	sums = bpf_map_lookup_elem(groups, &key);
	if (!sums) {
		bpf_map_update_elem(groups, &key, &no_sums, BPF_NOEXIST);
		sums = bpf_map_lookup_elem(groups, &key);
	}
	if (!sums) {
		COUNT(lost.groups_full);
		return;
	}
	COUNT(sums->sessions);
	if (has_failed(&session->ending))
		COUNT(sums->failed);
	ADD(sums->tx_bytes, session->tx_bytes);
	ADD(sums->rx_bytes, session->rx_bytes);
	if (!session->ending.existing)
		count_in(sums->durations.counts, BUCKETS(DURATION_BITS), session->span_ns / 1000);
	if (session->course.srtt_us)
		count_in(sums->rtts.counts, BUCKETS(RTT_BITS), session->course.srtt_us);
}

#endif
