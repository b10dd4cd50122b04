// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* life: every TCP session that ends: its owner, bytes each way, how long it lasted, how it went and ended. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>
#include "events.h"
#include "sock.bpf.h"
#include "owner.bpf.h"

struct socket_state {
	__u64 sk;
	__u64 begun_ns; /* the first change; 0: not seen */
	__u64 born_ns; /* the last change to a state before FIN_WAIT1; 0: not seen */
	struct owner owner;
	__u32 handshake_us;
	__u32 data_segs_at_close; /* that had come by the owner's close() */
	__u32 retransmits_at_close;
	int newstate;
	__u32 listed; /* the last listing that it is in */
	__u8 role; /* enum role */
	bool existing;
	bool closed; /* by close(), and not by shutdown() */
};

#include "emit.bpf.h"
#include "socket_state.bpf.h"
#include "filter.bpf.h"
#include "course.bpf.h"
#include "accept.bpf.h"
#include "snapshot.bpf.h"
#include "groups.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Puts the layouts into the object's BTF. */
struct session *emitted __attribute__((unused));
struct group *read __attribute__((unused));

/*
 * Did data come after the owner's close()? Where no error says that it was answered with a reset, it may have
 * been a repetition: the acknowledgement got lost, and with it the FIN, which was then repeated, too.
 */
static __always_inline bool has_late_data(struct tcp_sock *tcp, struct socket_state *state)
{
	return BPF_CORE_READ(tcp, data_segs_in) != state->data_segs_at_close &&
	       (BPF_CORE_READ(tcp, INET(sk.sk_err)) ||
		       BPF_CORE_READ(tcp, total_retrans) == state->retransmits_at_close);
}

/* Describes the session; false if it is not wanted. A function of its own, for many programs call it. */
static __noinline bool describe(struct session *event, struct tcp_sock *tcp, struct socket_state *state)
{
	read_endpoints(&event->endpoints, tcp);
	event->netns = read_netns(tcp);
	if (!wanted(&event->endpoints) || !wanted_owner(&state->owner, event->netns))
		return false;
	event->time_ns = bpf_ktime_get_ns();
	event->span_ns = event->time_ns - (state->born_ns ?: started_ns);
	event->tx_bytes = BPF_CORE_READ(tcp, bytes_acked);
	event->rx_bytes = BPF_CORE_READ(tcp, bytes_received);
	event->owner = state->owner.task;
	event->identity = state->owner.identity;
	event->cgroup = state->owner.cgroup;
	read_course(&event->course, tcp);
	event->course.handshake_us = state->handshake_us;
	event->course.lifetime_us = (event->time_ns - (state->begun_ns ?: event->time_ns)) / 1000;
	read_ending(&event->ending, tcp);
	event->ending.role = state->role;
	event->ending.existing = state->existing;
	event->ending.late_data = state->closed && has_late_data(tcp, state);
	return true;
}

static __always_inline void report(void *ctx, struct tcp_sock *tcp, struct socket_state *state, int oldstate)
{
	struct session event = {};

	if (!describe(&event, tcp, state))
		return;
	event.ending.oldstate = oldstate;
	if (summarize)
		add_to_group(&event);
	else
		emit(ctx, &event, sizeof(event));
}

static __always_inline bool is_birth(int newstate)
{
	return newstate < TCP_FIN_WAIT1;
}

/* Of a socket that is not known, does this change make it known? */
static __always_inline bool makes_known(int oldstate, int newstate)
{
	return is_birth(newstate) || (track_existing && oldstate != TCP_CLOSE && oldstate != TCP_LISTEN);
}

static __always_inline void note_birth(
	struct socket_state *state, struct tcp_sock *tcp, int oldstate, int newstate)
{
	__u64 now = bpf_ktime_get_ns();

	state->born_ns = now;
	state->existing = false;
	if (newstate == TCP_SYN_SENT || oldstate == TCP_SYN_SENT)
		state->role = ROLE_CONNECT;
	else if (!state->role)
		state->role = ROLE_ACCEPT;
	if (begins(oldstate, newstate))
		state->begun_ns = now;
	if (newstate != TCP_ESTABLISHED || !state->begun_ns)
		return;
	if (state->role == ROLE_CONNECT) {
		state->handshake_us = (now - state->begun_ns) / 1000;
	} else { /* its socket is made at the handshake's end; the time since the SYN-ACK is its first RTT */
		state->handshake_us = read_srtt_us(tcp);
		state->begun_ns -= state->handshake_us * 1000ULL;
	}
}

