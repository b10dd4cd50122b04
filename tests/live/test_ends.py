"""Every way in which a session ends, made for real, and what its two records say of it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import tcpobs
from live.ports import bind, new_port
from live.tcp import (
    LOOPBACK,
    Pair,
    client_first,
    client_resets,
    connect,
    gather,
    half_closed,
    listen,
    reset,
    server_first,
    server_resets,
    wait,
    wait_closed,
    wait_queued,
    wait_route,
    wait_state,
)
from live.wire import Wire, every, in_new_namespace, no, set_kernel
from tcpobs import Session

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from tcpobs.events import Options

pytestmark = pytest.mark.subject("every end of a session")

CLOSE, FIN_WAIT1, FIN_WAIT2, SYN_SENT = 7, 4, 5, 2
"""include/net/tcp_states.h."""


class Name(NamedTuple):
    """What a session's record says of its end."""

    name: str
    reason: str = "-"
    error: str = "-"


FIN_LOCAL, FIN_REMOTE, FIN_BOTH = Name("fin-local"), Name("fin-remote"), Name("fin-both")
RESET = Name("reset-received", error="ECONNRESET")
LATE_DATA = Name("reset-sent", "late-data", "ECONNRESET")
RESET_AFTER_FIN = Name("reset-received", error="EPIPE")


class End(NamedTuple):
    """A way to end: `make` does it, with a family, and gives the server's port."""

    make: Callable[[int], int]
    client: Name
    server: Name | None = None
    """None: there never was a socket for the session."""


# ---- over loopback


def over_loopback(end: Callable[[Pair], None]) -> Callable[[int], int]:
    """A session over loopback that ends so."""

    def make(family: int) -> int:
        pair = connect(family)
        port = pair.ports[1]
        end(pair)
        for each in pair:
            each.close()
        return port

    make.__name__ = end.__name__
    return make


def has_data(end: socket.socket) -> bool:
    """Whether there is something to read (FIONREAD, tcp(7))."""
    return fcntl.ioctl(end, termios.FIONREAD, struct.pack("i", 0)) != struct.pack("i", 0)


def data_unread(pair: Pair) -> None:
    """The server closes without having read all."""
    pair.client.sendall(b"never read")
    wait(lambda: has_data(pair.server))
    pair.server.close()
    wait_closed(pair.client)


def broken_pipe(pair: Pair) -> None:
    """The client sends after the server's FIN, which it has acknowledged."""
    pair.server.shutdown(socket.SHUT_WR)
    wait_state(pair.server, FIN_WAIT2)  # else it were data that came before the FIN was acknowledged
    pair.server.close()
    pair.client.sendall(b"nobody reads this")
    wait_state(pair.client, CLOSE)


def shut_both_ways(pair: Pair) -> None:
    """The client sends though the server has shut down receiving, too."""
    pair.server.shutdown(socket.SHUT_RDWR)
    wait_state(pair.server, FIN_WAIT2)
    pair.client.sendall(b"too late")
    wait_state(pair.client, CLOSE)


def disconnected(pair: Pair) -> None:
    """The client undoes its connect() (AF_UNSPEC, connect(2))."""
    nowhere = struct.pack("H14x", socket.AF_UNSPEC)
    assert ctypes.CDLL(None).connect(pair.client.fileno(), nowhere, len(nowhere)) == 0
    wait_closed(pair.server)


def aborted(pair: Pair) -> None:
    """Somebody else ends the client's socket (SOCK_DESTROY, sock_diag(7))."""
    client, server = pair.ports
    command = f"ss --no-header --kill --tcp state established sport = {client} and dport = {server}"
    killed = subprocess.run(command.split(), check=True, capture_output=True, text=True)
    assert str(client) in killed.stdout, killed
    wait_closed(pair.server)


