/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From the program to the reader: reserve, submit, and count what is lost. */
#ifndef TCPOBS_EMIT_BPF_H
#define TCPOBS_EMIT_BPF_H

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20); /* bytes; --buffer-size */
} events SEC(".maps");

/* The reader polls. It is woken only when this many bytes wait: see submit(). */
const volatile __u64 wakeup_bytes = 2 << 20;

/* Every way for a program to lose an event, counted. */
struct {
	__u64 ring_full;
	__u64 sockets_full;
} lost;

/* Relaxed, and without the sum: an ordered one, or one that gives it back, needs Linux 5.12. */
#define COUNT(counter) (void)__atomic_fetch_add(&(counter), 1, __ATOMIC_RELAXED)

/* Room for one event, or NULL (and counted). A macro, for the verifier wants a constant size. */
#define reserve(type)                                                                                        \
	({                                                                                                   \
		type *room_ = bpf_ringbuf_reserve(&events, sizeof(type), 0);                                 \
		if (!room_)                                                                                  \
			COUNT(lost.ring_full);                                                               \
		room_;                                                                                       \
	})

/*
 * A wake-up from in here raises an interrupt; on its way out the kernel runs softirqs, which change TCP
 * states, and a program is not entered again while it runs on this CPU: those events would be lost. So
 * wake once, when the threshold is passed, and not for each event (docs/design.md has the measurements).
 */
static __always_inline void submit(void *event, __u64 size)
{
	__u64 waiting = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	__u64 before = waiting - size - BPF_RINGBUF_HDR_SZ;

	bpf_ringbuf_submit(event,
		before < wakeup_bytes && waiting >= wakeup_bytes ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

#endif
