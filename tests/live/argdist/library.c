// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A library with symbols of two versions, functions of a family, and names for the same function. */
#define TRACED __attribute__((noipa))

#ifdef ANOTHER_BUILD
TRACED int pushes_the_others_back(int value)
{
	return value * value * value + 12345;
}
#endif

TRACED int number(int value)
{
	return value * 2;
}

TRACED int old_one(int value)
{
	return value + 1;
}
__asm__(".symver old_one, versioned@CALLS_1");

TRACED int new_one(int value)
{
	return value + 2;
}
__asm__(".symver new_one, versioned@@CALLS_2");

TRACED int __family_first(void)
{
	return 1;
}
extern int family_first(void) __attribute__((alias("__family_first")));

TRACED int family_second(void)
{
	return 2;
}

TRACED int family_third(void)
{
	return 3;
}

TRACED int not_of_it(void)
{
	return 4;
}
