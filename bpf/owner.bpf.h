/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whose socket it is. */
#ifndef TCPOBS_OWNER_BPF_H
#define TCPOBS_OWNER_BPF_H

static __always_inline void read_current(struct task *task)
{
	task->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(task->comm, sizeof(task->comm));
}

/*
 * Does this change show the socket's owner? Only when a process made it: a softirq, which runs on
 * whatever task is there, takes the socket without owning it (sk_lock.owned, include/net/sock.h: set by
 * lock_sock(), and so in connect, close, and the backlog run by their caller). Of a process's changes,
 * connect() (SYN_SENT) and close() (FIN_WAIT1, LAST_ACK) count, and CLOSE while nobody is known.
 */
static __always_inline bool shows_owner(struct tcp_sock *tcp, int newstate, bool known)
{
	bool acted = newstate == TCP_SYN_SENT || newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK ||
		     (newstate == TCP_CLOSE && !known);

	return acted && BPF_CORE_READ(tcp, INET(sk.sk_lock.owned));
}

#endif
