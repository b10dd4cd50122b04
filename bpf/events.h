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

/* What else is known of an owner. All zero where nobody is known. */
struct identity {
	__u32 tid; /* the task that was seen */
	__u32 uid;
};

/* states: one change of a socket's state. */
struct state_change {
	__u64 skaddr;
	__u64 time_ns;
	__u64 span_ns; /* since this socket's previous change; 0 for its first */
	struct endpoints endpoints;
	struct task current; /* on the CPU at that moment; not always the owner */
	struct transition transition;
	__u32 netns;
	struct task owner; /* pid 0: nobody known, or not asked for (track_owners) */
	struct identity identity;
	__u64 cgroup;
};

/* How a session went. Times in microseconds, 0 where they are not known; segments with their repetitions. */
struct course {
	__u64 lifetime_us; /* from the first change that was seen, and a server's from its SYN-ACK, to the end
			    */
	__u32 handshake_us;
	__u32 srtt_us;
	__u32 min_rtt_us;
	__u32 retransmits;
	__u32 lost;
	__u32 segs_in;
	__u32 segs_out;
	__u32 delivered;
	char congestion[16]; /* the algorithm's name */
};

enum role { ROLE_UNKNOWN, ROLE_CONNECT, ROLE_ACCEPT };

/* What there was to see of a session's end; tcpobs.records.Ending makes a name of it. */
struct ending {
	__u16 error; /* sk_err, an errno */
	__u8 oldstate; /* before CLOSE; the state now, of one that is open */
	__u8 role; /* enum role */
	__u8 open; /* it has not ended: this is how far it is */
	__u8 existing; /* older than the trace: span_ns counts from the trace's start */
	__u8 by_process; /* CLOSE was set by a process, which held the socket's lock */
	__u8 shut; /* sk_shutdown: 1 for receiving, 2 for sending */
	__u8 linger_zero; /* SO_LINGER of 0 seconds was set */
	__u8 fin_received; /* the peer's FIN had come */
	__u8 orphaned; /* no process had it any more */
	__u8 late_data; /* data came after the owner's close() */
	__u8 retransmits; /* in a row, unanswered */
	__u8 probes; /* keepalive or zero window, unanswered */
	__u8 sent; /* any segment */
};

/* life: one session that ended; or that is open. */
struct session {
	__u64 time_ns; /* of its end */
	__u64 span_ns; /* since its last change to a state before FIN_WAIT1 */
	__u64 tx_bytes;
	__u64 rx_bytes;
	struct endpoints endpoints;
	struct task owner; /* pid 0: nobody known */
	__u32 netns; /* its network namespace's inode number */
	struct identity identity;
	__u64 cgroup; /* the id of the owner's (v2) */
	struct course course;
	struct ending ending;
};

/* life --summary: what tells one group from another. What was not asked for is 0. */
struct group_key {
	__u64 cgroup;
	struct endpoints endpoints; /* the addresses and their family alone */
	struct task owner;
	__u32 uid; /* UID_UNKNOWN: nobody is known */
	__u32 netns;
	__u16 port; /* of the one who was connected to */
	__u16 role; /* enum role */
};

#define UID_UNKNOWN ~0U /* 0 is root */

/*
 * How often values below 2^bits came, in microseconds, eight buckets for each power of two: tools/summary.py.
 * With these a group takes a little less than 2 KiB, as the kernel allocates it.
 */
#define BUCKETS(bits) (8 * ((bits) - 2))
#define DURATION_BITS 38 /* 76 hours */
#define RTT_BITS 24 /* 17 seconds */

struct durations {
	__u32 counts[BUCKETS(DURATION_BITS)];
};

struct round_trips {
	__u32 counts[BUCKETS(RTT_BITS)];
};

struct group_sums {
	__u64 sessions;
	__u64 failed;
	__u64 tx_bytes;
	__u64 rx_bytes;
	struct durations durations; /* but of sessions that are older than the trace */
	struct round_trips rtts; /* smoothed, at the end; where it is known */
};

/* A group as the reader puts it together: when, and an entry of the map. */
struct group {
	__u64 time_ns;
	struct group_key key;
	struct group_sums sums;
};

#endif
