"""Real sessions for the demo: servers in processes of their own, a few clients, IPv4 and IPv6, a reset."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress

SERVERS = (("web", socket.AF_INET, 64 << 10), ("database", socket.AF_INET6, 3 << 20))
"""Each server's name, family, and the size of its answers in bytes."""
CLIENTS = ("curl-like", "worker-1", "worker-2")


def call_myself(name: str) -> None:
    """Sets the name that tcpobs shows (proc_pid_comm(5))."""
    with open("/proc/self/comm", "w") as file:
        file.write(name)


def serve(listener: socket.socket, size: int) -> None:
    """Answers every client with so many bytes, then closes."""
    for _ in CLIENTS:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 10)
            connection.sendall(bytes(size))


def ask(address: tuple[str, int]) -> None:
    """Asks a server, reads the answer to its end, waits a moment, closes."""
    with socket.create_connection(address) as connection:
        connection.sendall(b"what is there?")
        while connection.recv(1 << 16):
            pass
        time.sleep(0.1)


def hang_up(listener: socket.socket) -> None:
    """Closes a connection without having read what came: the kernel sends a reset."""
    connection, _ = listener.accept()
    with connection:
        connection.recv(1, socket.MSG_PEEK)


def try_twice(address: tuple[str, int]) -> None:
    """Talks to a server that hangs up; and asks again when nobody listens any more."""
    for _ in range(2):
        with suppress(ConnectionError), socket.create_connection(address) as connection:
            connection.sendall(b"are you there?")
            connection.recv(1)


def in_process(name: str, *work: threading.Thread) -> int:
    """Runs threads in a process of its own, under this name."""
    pid = os.fork()
    if not pid:
        call_myself(name)
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        os._exit(0)
    return pid


def main() -> None:
    """Starts the servers, lets the clients ask all of them, and waits for everybody."""
    children, addresses = [], []
    for name, family, size in SERVERS:
        host = "127.0.0.1" if family == socket.AF_INET else "::1"
        listener = socket.create_server((host, 0), family=family)
        addresses.append(listener.getsockname()[:2])
        children.append(in_process(name, threading.Thread(target=serve, args=(listener, size))))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        children.append(in_process("api", threading.Thread(target=hang_up, args=(listener,))))
        hanging_up = listener.getsockname()
    children.append(in_process("batch-job", threading.Thread(target=try_twice, args=(hanging_up,))))
    for name in CLIENTS:
        threads = [threading.Thread(target=ask, args=(address,)) for address in addresses]
        children.append(in_process(name, *threads))
    for pid in children:
        os.waitpid(pid, 0)


main()
