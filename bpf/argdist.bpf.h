/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the programs that argdist generates begin with. They have no vmlinux.h, which would take longer to
 * compile than all the rest: the kernel's types that they reach are in them, and found anew by CO-RE.
 */
#ifndef TCPOBS_ARGDIST_BPF_H
#define TCPOBS_ARGDIST_BPF_H

#define __VMLINUX_H__ /* bpf_tracing.h: the registers have the kernel's names */

typedef unsigned char __u8, u8;
typedef unsigned short __u16, u16, __be16, __sum16;
typedef unsigned int __u32, u32, __be32, __wsum;
typedef unsigned long long __u64, u64, __be64;
typedef signed char __s8, s8;
typedef short __s16, s16;
typedef int __s32, s32;
typedef long long __s64, s64;
typedef _Bool bool;
enum { false, true };

/* include/uapi/linux/bpf.h */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_PERCPU_HASH = 5,
	BPF_MAP_TYPE_PERCPU_ARRAY = 6,
};
enum { BPF_ANY, BPF_NOEXIST };

#if defined(__TARGET_ARCH_x86)
/* arch/x86/include/asm/ptrace.h */
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs,
		flags, sp, ss;
};
/* `ret` takes the return address off the stack. */
#define RETURN_TAKES 8
#elif defined(__TARGET_ARCH_arm64)
/* arch/arm64/include/uapi/asm/ptrace.h: what struct pt_regs begins with */
struct user_pt_regs {
	__u64 regs[31];
	__u64 sp;
	__u64 pc;
	__u64 pstate;
};
struct pt_regs;
#define RETURN_TAKES 0
#endif

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include "log2.bpf.h"

#define CORE __attribute__((preserve_access_index))
#define INLINE static inline __attribute__((always_inline))

/* ---- reading memory: a value that cannot be read is 0 */

/*
 * Where a field is on this kernel.
 * (A pointer is a variable first: clang does not nest what CO-RE is made of.)
 */
#define address(pointer, field)                                                                              \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		(__typeof__(at_->field) *)__builtin_preserve_access_index(&at_->field);                      \
	})

#define kernel(pointer, field)                                                                               \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		__typeof__(at_->field) read_;                                                                \
		bpf_core_read(&read_, sizeof(read_), &at_->field);                                           \
		read_;                                                                                       \
	})

#define kernel_bits(pointer, field)                                                                          \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		BPF_CORE_READ_BITFIELD_PROBED(at_, field);                                                   \
	})

#define kernel_value(pointer)                                                                                \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		__typeof__(*at_) read_;                                                                      \
		bpf_probe_read_kernel(&read_, sizeof(read_), at_);                                           \
		read_;                                                                                       \
	})

/* The element after so many of a kernel's struct, whose size is that on this kernel. */
#define element(pointer, index)                                                                              \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		s64 size_ = bpf_core_type_size(__typeof__(*at_));                                            \
		(__typeof__(at_))((const char *)at_ + (s64)(index) * size_);                                 \
	})

#define user(pointer, field)                                                                                 \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		__typeof__(at_->field) read_;                                                                \
		bpf_probe_read_user(&read_, sizeof(read_), &at_->field);                                     \
		read_;                                                                                       \
	})

#define user_value(pointer)                                                                                  \
	({                                                                                                   \
		__auto_type at_ = pointer;                                                                   \
		__typeof__(*at_) read_;                                                                      \
		bpf_probe_read_user(&read_, sizeof(read_), at_);                                             \
		read_;                                                                                       \
	})

/* A bit field of a process's struct: `bytes` bytes at `from`, and in them `size` bits from `shift` on. */
#define user_bits(pointer, from, bytes, shift, size, type)                                                   \
	({                                                                                                   \
		u64 read_ = 0;                                                                               \
		bpf_probe_read_user(&read_, bytes, (const char *)(pointer) + (from));                        \
		(type)((type)((read_ >> (shift)) << (64 - (size))) >> (64 - (size)));                        \
	})

/* From the kernel or from the process, whichever it is. */
INLINE long bpf_probe_read_either(void *to, u32 size, const void *from)
{
	return bpf_probe_read_kernel(to, size, from) ? bpf_probe_read_user(to, size, from) : 0;
}

INLINE long bpf_probe_read_either_str(void *to, u32 size, const void *from)
{
	long length = bpf_probe_read_kernel_str(to, size, from);

	return length < 0 ? bpf_probe_read_user_str(to, size, from) : length;
}

INLINE bool equal(const char *seen, const char *text, u32 size)
{
#pragma unroll
	for (u32 i = 0; i < size; i++)
		if (seen[i] != text[i])
			return false;
	return true;
}

/* STRCMP(): does the text begin with this one? read is one of bpf_probe_read_... */
#define begins_with(read, from, text)                                                                        \
	({                                                                                                   \
		char seen_[sizeof(text)] = {};                                                               \
		!read(seen_, sizeof(text) - 1, (const void *)(from)) &&                                      \
			equal(seen_, text, sizeof(text) - 1);                                                \
	})

/*
 * ---- arithmetic that BPF does not have before -mcpu=v4: signed division, rounding to zero as C does
 * By 0 it is what BPF has it be, else the compiler might leave out what it takes for impossible.
 */

