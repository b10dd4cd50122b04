/*
 * Loads and attaches the program states_tp_btf of an object with a libbpf.so.1, makes an event and reads it
 * from the ring buffer, and prints "libbpf MAJOR.MINOR OK".
 *   attach libbpf.so.1 states.bpf.o
 */
#include <dlfcn.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

/* Those functions of libbpf.h that are called, each with its type. */
#define FUNCTIONS(_)                                                                                         \
	_(uint32_t, libbpf_major_version, (void))                                                            \
	_(uint32_t, libbpf_minor_version, (void))                                                            \
	_(void *, bpf_object__open_file, (const char *path, const void *options))                            \
	_(void *, bpf_object__next_program, (const void *object, void *program))                             \
	_(void *, bpf_object__find_map_by_name, (const void *object, const char *name))                      \
	_(int, bpf_object__load, (void *object))                                                             \
	_(void, bpf_object__close, (void *object))                                                           \
	_(const char *, bpf_program__name, (const void *program))                                            \
	_(int, bpf_program__set_autoload, (void *program, bool autoload))                                    \
	_(void *, bpf_program__attach, (const void *program))                                                \
	_(int, bpf_link__destroy, (void *link))                                                              \
	_(int, bpf_map__set_autocreate, (void *map, bool autocreate))                                        \
	_(int, bpf_map__fd, (const void *map))                                                               \
	_(void *, ring_buffer__new,                                                                          \
		(int fd, int (*sample)(void *, void *, size_t), void *context, const void *options))         \
	_(int, ring_buffer__consume, (void *ring))                                                           \
	_(void, ring_buffer__free, (void *ring))

#define DECLARE(result, name, arguments) static result(*name) arguments;
FUNCTIONS(DECLARE)

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(1);
}

static void *function(void *library, const char *name)
{
	void *found = dlsym(library, name);

	if (!found)
		fail(dlerror());
	return found;
}

static int count(void *counter, void *event, size_t size)
{
	(void)event;
	(void)size;
	++*(int *)counter;
	return 0;
}

int main(int argc, char **argv)
{
	void *library, *object, *program = NULL, *chosen = NULL, *map, *link, *ring;
	int events = 0;

	if (argc != 3)
		return 2;
	library = dlopen(argv[1], RTLD_NOW);
	if (!library)
		fail(dlerror());
#define FIND(result, name, arguments) name = (result(*) arguments)function(library, #name);
	FUNCTIONS(FIND)

	object = bpf_object__open_file(argv[2], NULL);
	if (!object)
		fail("bpf_object__open_file");
	while ((program = bpf_object__next_program(object, program))) {
		bool wanted = !strcmp(bpf_program__name(program), "states_tp_btf");

		if (wanted)
			chosen = program;
		if (bpf_program__set_autoload(program, wanted))
			fail("bpf_program__set_autoload");
	}
	map = bpf_object__find_map_by_name(object, "socket_hash");
	if (!map || bpf_map__set_autocreate(map, false))
		fail("socket_hash");
	if (bpf_object__load(object))
		fail("bpf_object__load");
	link = bpf_program__attach(chosen);
	if (!link)
		fail("bpf_program__attach");

	map = bpf_object__find_map_by_name(object, "ring_buffer");
	ring = map ? ring_buffer__new(bpf_map__fd(map), count, &events, NULL) : NULL;
	if (!ring)
		fail("ring_buffer__new");
	/* CLOSE to LISTEN is an event, there when listen() returns. */
	if (listen(socket(AF_INET, SOCK_STREAM, 0), 1))
		fail("listen");
	if (ring_buffer__consume(ring) < 0 || !events)
		fail("no event");

	ring_buffer__free(ring);
	bpf_link__destroy(link);
	bpf_object__close(object);
	printf("libbpf %u.%u OK\n", libbpf_major_version(), libbpf_minor_version());
	return 0;
}
