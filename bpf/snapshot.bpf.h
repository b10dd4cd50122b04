/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The sessions that were there before: a walk over all open files of all processes, once, when everything
 * else is attached. It finds sockets of all network namespaces, each with who holds it.
 */
#ifndef TCPOBS_SNAPSHOT_BPF_H
#define TCPOBS_SNAPSHOT_BPF_H

static __always_inline int is_held(struct sock *sk, struct task_struct___owner *task)
{
	struct tcp_sock *tcp = tcp_socket_of_any(sk);
	struct socket_state *state;
	int now;

	if (!tcp)
		return 0;
	now = read_state(sk);
	if (now == TCP_CLOSE || now == TCP_LISTEN)
		return 0;
	state = find_state(sk);
	if (!state)
		state = make_existing(sk);
	if (!state || !is_state_of(sk, state))
		return 0;
	task_holds(&state->owner, task);
	if (!is_state_of(sk, state)) /* as in on_accept() */
		state->owner = (struct owner){};
	return 0;
}

SEC("iter/task_file")
int snapshot(struct bpf_iter__task_file *ctx)
{
	struct task_struct___owner *task = (void *)ctx->task;
	struct file___socket *file = (void *)ctx->file;
	struct socket___sk *socket;
	struct sock *sk;

	if (!task || !file)
		return 0;
	if (use_sk_storage) { /* which takes a pointer that the verifier knows */
		socket = (void *)bpf_sock_from_file((void *)file);
		return socket && socket->sk ? is_held(socket->sk, task) : 0;
	}
	sk = socket_of_file(file);
	return sk ? is_held(sk, task) : 0;
}

#endif
