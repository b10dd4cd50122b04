// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/*
 * What test_argdist.py looks at: each scenario calls functions a known number of times with known values. It
 * begins when standard input ends; what is printed before that says that all threads are there.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define TRACED __attribute__((noipa))

enum colour { RED = 1, GREEN = 5, NONE = -1 };

struct point {
	int x;
	short y;
};

struct request {
	struct timespec when;
	struct {
		char kind;
		struct point at[3];
	} inner;
	union {
		unsigned long whole;
		unsigned char bytes[8];
	};
	unsigned int low : 3;
	int middle : 5;
	unsigned int : 7;
	unsigned int wide : 17;
	long far : 40;
	bool flag;
	int list[2][3];
	char text[16];
	const char *name;
	struct request *next;
	enum colour colour;
	double weight;
};

TRACED int number(int value)
{
	return value * 2;
}

TRACED long many(int a, long b, unsigned char c, short d, unsigned int e, void *f)
{
	return a + b + c + d + e + (f != NULL);
}

TRACED const char *name(const char *text)
{
	return text;
}

TRACED int serve(struct request *request, int by)
{
	return request->list[1][2] + by;
}

TRACED long moment(const struct timespec *when)
{
	return when->tv_nsec;
}

TRACED long factorial(long n)
{
	long below = n > 1 ? factorial(n - 1) : 1;

	__asm__ volatile("" : "+r"(below)); /* or gcc makes a loop of it */
	return n * below;
}

static __thread jmp_buf back;

TRACED int jump_out(int value)
{
	if (value % 2)
		longjmp(back, 1);
	return value * 10;
}

TRACED int nap(int ms)
{
	struct timespec left = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000l };

	while (clock_nanosleep(CLOCK_MONOTONIC, 0, &left, &left) == EINTR)
		;
	return ms;
}

TRACED void hit(unsigned int value)
{
	__asm__ volatile("nop" ::"r"(value)); /* the kernel does this one itself, and need not step over it */
}

/* ---- scenarios */

static long count = 1;

static void numbers(void)
{
	for (int value = 0; value < 5; value++)
		for (int i = 0; i <= value; i++)
			number(value);
	for (int i = 0; i < 7; i++)
		number(-3);
	many(-1, -5000000000, 200, -300, 4000000000, (void *)0x1000);
	many(-1, -5000000000, 200, -300, 4000000000, (void *)0x1000);
	many(16, 1, 2, 3, 4, NULL);
}

static void names(void)
{
	char text[201];

	memset(text, 'x', 200);
	text[200] = 0;
	name(text);
	for (int i = 0; i < 3; i++)
		name("alpha");
	for (int i = 0; i < 2; i++)
		name("beta:1,2");
	name("");
	name("\033[2J\n\303\251\377");
	for (int i = 0; i < 4; i++)
		name((const char *)16);
}

static void structs(void)
{
	struct request second = { .name = "second", .when = { 3, 4 } };
	struct request first = {
		.when = { 1, 999999999 },
		.inner = { 'k', { { 1, -1 }, { 2, -2 }, { 3, -3 } } },
		.whole = 0x8877665544332211,
		.low = 5,
		.middle = -7,
		.wide = 70000,
		.far = -5000000000,
		.flag = true,
		.list = { { 10, 11, 12 }, { 20, 21, -22 } },
		.text = "in the struct",
		.name = "first",
		.next = &second,
		.colour = GREEN,
	};

	for (int i = 0; i < 3; i++)
		serve(&first, 100);
	for (int i = 0; i < 2; i++)
		serve(&second, 200);
	moment(&first.when);
	moment(&second.when);
	moment(&second.when);
}

static void recursion(void)
{
	for (int i = 0; i < 3; i++)
		factorial(6);
}

static void deep(void)
{
	factorial(count);
}

static void jumps(void)
{
	for (volatile int i = 0; i < 100; i++)
		if (!setjmp(back))
			jump_out(i % 10);
}

static void naps(void)
{
	nap(1);
	nap(20);
	nap(40);
}

static void hits(int of)
{
	(void)of;
	for (long i = 0; i < count; i++)
		hit(i & 7);
}

static void thread_work(int of)
{
	for (long i = 0; i < count; i++) {
		number(of);
		factorial(3 + of);
		nap(0);
	}
}

/* ---- threads */

struct thread {
	pthread_t id;
	void (*work)(int);
	int number;
};

static pthread_barrier_t there, go;

static void *thread(void *argument)
{
	struct thread *self = argument;

	printf("%ld\n", (long)syscall(SYS_gettid));
	pthread_barrier_wait(&there);
	pthread_barrier_wait(&go);
	self->work(self->number);
	return NULL;
}

static void started(void)
{
	puts("ready");
	fflush(stdout);
	while (getchar() != EOF)
		;
}

static void in_threads(void (*work)(int), int many)
{
	struct thread threads[16];

	pthread_barrier_init(&there, NULL, many + 1);
	pthread_barrier_init(&go, NULL, many + 1);
	for (int i = 0; i < many; i++) {
		threads[i] = (struct thread){ .work = work, .number = i };
		pthread_create(&threads[i].id, NULL, thread, &threads[i]);
	}
	pthread_barrier_wait(&there);
	started();
	pthread_barrier_wait(&go);
	for (int i = 0; i < many; i++)
		pthread_join(threads[i].id, NULL);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} scenarios[] = {
		{ "numbers", numbers },
		{ "names", names },
		{ "structs", structs },
		{ "recursion", recursion },
		{ "deep", deep },
		{ "jumps", jumps },
		{ "naps", naps },
	};

	if (argc > 2)
		count = atol(argv[2]);
	if (argc > 1 && !strcmp(argv[1], "hits")) {
		in_threads(hits, 2);
		return 0;
	}
	if (argc > 1 && !strcmp(argv[1], "threads")) {
		in_threads(thread_work, 4);
		return 0;
	}
	for (unsigned i = 0; argc > 1 && i < sizeof(scenarios) / sizeof(*scenarios); i++)
		if (!strcmp(argv[1], scenarios[i].name)) {
			started();
			scenarios[i].run();
			return 0;
		}
	return 2;
}
