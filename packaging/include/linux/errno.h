/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The errors that libbpf's usdt.bpf.h names, for a host without the kernel's headers. */
#if __has_include_next(<linux/errno.h>) && __has_include(<asm/errno.h>)
#include_next <linux/errno.h>
#else
#define ENOENT 2
#define ESRCH 3
#define EINVAL 22
#endif
