// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* states: every change of a TCP socket's state, with the time spent in the old one. */
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
	__u64 changed_ns; /* 0: no change seen yet */
	struct owner owner;
	int newstate;
	bool existing;
};

#include "emit.bpf.h"
#include "socket_state.bpf.h"
#include "filter.bpf.h"
#include "accept.bpf.h"
#include "snapshot.bpf.h"

const volatile bool track_owners = false;

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Puts the event's layout into the object's BTF. */
struct state_change *emitted __attribute__((unused));

static __always_inline int on_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
	struct tcp_sock *tcp = tcp_socket(sk);
	struct state_change event = {};
	struct owner owner = {};
	struct socket_state *state;

	if (!tcp)
		return 0;
	event.skaddr = (__u64)sk;
	event.time_ns = bpf_ktime_get_ns();
	state = find_or_make_state(sk);
	if (state) {
		if (begins(oldstate, newstate))
			clear_state(sk, state);
		if (state->changed_ns)
			event.span_ns = event.time_ns - state->changed_ns;
		state->changed_ns = event.time_ns;
		if (missed_fin(state, oldstate))
			state->owner = (struct owner){};
		state->newstate = newstate;
		if (track_owners) {
			if (shows_owner(tcp, oldstate, newstate, state->owner.task.pid))
				current_acted(&state->owner);
			owner = state->owner;
		}
		if (newstate == TCP_CLOSE)
			forget_state(sk, state);
	}

	read_endpoints(&event.endpoints, tcp);
	event.netns = read_netns(tcp);
	if (!wanted(&event.endpoints) || !wanted_owner(&owner, event.netns))
		return 0;
	event.transition.oldstate = oldstate;
	event.transition.newstate = newstate;
	read_current(&event.current);
	event.owner = owner.task;
	event.identity = owner.identity;
	event.cgroup = owner.cgroup;
	emit(ctx, &event, sizeof(event));
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(states_tp_btf, struct sock *sk, int oldstate, int newstate)
{
	return on_change(ctx, sk, oldstate, newstate);
}

static __always_inline int on_skipped(void *ctx, struct sock *sk, int oldstate, int newstate)
{
	return was_skipped(sk, newstate, newstate != TCP_CLOSE) ? on_change(ctx, sk, oldstate, newstate) : 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(states_tp_btf_again, struct sock *sk, int oldstate, int newstate)
{
	return on_skipped(ctx, sk, oldstate, newstate);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(states_tp_btf_preempted, struct sock *sk, int oldstate, int newstate)
{
	return on_skipped(ctx, sk, oldstate, newstate);
}

SEC("tracepoint/sock/inet_sock_set_state")
int states_tracepoint(struct trace_event_raw_inet_sock_set_state *ctx)
{
	return on_change(ctx, (struct sock *)ctx->skaddr, ctx->oldstate, ctx->newstate);
}

SEC("kprobe/tcp_set_state")
int BPF_KPROBE(states_kprobe, struct sock *sk, int newstate)
{
	return on_change(ctx, sk, read_state(sk), newstate);
}

/* LISTEN and SYN_RECV are entered without tcp_set_state. */
SEC("kprobe/inet_csk_listen_start")
int BPF_KPROBE(states_kprobe_listen, struct sock *sk)
{
	return on_change(ctx, sk, read_state(sk), TCP_LISTEN);
}

SEC("kretprobe/inet_csk_clone_lock")
int BPF_KRETPROBE(states_kprobe_clone, struct sock *sk)
{
	return sk ? on_change(ctx, sk, TCP_LISTEN, TCP_SYN_RECV) : 0;
}
