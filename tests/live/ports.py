"""Ports for listeners, each given out once: one port tells all the sessions of a test from all others.

They are below those that the kernel chooses (ip_local_port_range of ip(7)), which clients get: so the port of
a listener is never that of a client, nor that of an earlier listener.
"""

from __future__ import annotations

import errno
import os
import socket
import tempfile

_LOWEST, _HIGHEST = 10_000, 32_767
_ALL = _HIGHEST - _LOWEST


def _in_turn() -> int:
    """A file with all ports, two bytes each. What the next read() gives is the next port.

    A process and those that it forks share the file's position, which the kernel moves for one at a time (but
    not in a memfd: FMODE_ATOMIC_POS of fs/file.c). Each run begins elsewhere: a session with the ports of one
    that is in TIME_WAIT may have to wait.
    """
    file, path = tempfile.mkstemp(prefix="ports-")
    os.unlink(path)
    first = os.getpid() * 211 % _ALL
    os.write(file, b"".join((_LOWEST + (first + i) % _ALL).to_bytes(2, "little") for i in range(_ALL)))
    os.lseek(file, 0, os.SEEK_SET)
    return file


_PORTS = _in_turn()


def mark() -> int:
    """How many ports have been given out so far, for `since`."""
    return os.lseek(_PORTS, 0, os.SEEK_CUR) // 2


def since(marked: int) -> set[int]:
    """The ports that have been given out since then, here and in forked processes."""
    data = os.pread(_PORTS, 2 * (mark() - marked), 2 * marked)
    return {int.from_bytes(data[i : i + 2], "little") for i in range(0, len(data), 2)}


def _next() -> int:
    data = os.read(_PORTS, 2)
    assert data, "all ports have been given out"
    return int.from_bytes(data, "little")


def new_port() -> int:
    """A port that nobody had, nor listens on now."""
    with socket.socket(socket.AF_INET6) as nobody_s:
        bind(nobody_s, "::")
        port: int = nobody_s.getsockname()[1]
        return port


def bind(unbound: socket.socket, address: str) -> None:
    """Binds a socket to this address and a new port."""
    while True:
        try:
            unbound.bind((address, _next()))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
