/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Who accepted a session: one of three programs is attached. A socket that accept() returns is not locked,
 * and the change that ends it may come at the same time: then its row is out already, and this is too late.
 */
#ifndef TCPOBS_ACCEPT_BPF_H
#define TCPOBS_ACCEPT_BPF_H

struct fdtable___fd {
	unsigned int max_fds;
	struct file___socket **fd;
} __attribute__((preserve_access_index));

struct files_struct___fdt {
	struct fdtable___fd *fdt;
} __attribute__((preserve_access_index));

static __always_inline int on_accept(struct sock *sk)
{
	struct tcp_sock *tcp = tcp_socket_of_any(sk);
	struct socket_state *state;

	if (!tcp || read_state(sk) == TCP_CLOSE)
		return 0;
	state = find_state(sk);
	if (!state && track_existing)
		state = make_existing(sk);
	if (!state || !is_state_of(sk, state))
		return 0;
	current_acted(&state->owner);
	if (!is_state_of(sk, state)) /* it came to be another's meanwhile: rather nobody than a wrong one */
		state->owner = (struct owner){};
	return 0;
}

/* The returned value comes behind the arguments: four, and from Linux 6.10 on two. */
SEC("fexit/inet_csk_accept")
int accept_fexit(unsigned long long *ctx)
{
	struct sock *sk;

	if (bpf_core_type_exists(struct proto_accept_arg))
		asm volatile("%0 = *(u64 *)(%1 + 16)" : "=r"(sk) : "r"(ctx));
	else
		asm volatile("%0 = *(u64 *)(%1 + 32)" : "=r"(sk) : "r"(ctx));
	return on_accept(sk);
}

SEC("kretprobe/inet_csk_accept")
int BPF_KRETPROBE(accept_kretprobe, struct sock *sk)
{
	return sk ? on_accept(sk) : 0;
}

#if defined(__TARGET_ARCH_x86)
#define SYSTEM_CALL(regs) (regs)->orig_ax /* arch/x86/entry/syscalls/syscall_64.tbl */
#define IS_ACCEPT(number) ((number) == 43 || (number) == 288)
#elif defined(__TARGET_ARCH_arm64)
#define SYSTEM_CALL(regs) (regs)->syscallno /* include/uapi/asm-generic/unistd.h */
#define IS_ACCEPT(number) ((number) == 202 || (number) == 242)
#endif

/*
 * Where functions cannot be probed. It runs at the end of every system call, so it looks at the number
 * first; a process of 32 bits, whose numbers are others, is not seen.
 */
SEC("tp_btf/sys_exit")
int BPF_PROG(accept_syscall, struct pt_regs *regs, long fd)
{
	struct task_struct___owner *task;
	struct fdtable___fd *table;
	struct file___socket **files, *file = NULL;
	struct sock *sk;

	if (!IS_ACCEPT(SYSTEM_CALL(regs)) || fd < 0)
		return 0;
	task = (void *)bpf_get_current_task();
	table = BPF_CORE_READ(task, files, fdt);
	if (fd >= BPF_CORE_READ(table, max_fds))
		return 0;
	files = BPF_CORE_READ(table, fd);
	bpf_probe_read_kernel(&file, sizeof(file), &files[fd]);
	sk = file ? socket_of_file(file) : NULL;
	return sk ? on_accept(sk) : 0;
}

#endif
