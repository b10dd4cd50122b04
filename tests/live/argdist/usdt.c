// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* USDT probes with known arguments; with SEMAPHORES all are guarded, and it prints how often anybody was
 * looking. */
#ifdef SEMAPHORES
#define _SDT_HAS_SEMAPHORES 1
#endif
#include <stdint.h>
#include <stdio.h>
#include <sys/sdt.h>

#ifdef SEMAPHORES
#define SEMAPHORE(name) __extension__ volatile unsigned short name __attribute__((section(".probes"))) = 0
SEMAPHORE(work_sizes_semaphore);
SEMAPHORE(work_twelve_semaphore);
SEMAPHORE(work_bare_semaphore);
SEMAPHORE(rest_bare_semaphore);
SEMAPHORE(work_text_semaphore);
#define WATCHED(name) name##_semaphore
#else
#define WATCHED(name) 1
#endif

int main(void)
{
	volatile int8_t s8 = -8;
	volatile uint8_t u8 = 200;
	volatile int16_t s16 = -300;
	volatile uint16_t u16 = 60000;
	volatile int32_t s32 = -70000;
	volatile uint32_t u32 = 4000000000;
	volatile int64_t s64 = -5000000000;
	volatile uint64_t u64 = 18000000000000000000u;
	int watched = 0;

	puts("ready");
	fflush(stdout);
	while (getchar() != EOF)
		;
	for (int i = 0; i < 6; i++) {
		if (WATCHED(work_sizes)) {
			watched++;
			STAP_PROBE8(work, sizes, s8, u8, s16, u16, s32, u32, s64, u64);
		}
		STAP_PROBE12(work, twelve, 1, 2, 3, 4, 5, 6, 7, 8, 9, i, i % 2, 1200 + i);
		STAP_PROBE(work, bare);
		if (i % 2)
			STAP_PROBE(rest, bare);
		STAP_PROBE2(work, text, i % 3 ? "one" : "other", i);
	}
	printf("%d\n", watched);
	return 0;
}
