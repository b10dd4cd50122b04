/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the programs emit. Written here and nowhere else: Python reads the layouts from the object's BTF.
 * Times are CLOCK_MONOTONIC, in nanoseconds. Ports are in host byte order.
 */
#ifndef TCPOBS_EVENTS_H
#define TCPOBS_EVENTS_H

/* Both ends of a socket, seen from its own. An IPv4 address fills the first four bytes of its field. */
struct endpoints {
	__u8 laddr[16];
	__u8 raddr[16];
	__u16 lport;
	__u16 rport;
	__u32 family;
};

/* A process: its PID (the kernel's tgid) and the name of the task that was seen. */
struct task {
	__u32 pid;
	char comm[16];
};

struct transition {
	__u16 oldstate;
	__u16 newstate;
};

/* states: one change of a socket's state. */
struct state_change {
	__u64 skaddr;
	__u64 time_ns;
	__u64 span_ns; /* since this socket's previous change; 0 for its first */
	struct endpoints endpoints;
	struct task current; /* on the CPU at that moment; not always the owner */
	struct transition transition;
};

/* life: one session that ended. */
struct session {
	__u64 time_ns; /* of its end */
	__u64 span_ns; /* since its last change to a state before FIN_WAIT1 */
	__u64 tx_bytes;
	__u64 rx_bytes;
	struct endpoints endpoints;
	struct task owner; /* pid 0: nobody known */
	__u32 unused;
};

#endif
