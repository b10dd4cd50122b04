// SPDX-License-Identifier: Apache-2.0
/*
 * What a system call takes: getppid(), again and again.
 * usage: syscalls COUNT; prints the ns of each, on average.
 */
#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	long count = argc == 2 ? atol(argv[1]) : 0;
	struct timespec begin, end;

	if (count < 1)
		errx(2, "usage: syscalls COUNT");
	clock_gettime(CLOCK_MONOTONIC, &begin);
	for (long i = 0; i < count; i++)
		getppid();
	clock_gettime(CLOCK_MONOTONIC, &end);
	printf("%.1f\n", ((end.tv_sec - begin.tv_sec) * 1e9 + (end.tv_nsec - begin.tv_nsec)) / count);
	return 0;
}
