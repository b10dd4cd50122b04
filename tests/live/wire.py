"""Two network namespaces and a wire between them that a test can hold, cut, slow down or listen on."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from live.tcp import DEADLINE, Pair, listen, wait_route

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
_CLONE_NEWNET = 0x40000000  # linux/sched.h


def every(packet: bytes) -> bool:
    """For Wire.loses: all packets."""
    return True


def no(packet: bytes) -> bool:
    """For Wire.loses: none."""
    return False


class Wire:
    """A TUN device in each of two new namespaces; a thread carries packets from one to the other.

    It takes no firewall and no netem, which not every kernel has. Each packet is `delay` seconds on its way,
    unless `loses`, which may be set at any time, says that it gets lost.
    """

    addresses = ("10.77.0.1", "10.77.0.2")
    addresses6 = ("fd77::1", "fd77::2")

    def __init__(self, delay: float = 0.0) -> None:
        self.delay = delay
        self.loses: Callable[[bytes], bool] = no

    def __enter__(self) -> Self:
        self._namespaces = [_in_thread(new_namespace) for _ in self.addresses]
        self._devices = [_in_thread(partial(self._device, number)) for number in (0, 1)]
        self._flowing = threading.Event()
        self._flowing.set()
        self._ended, self._end = os.pipe()
        self._carrier = threading.Thread(target=self._carry)
        self._carrier.start()
        return self

    def _device(self, number: int) -> int:
        enter(self._namespaces[number])
        device = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"wire", _IFF_TUN | _IFF_NO_PI))
        for command in (
            "ip link set wire addrgenmode none up",  # before its IPv6 address, or the peer has no route
            f"ip address add {self.addresses[number]} peer {self.addresses[1 - number]} dev wire",
            f"ip address add {self.addresses6[number]} peer {self.addresses6[1 - number]} dev wire nodad",
        ):
            subprocess.run(command.split(), check=True)
        wait_route(self.addresses6[number], self.addresses6[1 - number])
        return device

    def _carry(self) -> None:
        going: deque[tuple[float, int, bytes]] = deque()
        while True:
            seconds = max(0.0, going[0][0] - time.monotonic()) if going else None
            ready, _, _ = select.select([*self._devices, self._ended], [], [], seconds)
            if self._ended in ready:
                return
            self._flowing.wait()
            for device in ready:
                packet = os.read(device, 65536)
                if not self.loses(packet):
                    other = self._devices[1 - self._devices.index(device)]
                    going.append((time.monotonic() + self.delay, other, packet))
            while going and going[0][0] <= time.monotonic():
                _, device, packet = going.popleft()
                os.write(device, packet)

    def hold(self) -> None:
        """Keeps packets from now on; they wait in the devices' queues."""
        self._flowing.clear()

    def release(self) -> None:
        """Lets them go on."""
        self._flowing.set()

    def netns(self, number: int) -> int:
        """A namespace's inode number."""
        return os.fstat(self._namespaces[number]).st_ino

    def inside(self, number: int, work: Callable[[], T]) -> T:
        """Does it in the first (0) or the second (1) namespace."""

        def enter_and_work() -> T:
            enter(self._namespaces[number])
            return work()

        return _in_thread(enter_and_work)

    def address(self, family: int, number: int) -> str:
        """An end's address."""
        return (self.addresses6 if family == socket.AF_INET6 else self.addresses)[number]

    def listen(self, family: int = socket.AF_INET) -> socket.socket:
        """A listener in the second namespace."""
        return self.inside(1, lambda: listen(family, self.address(family, 1)))

    def client(self, family: int = socket.AF_INET) -> socket.socket:
        """A socket in the first namespace."""
        client = self.inside(0, lambda: socket.socket(family))
        client.settimeout(DEADLINE)
        return client

    def connect(self, family: int = socket.AF_INET) -> Pair:
        """A session from the first namespace to the second."""
        with self.listen(family) as listener:
            client = self.client(family)
            client.connect(listener.getsockname())
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
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def in_new_namespace(work: Callable[[], T]) -> T:
    """Does it in a network namespace of its own, where loopback is up."""

    def make_and_work() -> T:
        os.close(new_namespace())
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return work()

    return _in_thread(make_and_work)


def new_namespace() -> int:
    """Moves this thread into a new network namespace; its descriptor."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def enter(namespace: int) -> None:
    """Moves this thread into a network namespace."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def set_kernel(name: str, value: object) -> None:
    """Sets a kernel parameter, such as net.ipv4.ip_forward, for the network namespace of this thread."""
    with open(f"/proc/sys/{name.replace('.', '/')}", "w") as file:
        file.write(str(value))