def killed(family: int) -> int:
    """The server's process is killed."""
    with listen(family) as listener:
        ready, told = os.pipe()
        pid = os.fork()
        if not pid:
            with suppress(BaseException):
                _server = listener.accept()
                os.write(told, b".")
                signal.pause()
            os._exit(1)
        os.close(told)  # the read ends, too, when the child does
        port: int = listener.getsockname()[1]
        with socket.create_connection(listener.getsockname()[:2]) as client:
            os.read(ready, 1)
            os.kill(pid, signal.SIGKILL)
            wait_closed(client)
    os.waitpid(pid, 0)
    os.close(ready)
    return port


def not_accepted(family: int) -> int:
    """The listener closes before it has accepted."""
    listener = listen(family)
    port: int = listener.getsockname()[1]
    with socket.create_connection(listener.getsockname()[:2]) as client:
        wait_queued(listener)
        listener.close()
        wait_closed(client)
    return port


def refused(family: int) -> int:
    """Nobody listens."""
    port = new_port()
    with socket.socket(family) as client, pytest.raises(ConnectionRefusedError):
        client.connect((LOOPBACK[socket.AddressFamily(family)], port))
    return port


def failed(family: int) -> int:
    """The one local port that there is, is taken: connect() sends nothing."""

    def make() -> int:
        address = LOOPBACK[socket.AddressFamily(family)]
        with socket.socket(family) as another, socket.socket(family) as client:
            bind(another, address)
            port: int = another.getsockname()[1]
            set_kernel("net.ipv4.ip_local_port_range", f"{port} {port}")
            with pytest.raises(OSError, match=os.strerror(errno.EADDRNOTAVAIL)):
                client.connect((address, port))
            return port

    return in_new_namespace(make)


def with_itself(family: int) -> int:
    """A socket that connects to its own port; its one record is of both ends."""
    address = LOOPBACK[socket.AddressFamily(family)]
    with socket.socket(family) as both:
        bind(both, address)
        port: int = both.getsockname()[1]
        both.connect(both.getsockname())
    return port


# ---- over a wire


def over_wire(end: Callable[[Wire, int], int]) -> Callable[[int], int]:
    """A session over a wire that ends so."""

    def make(family: int) -> int:
        with Wire() as wire:
            return end(wire, family)

    make.__name__ = end.__name__
    return make


def crossed(wire: Wire, family: int) -> int:
    """Each FIN is on its way before the other's arrives."""
    pair = wire.connect(family)
    port = pair.ports[1]
    wire.hold()
    for end in pair:
        end.shutdown(socket.SHUT_WR)
    wire.release()
    for end in pair:
        wait_state(end, CLOSE)
        end.close()
    return port


def data_under_way(wire: Wire, family: int) -> int:
    """The client's data crosses the server's FIN."""
    pair = wire.connect(family)
    port = pair.ports[1]
    wire.hold()
    pair.client.sendall(b"too late")
    pair.server.close()
    wire.release()
    wait_state(pair.client, CLOSE)
    pair.client.close()
    return port


def data_with_the_fin_s_ack(wire: Wire, family: int) -> int:
    """The client's data is the first to acknowledge the server's FIN."""
    pair = wire.connect(family)
    port = pair.ports[1]
    headers = 60 if family == socket.AF_INET6 else 40
    wire.loses = lambda packet: len(packet) < headers + 12 + 1 and not flags(packet) & (FIN | RST)
    pair.server.close()
    wait_closed(pair.client)
    pair.client.sendall(b"too late")
    wait_state(pair.client, CLOSE)
    pair.client.close()
    return port


def data_repeated(wire: Wire, family: int) -> int:
    """Data comes after close(), but it has come before: its acknowledgement got lost, and the FIN."""
    pair = wire.connect(family)
    client_port, port = pair.ports
    wire.loses = lambda packet: source_port(packet) == port
    pair.client.sendall(b"in time")
    assert pair.server.recv(7) == b"in time"
    pair.server.close()
    wait(lambda: pair.client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 3)[2] > 0)  # tcpi_retransmits
    wire.loses = no
    wait_closed(pair.client)
    wait(lambda: not wire.inside(1, lambda: has_socket(client_port)))
    pair.client.shutdown(socket.SHUT_WR)
    wait_state(pair.client, CLOSE)
    pair.client.close()
    return port


