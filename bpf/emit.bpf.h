/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From the program to the reader: through a ring buffer, or perf buffers; and counting what is lost. */
#ifndef TCPOBS_EMIT_BPF_H
#define TCPOBS_EMIT_BPF_H

const volatile bool use_ring_buffer = true;

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20); /* bytes; --buffer-size */
} ring_buffer SEC(".maps");

/* For kernels before 5.8: a buffer for each CPU, which the reader makes. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, int);
	__type(value, int);
} perf_buffers SEC(".maps");

/* The reader polls. It is woken only when this many bytes wait in the ring buffer: see emit(). */
const volatile __u64 wakeup_bytes = 2 << 20;

/* What the programs lose; and, of the changes that the kernel counts as skipped, those that were not lost. */
struct {
	__u64 buffer_full;
	__u64 sockets_full;
	__u64 recovered; /* see was_skipped() */
	__u64 groups_full;
} lost;

/* Relaxed, and without the sum: an ordered one, or one that gives it back, needs Linux 5.12. */
#define ADD(counter, many) (void)__atomic_fetch_add(&(counter), many, __ATOMIC_RELAXED)
#define COUNT(counter) ADD(counter, 1)

/*
 * A wake-up from in here raises an interrupt; on its way out the kernel runs softirqs, or another task, which
 * change TCP states, and a program is not entered again while it runs on this CPU. So wake once, when the
 * threshold is passed, and not for each event (docs/design.md has the measurements). Two CPUs may pass it
 * together and see neither: then the reader comes at its next poll. Perf buffers have a threshold of their
 * own, set by the reader.
 */
static __always_inline void emit(void *ctx, void *event, __u64 size)
{
	__u64 before, after, wakeup;
	long error;

	if (use_ring_buffer) {
		before = bpf_ringbuf_query(&ring_buffer, BPF_RB_AVAIL_DATA);
		after = before + size + BPF_RINGBUF_HDR_SZ;
		wakeup = before < wakeup_bytes && after >= wakeup_bytes;
		error = bpf_ringbuf_output(
			&ring_buffer, event, size, wakeup ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	} else {
		error = bpf_perf_event_output(ctx, &perf_buffers, BPF_F_CURRENT_CPU, event, size);
	}
	if (error)
		COUNT(lost.buffer_full);
}

#endif
