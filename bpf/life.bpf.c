// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* life: every TCP session that ends: its owner, bytes each way, and how long it lasted. */
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>
#include "events.h"

struct socket_state {
	__u64 born_ns; /* the last change to a state before FIN_WAIT1; 0: not seen */
	struct task owner; /* pid 0: nobody known */
	int newstate;
};

#include "emit.bpf.h"
#include "sock.bpf.h"
#include "socket_state.bpf.h"
#include "filter.bpf.h"
#include "owner.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

/* Puts the event's layout into the object's BTF. */
struct session *emitted __attribute__((unused));

static __always_inline void report(void *ctx, struct tcp_sock *tcp, struct socket_state *state)
{
	struct session event = {};

	read_endpoints(&event.endpoints, tcp);
	if (!wanted(&event.endpoints) || (only_pid && only_pid != state->owner.pid))
		return;
	event.time_ns = bpf_ktime_get_ns();
	event.span_ns = event.time_ns - state->born_ns;
	event.tx_bytes = BPF_CORE_READ(tcp, bytes_acked);
	event.rx_bytes = BPF_CORE_READ(tcp, bytes_received);
	event.owner = state->owner;
	emit(ctx, &event, sizeof(event));
}

static __always_inline bool is_birth(int newstate)
{
	return newstate < TCP_FIN_WAIT1;
}

static __always_inline int on_change(void *ctx, struct sock *sk, int oldstate, int newstate)
{
	struct tcp_sock *tcp = tcp_socket(sk);
	struct socket_state *state;

	if (!tcp)
		return 0;
	state = is_birth(newstate) ? find_or_make_state(sk) : find_state(sk);
	if (!state)
		return 0;
	if (begins(oldstate, newstate))
		__builtin_memset(state, 0, sizeof(*state));
	state->newstate = newstate;
	if (is_birth(newstate))
		state->born_ns = bpf_ktime_get_ns();
	if (shows_owner(tcp, newstate, state->owner.pid))
		read_current(&state->owner);
	if (newstate != TCP_CLOSE)
		return 0;
	if (state->born_ns)
		report(ctx, tcp, state);
	forget_state(sk, state);
	return 0;
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(life_tp_btf, struct sock *sk, int oldstate, int newstate)
{
	return on_change(ctx, sk, oldstate, newstate);
}

SEC("tp_btf/inet_sock_set_state")
int BPF_PROG(life_tp_btf_again, struct sock *sk, int oldstate, int newstate)
{
	return was_skipped(sk, newstate, is_birth(newstate)) ? on_change(ctx, sk, oldstate, newstate) : 0;
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