def source_port(packet: bytes) -> int:
    """A TCP packet's; it has no IP options."""
    start = 40 if packet[0] >> 4 == 6 else 20
    return int.from_bytes(packet[start : start + 2], "big")


FIN, RST = 1, 4
"""include/net/tcp.h: TCPHDR_."""


def flags(packet: bytes) -> int:
    """A TCP packet's flags; it has no IP options."""
    return packet[(40 if packet[0] >> 4 == 6 else 20) + 13]


def unanswered(wire: Wire, family: int) -> int:
    """Nobody answers the SYN."""
    with wire.listen(family) as listener, wire.client(family) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
        wire.loses = every
        connect_in_vain(client, listener.getsockname())
        port: int = listener.getsockname()[1]
        return port


def connect_in_vain(client: socket.socket, address: tuple[str, int]) -> None:
    """Connects, and waits until the kernel has given up.

    A connect() of Python that waits asks for the error (SO_ERROR) as soon as poll() says so. For ICMP over
    IPv4 that is before the kernel has set it, for what is queued for IP_RECVERR wakes poll() first
    (tcp_v4_err, net/ipv4/tcp_ipv4.c); and before 6.10 it may be before CLOSE, and takes the error away.
    """
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.connect(address)
    wait_state(client, CLOSE)


def given_up(wire: Wire, family: int) -> int:
    """The client closes while nobody has answered."""
    with wire.listen(family) as listener, wire.client(family) as client:
        wire.loses = every
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.connect(listener.getsockname())
        port: int = listener.getsockname()[1]
        return port


def closed_unanswered(wire: Wire, family: int) -> int:
    """The client has closed, and nobody answers its FIN."""
    pair = wire.connect(family)
    port = pair.ports[1]
    impatient(pair.client)
    wire.loses = every
    pair.client.close()
    wait(lambda: wire.inside(0, lambda: not has_socket(port)))
    wire.loses = no
    pair.server.shutdown(socket.SHUT_WR)
    wait_state(pair.server, CLOSE)
    pair.server.close()
    return port


def has_socket(port: int) -> bool:
    """Whether a socket in this thread's network namespace has this remote port (proc_net(5))."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines():
            fields = line.split()
            if fields[2].endswith(f":{port:04X}") and len(fields) > 12:  # 12: TIME_WAIT, or what it took over
                return True
    return False


BEYOND = {socket.AF_INET: "10.78.0.1", socket.AF_INET6: "fd78::1"}
"""An address that the wire's first end takes the second for a router to."""


def ip(wire: Wire, number: int, arguments: str) -> None:
    """Runs ip in the wire's first or second namespace."""
    wire.inside(number, lambda: subprocess.run(["ip", *arguments.split()], check=True))


def make_router(wire: Wire, family: int, kind: str) -> None:
    """From now on the wire's second end says that BEYOND cannot be reached (kind: see ip-route(8))."""
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        wire.inside(1, partial(set_kernel, name, 1))
    ip(wire, 1, f"route add {kind} {BEYOND[socket.AddressFamily(family)]}")


def no_way(kind: str) -> Callable[[Wire, int], int]:
    """A router on the way has no route (`unreachable`), or may not use it (`prohibit`)."""

    def make(wire: Wire, family: int) -> int:
        beyond = BEYOND[socket.AddressFamily(family)]
        port = new_port()
        ip(wire, 0, f"route add {beyond} dev wire")
        make_router(wire, family, kind)
        with wire.client(family) as client:
            connect_in_vain(client, (beyond, port))
        return port

    return make


def no_way_any_more(wire: Wire, family: int) -> int:
    """A router says so while data is sent again; that is the reason when the client gives up."""
    beyond = BEYOND[socket.AddressFamily(family)]
    nodad = "nodad" if family == socket.AF_INET6 else ""
    ip(wire, 0, f"route add {beyond} dev wire")
    ip(wire, 1, f"address add {beyond} dev wire {nodad}")
    wire.inside(1, lambda: wait_route(beyond, beyond))
    with wire.inside(1, lambda: listen(family, beyond)) as listener:
        port: int = listener.getsockname()[1]
        client = wire.client(family)
        client.connect((beyond, port))
        server, _ = listener.accept()
    prefix = 128 if family == socket.AF_INET6 else 32
    ip(wire, 1, f"address del {beyond}/{prefix} dev wire")
    make_router(wire, family, "unreachable")
    client.sendall(b"lost")
    wait(lambda: wire.inside(0, lambda: is_told(family)))
    impatient(client)
    wait_state(client, CLOSE)
    client.close()
    reset(server)
    return port


