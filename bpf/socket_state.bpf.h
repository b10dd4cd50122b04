/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a program remembers of each socket, as a struct socket_state that it defines before this include.
 * Its members sk, owner, newstate (the last change's) and existing are used here and in the other headers.
 * Kept in the socket itself (sk_storage), which frees it with the socket and has no limit of its own; or
 * in a hash map by the socket's address, where the kernel does not give sk_storage to tracing programs
 * (before 5.11) or to this kind of program (tracepoint, kprobe).
 */
#ifndef TCPOBS_SOCKET_STATE_BPF_H
#define TCPOBS_SOCKET_STATE_BPF_H

const volatile bool use_sk_storage = true;

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_state);
} socket_storage SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1 << 18); /* --max-sockets */
	__type(key, __u64);
	__type(value, struct socket_state);
} socket_hash SEC(".maps");

/* What is known of the socket, or NULL. */
static __always_inline struct socket_state *find_state(struct sock *sk)
{
	__u64 key = (__u64)sk;

	if (use_sk_storage)
		return bpf_sk_storage_get(&socket_storage, sk, NULL, 0);
	return bpf_map_lookup_elem(&socket_hash, &key);
}

/* A new one, all zero. NULL when there is no room. */
static __always_inline struct socket_state *make_state(struct sock *sk)
{
	struct socket_state empty = { .sk = (__u64)sk };
	__u64 key = (__u64)sk;

	if (use_sk_storage)
		return bpf_sk_storage_get(&socket_storage, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	bpf_map_update_elem(&socket_hash, &key, &empty, BPF_NOEXIST);
	return bpf_map_lookup_elem(&socket_hash, &key);
}

/* What is known of the socket, or a new one. NULL when there is no room, which is counted. */
static __always_inline struct socket_state *find_or_make_state(struct sock *sk)
{
	struct socket_state *state = use_sk_storage ? NULL : find_state(sk);

	if (!state)
		state = make_state(sk);
	if (!state)
		COUNT(lost.sockets_full);
	return state;
}

/* The state of a socket whose life begins: what is in it is of an earlier one. */
static __always_inline void clear_state(struct sock *sk, struct socket_state *state)
{
	__builtin_memset(state, 0, sizeof(*state));
	state->sk = (__u64)sk;
}

/*
 * Is it still this socket's? A change that ends it may come at the same time, but for who holds the socket's
 * lock; and the kernel uses the memory of what is deleted from a hash at once again.
 */
static __always_inline bool is_state_of(struct sock *sk, struct socket_state *state)
{
	return use_sk_storage || *(volatile __u64 *)&state->sk == (__u64)sk;
}

/* Sessions older than the trace are remembered too: those of its start (the snapshot), and those that change.
 */
const volatile bool track_existing = false;
const volatile __u64 started_ns = 0; /* CLOCK_MONOTONIC at the trace's start */

/* The state of a session that is older than the trace. NULL when there is no room, which is counted. */
static __always_inline struct socket_state *make_existing(struct sock *sk)
{
	struct socket_state *state = find_or_make_state(sk);

	if (state) {
		state->existing = true;
		state->newstate = read_state(sk);
	}
	return state;
}

/*
 * Is this the first change of a socket's life? What is known of it then is of an earlier socket at the same
 * address, whose CLOSE was missed: it must not be told of this one.
 */
static __always_inline bool begins(int oldstate, int newstate)
{
	return oldstate == TCP_CLOSE || (oldstate == TCP_LISTEN && newstate == TCP_SYN_RECV);
}

/* Was the change missed by which a FIN was sent? Then who closed is not known, whoever acted before. */
static __always_inline bool missed_fin(struct socket_state *state, int oldstate)
{
	return is_before_fin(state->newstate) && is_after_fin(oldstate);
}

/* At CLOSE: what was known is over, though the socket may live on and connect again. */
static __always_inline void forget_state(struct sock *sk, struct socket_state *state)
{
	__u64 key = (__u64)sk;

	if (use_sk_storage)
		*state = (struct socket_state){ .newstate = TCP_CLOSE };
	else
		bpf_map_delete_elem(&socket_hash, &key);
}

/*
 * The kernel does not enter a program that is running on this CPU already: a softirq's change is skipped when
 * it comes while a process is in the program, and from Linux 7.0 on, where tracepoints can be preempted, any
 * number may be. So a second program of the same kind is attached behind the first, and does what the first
 * had to leave: each leaves a change's newstate in the socket's state, and the socket is locked meanwhile.
 * Where tracepoints can be preempted, there is a third.
 *
 * Was this change left? makes_state: the first program would have made a state for it.
 */
static __always_inline bool was_skipped(struct sock *sk, int newstate, bool makes_state)
{
	struct socket_state *state = find_state(sk);
	bool skipped = state ? state->newstate != newstate : makes_state && tcp_socket(sk) && make_state(sk);

	if (skipped)
		COUNT(lost.recovered);
	return skipped;
}

#endif
