"""Real TCP sessions to look at."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import pytest

from live import ports
from tcpobs import host
from tcpobs.events import Events
from tcpobs.libbpf import LibbpfError, Object, library
from tcpobs.records import FIN_WAIT2, WithEndpoints

R = TypeVar("R", bound=WithEndpoints)

LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
ALL_WAYS = [
    host.Way("tp_btf", "sk_storage", "ringbuf", "fexit"),
    host.Way("tp_btf", "hash", "ringbuf", "kretprobe"),
    host.Way("tp_btf", "hash", "ringbuf", "syscall"),
    host.Way("tracepoint", "hash", "ringbuf", "none"),
    host.Way("kprobe", "hash", "ringbuf", "fexit"),
    host.Way("tp_btf", "hash", "perfbuf", "syscall"),
    host.Way("tracepoint", "hash", "perfbuf", "none"),
]
"""Each mechanism, forced; and the best and the least of those for kernels without ring buffers."""


def limit(way: host.Way) -> str:
    """Why this kernel cannot trace this way; empty where it can."""
    release = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    if way.storage == "sk_storage" and release < (5, 11):
        return "Linux 5.11"
    if "probe" in way.hook + way.accept and not os.path.exists("/sys/bus/event_source/devices/kprobe"):
        return "CONFIG_KPROBES"
    if way.accept == "fexit" and not os.path.exists("/sys/bus/event_source/devices/kprobe"):
        return "no fexit"  # the build machine's kernel has neither; all others both
    return ""


WAYS = [way for way in ALL_WAYS if not limit(way)]
if limit(ALL_WAYS[0]) == "no fexit":
    WAYS.append(ALL_WAYS[0]._replace(accept="none"))


def refuses_map_iterators() -> bool:
    """Whether this kernel refuses iter/bpf_sk_storage_map, as some builds of the build machine's do."""
    with host.open_object("life", WAYS[0], None, ["open_sk_storage"])[0] as object:
        for program in object.programs.values():
            program.autoload = program.name == "open_sk_storage"
        try:
            object.load()
        except LibbpfError as error:
            return error.errno == errno.EPERM
    return False


WALK_LIMIT = {"sk_storage": "map iterators"} if refuses_map_iterators() else {}
"""Storages through which this kernel lets nobody walk, and for want of what."""

TP_BTF_STORAGES = sorted({way.storage for way in WAYS if way.hook == "tp_btf"})

DEADLINE = 30.0
"""Seconds after which a condition that should come true will not."""


class Pair(NamedTuple):
    """Both ends of a session, open."""

    client: socket.socket
    server: socket.socket

    @property
    def ports(self) -> tuple[int, int]:
        """The client's and the server's port."""
        return self.client.getsockname()[1], self.server.getsockname()[1]


def listen(
    family: int, address: str | None = None, *, backlog: int = 128, dual: bool = False
) -> socket.socket:
    """A listener whose port nobody else has had (live.ports); `dual`: it takes IPv4, too."""
    family = socket.AddressFamily(family)
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        ports.bind(listener, address or LOOPBACK[family])
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(family: int, address: str | None = None) -> Pair:
    """A session over loopback; its listener is closed again."""
    with listen(family, address) as listener:
        client = socket.create_connection(listener.getsockname()[:2])
        server, _ = listener.accept()
    return Pair(client, server)


def reset(end: socket.socket) -> None:
    """Closes a socket with a reset (SO_LINGER of 0 seconds, socket(7))."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def wait_closed(end: socket.socket) -> None:
    """Waits until the peer's FIN or reset is here."""
    end.settimeout(DEADLINE)
    with suppress(ConnectionResetError):
        assert end.recv(1) == b""


def client_first(pair: Pair) -> None:
    """The client closes, then the server."""
    pair.client.close()
    wait_closed(pair.server)
    pair.server.close()


def server_first(pair: Pair) -> None:
    """The server closes, then the client."""
    pair.server.close()
    wait_closed(pair.client)
    pair.client.close()


def client_resets(pair: Pair) -> None:
    """The client resets."""
    reset(pair.client)
    wait_closed(pair.server)
    pair.server.close()


def server_resets(pair: Pair) -> None:
    """The server resets."""
    reset(pair.server)
    wait_closed(pair.client)
    pair.client.close()


def half_closed(pair: Pair) -> None:
    """The server still talks after the client's FIN."""
    pair.client.shutdown(socket.SHUT_WR)
    wait_closed(pair.server)
    pair.server.sendall(b"still here")
    assert pair.client.recv(10) == b"still here"
    pair.server.close()
    wait_closed(pair.client)
    pair.client.close()


def close_unseen(pair: Pair, object: Object, program: str) -> None:
    """The client closes, then the server. The client's FIN is sent while nothing is attached."""
    object.detach()
    pair.client.shutdown(socket.SHUT_WR)
    wait_closed(pair.server)
    wait_state(pair.client, FIN_WAIT2)
    object.attach(program)
    server_first(pair)


ENDS = (client_first, server_first, client_resets, server_resets, half_closed)
"""Every way to end a session."""