def is_told(family: int) -> bool:
    """Whether this thread's network namespace has got an ICMP message that something cannot be reached."""
    table, name = ("snmp6", "Icmp6InType1") if family == socket.AF_INET6 else ("snmp", "InType3")
    return name in Path(f"/proc/thread-self/net/{table}").read_text().split()


def silence(work: Callable[[Pair, Wire], None]) -> Callable[[Wire, int], int]:
    """The client hears no more of the server, and ends by itself; then the server does."""

    def make(wire: Wire, family: int) -> int:
        pair = wire.connect(family)
        port = pair.ports[1]
        work(pair, wire)
        wait_state(pair.client, CLOSE)
        pair.client.close()
        wire.loses = no
        pair.server.shutdown(socket.SHUT_WR)  # this FIN finds no session
        wait_state(pair.server, CLOSE)
        pair.server.close()
        return port

    return make


def idle(pair: Pair, wire: Wire) -> None:
    """The client probes whether the server is there: once a second, and one that is unanswered is enough."""
    wire.loses = every
    for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT):
        pair.client.setsockopt(socket.IPPROTO_TCP, option, 1)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def impatient(client: socket.socket) -> None:
    """It waits for an answer for less than two tries."""
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 100)


def data_unanswered(pair: Pair, wire: Wire) -> None:
    """Data is sent, and gets lost."""
    wire.loses = every
    impatient(pair.client)
    pair.client.sendall(b"lost")


def no_room(pair: Pair, wire: Wire) -> None:
    """The server has no room, which the client knows; its question whether there is some again gets lost."""
    pair.client.setblocking(False)

    def is_full() -> bool:
        with suppress(BlockingIOError):
            pair.client.send(bytes(1 << 16))
        return under_way_and_window(pair.client) == (0, 0)

    wait(is_full)
    wire.loses = every
    impatient(pair.client)


