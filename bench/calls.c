// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What argdist and bpftrace are measured with: calls of a function that both probe, and of a system
 * call that fails at once, with the values 0 to 7.
 *
 * usage: calls                  every 100 microseconds one of each with the value -1, until killed
 *        calls COUNT THREADS    each thread makes so many of each
 *        calls COUNT THREADS function    the function only
 */
#include <pthread.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

__attribute__((noipa)) int called(int value)
{
	/* An instruction that the kernel does itself: others it steps over, which would cost both tools far
	 * more. */
	__asm__ volatile("nop" ::"r"(value));
	return value;
}

static long count;
static int function_only;

static void *work(void *unused)
{
	for (long i = 0; i < count; i++) {
		called(i & 7);
		if (!function_only)
			close(1000000 + (i & 7));
	}
	return unused;
}

int main(int argc, char **argv)
{
	const struct timespec pause = { .tv_nsec = 100000 };
	int threads = argc > 2 ? atoi(argv[2]) : 0;
	pthread_t ids[8];

	while (argc < 3) {
		called(-1);
		close(-1);
		nanosleep(&pause, NULL);
	}
	if (threads > 8)
		return 2;
	count = atol(argv[1]);
	function_only = argc > 3;
	for (int i = 0; i < threads; i++)
		if (pthread_create(&ids[i], NULL, work, NULL))
			return 1;
	for (int i = 0; i < threads; i++)
		pthread_join(ids[i], NULL);
	return 0;
}
