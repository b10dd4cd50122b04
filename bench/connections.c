// SPDX-License-Identifier: Apache-2.0
/*
 * The load of the benchmark: short TCP connections over loopback as fast as one core makes them.
 * usage: connections COUNT
 * Each makes 10 state changes, half of them at each end; the listener makes 2.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	long count = argc == 2 ? atol(argv[1]) : 0;
	cpu_set_t one;
	int listener;
	char byte;

	if (count <= 0)
		errx(2, "usage: connections COUNT");
	CPU_ZERO(&one);
	CPU_SET(0, &one);
	if (sched_setaffinity(0, sizeof(one), &one))
		err(1, "sched_setaffinity");
	listener = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&address, length) || listen(listener, 16) ||
		getsockname(listener, (struct sockaddr *)&address, &length))
		err(1, "listen");
	for (long i = 0; i < count; i++) {
		int client = socket(AF_INET, SOCK_STREAM, 0), server;

		if (client < 0 || connect(client, (struct sockaddr *)&address, length))
			err(1, "connect");
		server = accept(listener, NULL, NULL);
		if (server < 0)
			err(1, "accept");
		close(client); /* FIN_WAIT1; the server's end goes to CLOSE_WAIT */
		if (read(server, &byte, 1) != 0)
			err(1, "read");
		close(server); /* LAST_ACK, and both ends to CLOSE */
	}
	close(listener);
	return 0;
}