def under_way_and_window(end: socket.socket) -> tuple[int, int]:
    """Segments under way, and bytes that the peer has room for (tcpi_unacked, tcpi_snd_wnd of TCP_INFO)."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
    unacknowledged, window = struct.unpack("24xI200xI", info)
    return unacknowledged, window


OVER_LOOPBACK = {
    "client-first": End(over_loopback(client_first), FIN_LOCAL, FIN_REMOTE),
    "server-first": End(over_loopback(server_first), FIN_REMOTE, FIN_LOCAL),
    "half-closed": End(over_loopback(half_closed), FIN_LOCAL, FIN_REMOTE),
    "client-resets": End(over_loopback(client_resets), Name("reset-sent", "linger"), RESET),
    "server-resets": End(over_loopback(server_resets), RESET, Name("reset-sent", "linger")),
    "unread-data": End(over_loopback(data_unread), RESET, Name("reset-sent", "unread-data")),
    "broken-pipe": End(over_loopback(broken_pipe), RESET_AFTER_FIN, FIN_LOCAL),
    "shut-both-ways": End(over_loopback(shut_both_ways), RESET_AFTER_FIN, LATE_DATA),
    "disconnect": End(over_loopback(disconnected), Name("reset-sent", "disconnect"), RESET),
    "ss-kill": End(over_loopback(aborted), Name("aborted", error="ECONNABORTED"), RESET),
    "killed": End(killed, FIN_REMOTE, FIN_LOCAL),
    "not-accepted": End(not_accepted, RESET, Name("reset-sent", "not-accepted")),
    "refused": End(refused, Name("refused", error="ECONNREFUSED")),
    "with-itself": End(with_itself, FIN_BOTH),
    "no-port": End(failed, Name("failed")),
}
"""Those that take no time."""

UNANSWERED = Name("timeout", "handshake", "ETIMEDOUT")

OVER_A_WIRE = {
    "crossed": End(over_wire(crossed), FIN_BOTH, FIN_BOTH),
    "data-under-way": End(over_wire(data_under_way), RESET_AFTER_FIN, LATE_DATA),
    "data-with-the-fin's-ack": End(
        over_wire(data_with_the_fin_s_ack), RESET_AFTER_FIN, Name("reset-sent", "late-data")
    ),
    "data-repeated": End(over_wire(data_repeated), FIN_REMOTE, FIN_LOCAL),
    "unanswered": End(over_wire(unanswered), UNANSWERED),
    "given-up": End(over_wire(given_up), Name("cancelled")),
    "keepalive": End(over_wire(silence(idle)), Name("timeout", "probes", "ETIMEDOUT"), RESET),
    "no-room": End(over_wire(silence(no_room)), Name("timeout", "probes", "ETIMEDOUT"), RESET),
    "closed-unanswered": End(
        over_wire(closed_unanswered), Name("timeout", "retransmission", "ETIMEDOUT"), RESET
    ),
    "data-unanswered": End(
        over_wire(silence(data_unanswered)), Name("timeout", "retransmission", "ETIMEDOUT"), RESET
    ),
}

NO_WAY: dict[tuple[str, int], str] = {
    ("unreachable", socket.AF_INET): "EHOSTUNREACH",
    ("unreachable", socket.AF_INET6): "ENETUNREACH",
    ("prohibit", socket.AF_INET): "EHOSTUNREACH",
    ("prohibit", socket.AF_INET6): "EACCES",
}
"""What an ICMP error becomes."""


def says(session: Session) -> Name:
    """What a record says of its end."""
    return Name(session.ending.name, session.ending.reason, session.ending.error_name)


WIRED = ["10.76.0.0/14", "fd76::/14"]
"""The wire's networks: what else this host does might fill the buffer, until the slower ends are there."""


def see(end: End, family: int, networks: list[str] | None = None, **options: Unpack[Options]) -> None:
    """Makes it, and looks at what is reported."""
    with tcpobs.sessions(networks=networks, **options) as events:
        port = end.make(family)
        count = 2 if end.server else 1
        seen = gather(events, lambda seen: len(of_port(seen, port)) >= count)
        events.stop()
        found = of_port([*seen, *events], port)
    client, *server = sorted(found, key=lambda session: session.lport == port)
    assert (says(client), client.ending.role_name) == (end.client, "connect")
    assert [(says(s), s.ending.role_name) for s in server] == [(end.server, "accept")] * (count - 1)
    assert not any(s.ending.open or s.ending.existing or s.ending.mark for s in found)


def of_port(seen: list[Session], port: int) -> list[Session]:
    return [session for session in seen if port in (session.lport, session.rport)]


@pytest.mark.parametrize("end", OVER_LOOPBACK.values(), ids=list(OVER_LOOPBACK))
def test_over_loopback(end: End, family: int) -> None:
    see(end, family)


@pytest.mark.parametrize("end", OVER_A_WIRE.values(), ids=list(OVER_A_WIRE))
def test_over_a_wire(end: End, family: int) -> None:
    see(end, family, networks=WIRED)


@pytest.mark.parametrize(("kind", "family"), NO_WAY)
def test_no_way(kind: str, family: int) -> None:
    end = End(over_wire(no_way(kind)), Name("unreachable", error=NO_WAY[kind, family]))
    see(end, family, networks=WIRED)


def test_no_way_any_more(family: int) -> None:
    name = Name("unreachable", error=NO_WAY["unreachable", family])
    end = End(over_wire(no_way_any_more), name, Name("reset-sent", "linger"))
    see(end, family, networks=WIRED)


@pytest.mark.ways
def test_each_way_to_trace(way: Options) -> None:
    for end in OVER_LOOPBACK.values():
        see(end, socket.AF_INET6, **way)
