"""Two network namespaces and a wire between them that a test can hold."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from live.tcp import Pair

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_CLONE_NEWNET = 0x40000000  # linux/sched.h


class Wire:
    """A TUN device in each of two new namespaces; a thread carries packets from one to the other."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __enter__(self) -> Self:
        self._namespaces = [_in_thread(_new_namespace) for _ in self.addresses]
        self._devices = [_in_thread(partial(self._device, number)) for number in (0, 1)]
        self._flowing = threading.Event()
        self._flowing.set()
        self._ended, self._end = os.pipe()
        self._carrier = threading.Thread(target=self._carry)
        self._carrier.start()
        return self

    def _device(self, number: int) -> int:
        _enter(self._namespaces[number])
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN | _IFF_NO_PI))
        peer = self.addresses[1 - number]
        for command in (
            f"ip address add {self.addresses[number]} peer {peer} dev wire",
            "ip link set wire up",
        ):
            subprocess.run(command.split(), check=True)
        return device

    def _carry(self) -> None:
        while True:
            ready, _, _ = select.select([*self._devices, self._ended], [], [])
            if self._ended in ready:
                return
            self._flowing.wait()
            for device in ready:
                packet = os.read(device, 65536)
                os.write(self._devices[1 - self._devices.index(device)], packet)

    def hold(self) -> None:
        """Keeps packets from now on; they wait in the devices' queues."""
        self._flowing.clear()

    def release(self) -> None:
        """Lets them go on."""
        self._flowing.set()

    def connect(self) -> Pair:
        """A session from the first namespace to the second."""

        def listen() -> socket.socket:
            _enter(self._namespaces[1])
            return socket.create_server((self.addresses[1], 0))

        def dial() -> socket.socket:
            _enter(self._namespaces[0])
            return socket.create_connection(listener.getsockname())

        with _in_thread(listen) as listener:
            client = _in_thread(dial)
            server, _ = listener.accept()
        return Pair(client, server)

    def __exit__(self, *_: object) -> None:
        self.release()
        os.write(self._end, b".")
        self._carrier.join()
        for fd in (*self._devices, *self._namespaces, self._ended, self._end):
            os.close(fd)


def _in_thread(work: Callable[[], T]) -> T:
    """Does it in a thread of its own: a namespace belongs to a thread."""
    result: list[T] = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


def _new_namespace() -> int:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