INLINE s64 divide(s64 a, s64 b)
{
	u64 quotient = b ? (u64)(a < 0 ? -(u64)a : a) / (u64)(b < 0 ? -(u64)b : b) : 0;

	return (a < 0) != (b < 0) ? -quotient : quotient;
}

INLINE s64 modulo(s64 a, s64 b)
{
	u64 rest = b ? (u64)(a < 0 ? -(u64)a : a) % (u64)(b < 0 ? -(u64)b : b) : a;

	return b && a < 0 ? -rest : rest;
}

/* ---- whose call it is */

const volatile u32 only_pid = 0, only_tid = 0; /* 0: all */

INLINE bool ours(void)
{
	u64 id = bpf_get_current_pid_tgid();

	return (!only_pid || only_pid == id >> 32) && (!only_tid || only_tid == (u32)id);
}

/* ---- counting */

/*
 * Which of each two maps is counted in. The reader changes it, waits for who is in a program, and reads
 * the other.
 */
volatile int half = 0;

/* What was lost, for each specifier. */
struct lost {
	u64 keys; /* there was no room for another key */
	u64 calls; /* there was no room to remember a call until it returns */
	u64 returns; /* calls that never returned: a longjmp, an exception */
};

/* Relaxed, and without the sum: an ordered one, or one that gives it back, needs Linux 5.12. */
#define ADD(counter) (void)__atomic_fetch_add(&(counter), 1, __ATOMIC_RELAXED)

#define COUNTS_(name, key_type)                                                                              \
	struct {                                                                                             \
		__uint(type, BPF_MAP_TYPE_PERCPU_HASH);                                                      \
		__uint(max_entries, 10240); /* --max-keys */                                                 \
		__type(key, key_type);                                                                       \
		__type(value, u64);                                                                          \
	} name SEC(".maps")

/* How often each key came. */
#define COUNTS(name, key_type)                                                                               \
	COUNTS_(name##_a, key_type);                                                                         \
	COUNTS_(name##_b, key_type)

INLINE void count_in(void *counts, const void *key, struct lost *lost)
{
	u64 none = 0, *count = bpf_map_lookup_elem(counts, key);

	if (!count) {
		bpf_map_update_elem(counts, key, &none, BPF_NOEXIST);
		count = bpf_map_lookup_elem(counts, key);
	}
	if (count)
		ADD(*count);
	else
		ADD(lost->keys);
}

#define COUNT(name, key, lost)                                                                               \
	do {                                                                                                 \
		if (half)                                                                                    \
			count_in(&name##_b, key, lost);                                                      \
		else                                                                                         \
			count_in(&name##_a, key, lost);                                                      \
	} while (0)

#define SLOTS_(name, many)                                                                                   \
	struct {                                                                                             \
		__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);                                                     \
		__uint(max_entries, 1);                                                                      \
		__type(key, u32);                                                                            \
		__type(value, u64[many]);                                                                    \
	} name SEC(".maps")

/* Numbered counters. */
#define SLOTS(name, many)                                                                                    \
	SLOTS_(name##_a, many);                                                                              \
	SLOTS_(name##_b, many)

INLINE void slot_in(void *map, u32 slot)
{
	u32 first = 0;
	u64 *slots = bpf_map_lookup_elem(map, &first);

	if (slots)
		ADD(slots[slot]);
}

#define SLOT(name, slot)                                                                                     \
	do {                                                                                                 \
		if (half)                                                                                    \
			slot_in(&name##_b, slot);                                                            \
		else                                                                                         \
			slot_in(&name##_a, slot);                                                            \
	} while (0)

/* A histogram by powers of two: slots 0 to 63; 64 is for what is below 0. */
INLINE u32 power(u64 value, bool negative)
{
	return negative ? 64 : highest_bit(value);
}

/* One by steps: slot 0 is for what is below `low`, the last for what is above `high`. */
INLINE u32 linear(s64 value, s64 low, s64 high, s64 step)
{
	u32 last = ((u64)(high - low)) / (u64)step + 2, slot;

	slot = value < low ? 0 : value > high ? last : (u32)((u64)(value - low) / (u64)step + 1);
	barrier_var(slot); /* or clang leaves out the test, which the verifier wants to see */
	return slot < last ? slot : last;
}

/* ---- from a call to its return */

/* A call is known by its thread and its frame's place on the stack, so recursion and interrupts are apart. */
struct call {
	u64 thread;
	u64 frame;
};

#define CALLS(name, value_type)                                                                              \
	struct {                                                                                             \
		__uint(type, BPF_MAP_TYPE_HASH);                                                             \
		__uint(max_entries, 16384);                                                                  \
		__type(key, struct call);                                                                    \
		__type(value, value_type);                                                                   \
	} name SEC(".maps")

INLINE void enter(void *calls, u64 frame, const void *entry, struct lost *lost)
{
	struct call call = { bpf_get_current_pid_tgid(), frame };

	/* The same frame again: the call that was in it never returned. */
	if (bpf_map_lookup_elem(calls, &call))
		ADD(lost->returns);
	if (bpf_map_update_elem(calls, &call, entry, BPF_ANY))
		ADD(lost->calls);
}

#endif