static __always_inline int on_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
	struct tcp_sock *tcp = tcp_socket(sk);
	struct socket_state *state;

	if (!tcp)
		return 0;
	state = makes_known(oldstate, newstate) ? find_or_make_state(sk) : find_state(sk);
	if (!state)
		return 0;
	if (begins(oldstate, newstate))
		clear_state(sk, state);
	if (missed_fin(state, oldstate))
		state->owner = (struct owner){};
	state->newstate = newstate;
	if (is_birth(newstate))
		note_birth(state, tcp, oldstate, newstate);
	else if (!state->born_ns)
		state->existing = true;
	if (shows_owner(tcp, oldstate, newstate, state->owner.task.pid))
		current_acted(&state->owner);
	if (newstate == TCP_FIN_WAIT1 && BPF_CORE_READ(tcp, INET(sk.sk_shutdown)) == SHUTDOWN_MASK) {
		state->closed = true;
		state->data_segs_at_close = BPF_CORE_READ(tcp, data_segs_in);
		state->retransmits_at_close = BPF_CORE_READ(tcp, total_retrans);
	}
	if (newstate != TCP_CLOSE)
		return 0;
	if (!state->existing || track_existing)
		report(ctx, tcp, state, oldstate);
	forget_state(sk, state);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(life_tp_btf, struct sock *sk, int oldstate, int newstate)
{
	return on_change(ctx, sk, oldstate, newstate);
}

static __always_inline int on_skipped(void *ctx, struct sock *sk, int oldstate, int newstate)
{
	bool known = newstate != TCP_CLOSE && makes_known(oldstate, newstate);

	return was_skipped(sk, newstate, known) ? on_change(ctx, sk, oldstate, newstate) : 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(life_tp_btf_again, struct sock *sk, int oldstate, int newstate)
{
	return on_skipped(ctx, sk, oldstate, newstate);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(life_tp_btf_preempted, struct sock *sk, int oldstate, int newstate)
{
	return on_skipped(ctx, sk, oldstate, newstate);
}

SEC("tracepoint/sock/inet_sock_set_state")
int life_tracepoint(struct trace_event_raw_inet_sock_set_state *ctx)
{
	return on_change(ctx, (struct sock *)ctx->skaddr, ctx->oldstate, ctx->newstate);
}

SEC("kprobe/tcp_set_state")
int BPF_KPROBE(life_kprobe, struct sock *sk, int newstate)
{
	return on_change(ctx, sk, read_state(sk), newstate);
}

/* SYN_RECV is entered without tcp_set_state. */
SEC("kretprobe/inet_csk_clone_lock")
int BPF_KRETPROBE(life_kprobe_clone, struct sock *sk)
{
	return sk ? on_change(ctx, sk, TCP_LISTEN, TCP_SYN_RECV) : 0;
}

/*
 * ---- what is open now: a walk over all sockets that are remembered
 *
 * Each state notes the last listing that it was in, so that none is listed twice however often a walk meets
 * it.
 */
__u32 listing = 0; /* set by the reader */

/* Describes a session that is open, once in a listing; false if there is nothing to tell. */
static __always_inline bool describe_open(struct session *event, struct sock *sk, struct socket_state *state)
{
	if (state->listed == listing || !describe(event, (struct tcp_sock *)sk, state))
		return false;
	/* After describe(), so that one which ends now does not seem to be open later than its end. */
	if (!state->newstate || state->newstate == TCP_CLOSE || state->newstate == TCP_LISTEN)
		return false;
	event->ending.open = true;
	event->ending.oldstate = state->newstate;
	return is_state_of(sk, state);
}

/*
 * sk_storage: the kernel walks. Where a page of output is full, it takes up the walk again by counting: while
 * sockets come and go, it misses some and meets others again. So the reader walks once more after such a
 * walk.
 */
SEC("iter/bpf_sk_storage_map")
int open_sk_storage(struct bpf_iter__bpf_sk_storage_map *ctx)
{
	struct socket_state *state = ctx->value;
	struct bpf_iter_meta *meta = ctx->meta;
	struct session event = {};
	struct sock *sk = ctx->sk;

	if (sk && state && describe_open(&event, sk, state) &&
		!bpf_seq_write(meta->seq, &event, sizeof(event)))
		state->listed = listing;
	return 0;
}

struct session open_session;

/*
 * Hash: the reader walks. It looks up all keys, bucket by bucket under the bucket's lock, so that it meets
 * each socket that stays; then it runs this program for each key (BPF_PROG_TEST_RUN) and reads open_session
 * when that returned 1. Nothing is attached, and it takes no iterator, which a kernel may refuse.
 */
SEC("raw_tp")
int open_hash(__u64 *arguments)
{
	struct sock *sk = (struct sock *)arguments[0];
	struct socket_state *state = find_state(sk);

	__builtin_memset(&open_session, 0, sizeof(open_session));
	if (!state || !describe_open(&open_session, sk, state))
		return 0;
	state->listed = listing;
	return 1;
}
