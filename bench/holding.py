"""Many open sessions, held by other processes."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SPARE = 100
"""Descriptors that a holder needs besides."""


@contextmanager
def open_sockets(count: int) -> Iterator[None]:
    """At least so many sockets, of sessions over loopback, are open meanwhile, in several processes."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    each = min(count, limit - SPARE) // 2
    number = -(-count // (2 * each))
    release, keep = os.pipe()
    holders = [_holder(each, f"127.0.1.{n + 1}", release, keep) for n in range(number)]
    try:
        for _, ready in holders:
            if not os.read(ready, 1):
                raise RuntimeError("a holder of sockets failed")
        yield
    finally:
        os.close(keep)
        os.close(release)
        for pid, ready in holders:
            os.waitpid(pid, 0)
            os.close(ready)


def _holder(sessions: int, address: str, release: int, keep: int) -> tuple[int, int]:
    """Forks a process with both ends of so many sessions; its PID, and what tells when they are open."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        return pid, ready
    status = 1
    try:
        os.close(keep)
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        ends = []
        with socket.create_server((address, 0)) as listener:
            for _ in range(sessions):
                client = socket.create_connection(listener.getsockname())
                ends += [client, listener.accept()[0]]
        os.write(tell, b"!")
        os.read(release, 1)  # returns at the end of the other process
        status = 0
    finally:
        os._exit(status)
