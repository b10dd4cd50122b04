// What runs in the container: says its port, and sends back what each session sends, until its input ends.
#include <arpa/inet.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

int main(void)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0);

	if (bind(listener, (struct sockaddr *)&address, length) || listen(listener, 8) ||
		getsockname(listener, (struct sockaddr *)&address, &length)) {
		perror("listen");
		return 1;
	}
	dprintf(STDOUT_FILENO, "%d\n", ntohs(address.sin_port));
	struct pollfd inputs[] = { { .fd = STDIN_FILENO, .events = POLLIN },
		{ .fd = listener, .events = POLLIN } };
	while (poll(inputs, 2, -1) > 0 && !inputs[0].revents) {
		int session = accept(listener, NULL, NULL);
		char data[4096];
		ssize_t size;

		while ((size = read(session, data, sizeof(data))) > 0 && write(session, data, size) == size)
			;
		close(session);
	}
	return 0;
}
