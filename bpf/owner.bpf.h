/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Whose socket it is. */
#ifndef TCPOBS_OWNER_BPF_H
#define TCPOBS_OWNER_BPF_H

#define PF_KTHREAD 0x00200000 /* include/linux/sched.h */
#define ECONNABORTED 103

/* A cgroup, and all below it: --cgroup, --container. */
const volatile __u64 only_cgroup = 0; /* its id; 0: every cgroup */
const volatile __u32 only_cgroup_level = 0; /* its depth below the root */

/* What makes a process the owner, the weakest first. */
enum evidence {
	EVIDENCE_NONE,
	EVIDENCE_HELD, /* it alone held the socket when the trace began */
	EVIDENCE_SHARED, /* several did: nobody is named */
	EVIDENCE_ACTED, /* it connected, accepted, or closed */
};

struct owner {
	__u64 cgroup;
	struct identity identity;
	struct task task;
	__u8 evidence;
	bool in_cgroup; /* of only_cgroup */
};

struct kernfs_node___id {
	__u64 id;
} __attribute__((preserve_access_index));

/* One declaration of each kernel struct: libbpf looks through all of the kernel's types for each. */
struct cgroup___owner {
	int level;
	struct kernfs_node___id *kn;
	struct cgroup___owner *ancestors[1]; /* Linux 6.1; as many as it is deep */
	__u64 ancestor_ids[1]; /* before */
} __attribute__((preserve_access_index));

struct css_set___default {
	struct cgroup___owner *dfl_cgrp;
} __attribute__((preserve_access_index));

struct cred___uid {
	struct {
		unsigned int val;
	} uid;
} __attribute__((preserve_access_index));

struct task_struct___owner {
	unsigned int flags;
	int pid;
	int tgid;
	char comm[16];
	struct cred___uid *cred;
	struct css_set___default *cgroups;
	struct files_struct___fdt *files;
} __attribute__((preserve_access_index));

static __always_inline void read_current(struct task *task)
{
	task->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(task->comm, sizeof(task->comm));
}

static __always_inline bool is_in_cgroup(struct cgroup___owner *cgroup)
{
	__u32 level = only_cgroup_level;
	__u64 id = 0;

	if (!only_cgroup)
		return true;
	if (BPF_CORE_READ(cgroup, level) < (int)level)
		return false;
	if (bpf_core_field_exists(cgroup->ancestors)) {
		struct cgroup___owner *ancestor = NULL;

		bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
			(void *)cgroup + bpf_core_field_offset(cgroup->ancestors) + level * sizeof(ancestor));
		id = BPF_CORE_READ(ancestor, kn, id);
	} else {
		bpf_probe_read_kernel(&id, sizeof(id),
			(void *)cgroup + bpf_core_field_offset(cgroup->ancestor_ids) + level * sizeof(id));
	}
	return id == only_cgroup;
}

static __always_inline void read_owner(
	struct owner *owner, struct task_struct___owner *task, enum evidence evidence)
{
	struct cgroup___owner *cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);

	owner->cgroup = BPF_CORE_READ(cgroup, kn, id);
	owner->identity.tid = BPF_CORE_READ(task, pid);
	owner->identity.uid = BPF_CORE_READ(task, cred, uid.val);
	owner->in_cgroup = is_in_cgroup(cgroup);
	owner->evidence = evidence;
	BPF_CORE_READ_INTO(&owner->task.comm, task, comm);
	owner->task.pid = BPF_CORE_READ(task, tgid);
}

static __always_inline bool is_kernel_thread(struct task_struct___owner *task)
{
	return BPF_CORE_READ(task, flags) & PF_KTHREAD;
}

#define IS_ONE_OF(state, states) (1 << (state) & (states))

/* States in which no FIN has been sent. */
static __always_inline bool is_before_fin(int state)
{
	return IS_ONE_OF(state, 1 << TCP_ESTABLISHED | 1 << TCP_SYN_SENT | 1 << TCP_SYN_RECV |
					1 << TCP_CLOSE_WAIT | 1 << TCP_LISTEN);
}

/* States in which one has, and the session is not over. */
static __always_inline bool is_after_fin(int state)
{
	return IS_ONE_OF(
		state, 1 << TCP_FIN_WAIT1 | 1 << TCP_FIN_WAIT2 | 1 << TCP_CLOSING | 1 << TCP_LAST_ACK);
}

/*
 * Does this change show the socket's owner? Only when a process made it: a softirq, which runs on
 * whatever task is there, takes the socket without owning it (sk_lock.owned, include/net/sock.h: set by
 * lock_sock(), and so in connect, close, and the backlog run by their caller). Of a process's changes,
 * connect() (SYN_SENT), listen() and close() count. That leads to FIN_WAIT1 or LAST_ACK; where it resets, to
 * CLOSE, with no FIN sent before and no error of the socket's. Another CLOSE counts while nobody is known;
 * but for that of tcp_abort(), which `ss -K` calls. Nor does a kernel thread own what it only closes: it does
 * so for a process whose last descriptor it was.
 */
static __always_inline bool shows_owner(struct tcp_sock *tcp, int oldstate, int newstate, bool known)
{
	bool opens = newstate == TCP_SYN_SENT || newstate == TCP_LISTEN;
	bool closes = newstate == TCP_FIN_WAIT1 || newstate == TCP_LAST_ACK;

	if (newstate == TCP_CLOSE) {
		int error = BPF_CORE_READ(tcp, INET(sk.sk_err));

		closes = known ? !error && is_before_fin(oldstate) : error != ECONNABORTED;
	}
	if (!(opens || closes) || !BPF_CORE_READ(tcp, INET(sk.sk_lock.owned)))
		return false;
	return opens || !is_kernel_thread((void *)bpf_get_current_task());
}

/* A process acted on the socket: it is the owner now. */
static __always_inline void current_acted(struct owner *owner)
{
	read_owner(owner, (void *)bpf_get_current_task(), EVIDENCE_ACTED);
}

/* A process holds the socket. What a process did says more. */
static __always_inline void task_holds(struct owner *owner, struct task_struct___owner *task)
{
	if (owner->evidence == EVIDENCE_NONE)
		read_owner(owner, task, EVIDENCE_HELD);
	else if (owner->evidence == EVIDENCE_HELD && owner->task.pid != (__u32)BPF_CORE_READ(task, tgid))
		*owner = (struct owner){ .evidence = EVIDENCE_SHARED };
}

#endif
