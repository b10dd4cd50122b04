/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Reading a TCP socket: its addresses, ports and counters. */
#ifndef TCPOBS_SOCK_BPF_H
#define TCPOBS_SOCK_BPF_H

#define AF_INET 2
#define AF_INET6 10

/*
 * Fields of the structs that a tcp_sock begins with. All reads start at tcp_sock: libbpf searches the
 * kernel's types for each struct that reads start at, and start-up waits for it.
 */
#define INET(field) inet_conn.icsk_inet.field
#define SKC(field) inet_conn.icsk_inet.sk.__sk_common.field

/* Only the fields that are read: libbpf finds them in the kernel's own by name (what is behind ___ is ours).
 */
struct net___inum {
	struct {
		unsigned int inum;
	} ns;
} __attribute__((preserve_access_index));

struct file___socket {
	void *private_data;
	struct inode___mode *f_inode;
} __attribute__((preserve_access_index));

struct inode___mode {
	unsigned short i_mode;
} __attribute__((preserve_access_index));

struct socket___sk {
	struct sock *sk;
} __attribute__((preserve_access_index));

#define S_IFMT 00170000
#define S_IFSOCK 0140000

/*
 * The TCP socket behind sk, or NULL: the hooks also see SCTP, DCCP and MPTCP.
 * sk_protocol was a bit field before Linux 5.6.
 */
static __always_inline struct tcp_sock *tcp_socket(struct sock *sk)
{
	struct tcp_sock *tcp = (struct tcp_sock *)sk;

	return BPF_CORE_READ_BITFIELD_PROBED(tcp, INET(sk.sk_protocol)) == IPPROTO_TCP ? tcp : NULL;
}

/* The same of any socket: one of another family may have a protocol of that number. */
static __always_inline struct tcp_sock *tcp_socket_of_any(struct sock *sk)
{
	__u16 family = BPF_CORE_READ((struct tcp_sock *)sk, SKC(skc_family));

	return family == AF_INET || family == AF_INET6 ? tcp_socket(sk) : NULL;
}

/* The socket behind an open file, or NULL. */
static __always_inline struct sock *socket_of_file(struct file___socket *file)
{
	struct socket___sk *socket;

	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
		return NULL;
	socket = BPF_CORE_READ(file, private_data);
	return BPF_CORE_READ(socket, sk);
}

/* The socket's state now. */
static __always_inline int read_state(struct sock *sk)
{
	return BPF_CORE_READ((struct tcp_sock *)sk, SKC(skc_state));
}

/*
 * inet_sport rather than skc_num: skc_num is 0 again when the state becomes CLOSE.
 * inet_saddr rather than skc_rcv_saddr: it is what the kernel's own tracepoint reports.
 */
static __always_inline void read_endpoints(struct endpoints *endpoints, struct tcp_sock *tcp)
{
	__u32 family = BPF_CORE_READ(tcp, SKC(skc_family));

	endpoints->family = family;
	endpoints->lport = bpf_ntohs(BPF_CORE_READ(tcp, INET(inet_sport)));
	endpoints->rport = bpf_ntohs(BPF_CORE_READ(tcp, SKC(skc_dport)));
	if (family == AF_INET6 && bpf_core_field_exists(tcp->SKC(skc_v6_daddr))) {
		BPF_CORE_READ_INTO(&endpoints->laddr, tcp, SKC(skc_v6_rcv_saddr));
		BPF_CORE_READ_INTO(&endpoints->raddr, tcp, SKC(skc_v6_daddr));
	} else {
		__builtin_memset(endpoints->laddr, 0, sizeof(endpoints->laddr));
		__builtin_memset(endpoints->raddr, 0, sizeof(endpoints->raddr));
		*(__u32 *)endpoints->laddr = BPF_CORE_READ(tcp, INET(inet_saddr));
		*(__u32 *)endpoints->raddr = BPF_CORE_READ(tcp, SKC(skc_daddr));
	}
}

/* The inode number of its network namespace. */
static __always_inline __u32 read_netns(struct tcp_sock *tcp)
{
	struct net___inum *net = (void *)BPF_CORE_READ(tcp, SKC(skc_net.net));

	return BPF_CORE_READ(net, ns.inum);
}

#endif