def byte_counts(end: socket.socket) -> tuple[int, int]:
    """bytes_acked and bytes_received of getsockopt(TCP_INFO) (struct tcp_info, linux/tcp.h)."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
    acked, received = struct.unpack_from("QQ", info, 120)
    return acked, received


def wait_state(end: socket.socket, state: int) -> None:
    """Waits until a socket's TCP state is this one (tcpi_state of TCP_INFO)."""
    wait(lambda: end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == state)


def wait_queued(listener: socket.socket, sessions: int = 1) -> None:
    """Waits until so many sessions can be accepted (tcpi_unacked, which is that of a listener).

    When a client's connect() returns, its last acknowledgement may be on its way to a softirq.
    """

    def are_there() -> bool:
        info = listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 28)
        queued: int = struct.unpack_from("I", info, 24)[0]
        return queued >= sessions

    wait(are_there)


def wait_route(here: str, there: str) -> None:
    """Waits until packets go from one address to the other, in this thread's network namespace.

    For IPv6 the kernel adds an address's routes later than the address, in a work of its own
    (addrconf_dad_work, net/ipv6/addrconf.c).
    """

    def is_there() -> bool:
        family = socket.AF_INET6 if ":" in there else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((there, 9))  # it sends nothing
            return bool(probe.getsockname()[0] == here)
        return False

    wait(is_there)


def wait_over(*ports: int) -> None:
    """Waits until no socket with these ports is left: a softirq may still be at it (proc_net(5))."""
    wanted = {f"{port:04X}" for port in ports}
    wait(lambda: not any(_sockets(wanted)))


def _sockets(ports: set[str]) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as file:
            for line in list(file)[1:]:
                _, local, remote, state, *_ = line.split()
                if state != "06" and ports & {local[-4:], remote[-4:]}:  # 06: TIME_WAIT
                    yield line


def wait(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Waits for a condition; fails when it does not come."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true"
        time.sleep(0.005)


def gather(events: Events[R], enough: Callable[[list[R]], bool]) -> list[R]:
    """The events seen so far and until there are enough."""
    seen: list[R] = []
    end = time.monotonic() + DEADLINE
    for batch in events.batches():
        seen += batch
        if enough(seen) or time.monotonic() > end:
            events.stop()
    assert enough(seen), f"too few events: {seen}"
    return seen


@contextmanager
def child(work: Callable[[], None]) -> Iterator[int]:
    """Runs `work` in a process of its own; gives its PID, and waits for it at the end.

    When something else fails, it is killed.
    """
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    assert os.waitpid(pid, 0)[1] == 0


def is_tracing(pid: int) -> bool:
    """Whether this tcpobs has attached everything: it has given up its capabilities (proc_pid_status(5)).

    All of them, or but for CAP_BPF, where it still looks at maps.
    """
    with open(f"/proc/{pid}/status") as file:
        permitted = next(line.split()[1] for line in file if line.startswith("CapPrm:"))
    return int(permitted, 16) in (0, 1 << 39)


def read_rest(command: subprocess.Popen[str]) -> tuple[str, str]:
    """The rest of what it prints and of its errors, to its end, for which it has DEADLINE.

    With what readline() has read ahead, which communicate() leaves out.
    """
    assert command.stdout
    assert command.stderr
    late = threading.Timer(DEADLINE, command.kill)
    late.start()
    try:
        out, err = command.stdout.read(), command.stderr.read()
        command.wait()
    finally:
        late.cancel()
    return out, err


def programs_of(pid: int) -> set[int]:
    """The ids of the BPF programs that a process holds (proc_pid_fdinfo(5))."""
    found = set()
    for fd in os.listdir(f"/proc/{pid}/fdinfo"):
        with suppress(FileNotFoundError), open(f"/proc/{pid}/fdinfo/{fd}") as file:
            info = dict(line.split(":", 1) for line in file if ":" in line)
            if "prog_id" in info:
                found.add(int(info["prog_id"]))
    return found


def is_loaded(program: int) -> bool:
    """Whether the kernel has a program of this id."""
    try:
        os.close(library().bpf_prog_get_fd_by_id(program))
    except LibbpfError as error:
        if error.errno == errno.ENOENT:
            return False
        raise
    return True


def opened(monkeypatch: pytest.MonkeyPatch) -> list[Object]:
    """The objects that tools open from now on."""
    open_object = host.open_object
    objects = []

    def and_noted(*arguments: Any) -> tuple[Object, list[str]]:
        object, programs = open_object(*arguments)
        objects.append(object)
        return object, programs

    monkeypatch.setattr(host, "open_object", and_noted)
    return objects


def only_second_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attaches no first tp_btf program from now on, as if the kernel skipped it each time."""
    open_object = host.open_object

    def without_first(tool: str, way: host.Way, *others: Any) -> tuple[Object, list[str]]:
        object, programs = open_object(tool, way, *others)
        first = f"{tool}_{way.hook}"
        return object, [program for program in programs if program != first]

    monkeypatch.setattr(host, "open_object", without_first)
