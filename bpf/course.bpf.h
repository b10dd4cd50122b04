/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* How a session went, and what there is to see of its end. */
#ifndef TCPOBS_COURSE_BPF_H
#define TCPOBS_COURSE_BPF_H

#define SHUTDOWN_MASK 3 /* include/net/sock.h: both ways */

struct tcp_congestion_ops___name {
	char name[16];
} __attribute__((preserve_access_index));

/* The smoothed round-trip time, which the kernel keeps in eighths. */
static __always_inline __u32 read_srtt_us(struct tcp_sock *tcp)
{
	return BPF_CORE_READ(tcp, srtt_us) >> 3;
}

static __always_inline void read_course(struct course *course, struct tcp_sock *tcp)
{
	struct tcp_congestion_ops___name *congestion = (void *)BPF_CORE_READ(tcp, inet_conn.icsk_ca_ops);
	__u32 min_rtt_us = BPF_CORE_READ(tcp, rtt_min.s[0].v);

	course->srtt_us = read_srtt_us(tcp);
	course->min_rtt_us = min_rtt_us == ~0U ? 0 : min_rtt_us; /* ~0: not measured */
	course->retransmits = BPF_CORE_READ(tcp, total_retrans);
	course->lost = BPF_CORE_READ(tcp, lost);
	course->segs_in = BPF_CORE_READ(tcp, segs_in);
	course->segs_out = BPF_CORE_READ(tcp, segs_out);
	course->delivered = BPF_CORE_READ(tcp, delivered);
	BPF_CORE_READ_INTO(&course->congestion, congestion, name);
}

static __always_inline void read_ending(struct ending *ending, struct tcp_sock *tcp)
{
	unsigned long flags = BPF_CORE_READ(tcp, INET(sk.__sk_common.skc_flags));

	ending->error = BPF_CORE_READ(tcp, INET(sk.sk_err));
	ending->by_process = BPF_CORE_READ(tcp, INET(sk.sk_lock.owned));
	ending->shut = BPF_CORE_READ(tcp, INET(sk.sk_shutdown));
	ending->linger_zero = flags & 1 << SOCK_LINGER && !BPF_CORE_READ(tcp, INET(sk.sk_lingertime));
	ending->fin_received = !!(flags & 1 << SOCK_DONE);
	ending->orphaned = !!(flags & 1 << SOCK_DEAD);
	ending->retransmits = BPF_CORE_READ(tcp, inet_conn.icsk_retransmits);
	ending->probes = BPF_CORE_READ(tcp, inet_conn.icsk_probes_out);
	ending->sent = BPF_CORE_READ(tcp, segs_out) > 0;
}

/* It ended by an error, or was never established. As tcpobs.records.Ending.failed. */
static __always_inline bool has_failed(const struct ending *ending)
{
	return ending->error || ending->oldstate == TCP_SYN_SENT || ending->oldstate == TCP_SYN_RECV;
}

#endif
