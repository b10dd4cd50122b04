"""tcpobs.states against real sockets: the exact sequence of states at both ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest

import tcpobs
from live.ports import mark, new_port, since
from live.tcp import (
    LOOPBACK,
    TP_BTF_STORAGES,
    Pair,
    child,
    client_first,
    client_resets,
    close_unseen,
    connect,
    gather,
    half_closed,
    listen,
    only_second_program,
    opened,
    server_first,
    server_resets,
    wait_state,
)
from live.wire import Wire
from tcpobs import StateChange

if TYPE_CHECKING:
    from tcpobs.events import Options

pytestmark = pytest.mark.subject("`states`")

CLIENT_OPENS = ["CLOSE>SYN_SENT", "SYN_SENT>ESTABLISHED"]
SERVER_OPENS = ["LISTEN>SYN_RECV", "SYN_RECV>ESTABLISHED"]
CLOSES_FIRST = ["ESTABLISHED>FIN_WAIT1", "FIN_WAIT1>FIN_WAIT2", "FIN_WAIT2>CLOSE"]
CLOSES_SECOND = ["ESTABLISHED>CLOSE_WAIT", "CLOSE_WAIT>LAST_ACK", "LAST_ACK>CLOSE"]
IS_RESET = ["ESTABLISHED>CLOSE"]


def closed(port: int, sockets: int) -> Callable[[list[StateChange]], bool]:
    """Whether so many sockets with this port, at either end, have come to CLOSE."""

    def enough(seen: list[StateChange]) -> bool:
        ends = [event for event in seen if event.newstate == "CLOSE"]
        return len([event for event in ends if port in (event.lport, event.rport)]) >= sockets

    return enough


def path(events: list[StateChange]) -> list[str]:
    return [f"{event.oldstate}>{event.newstate}" for event in events]


def by_socket(events: list[StateChange], port: int) -> dict[str, list[StateChange]]:
    """The events of each socket of this server's port, by its part; others' are left out."""
    parts = {"SYN_SENT": "client", "SYN_RECV": "server", "LISTEN": "listener"}
    found: dict[str, list[StateChange]] = {}
    open_now: dict[int, list[StateChange]] = {}
    ours = [event for event in events if port in (event.lport, event.rport)]
    for event in sorted(ours, key=lambda event: event.time_ns):
        changes = open_now.setdefault(event.skaddr, [])
        changes.append(event)
        if event.newstate == "CLOSE":
            del open_now[event.skaddr]
            found[parts[changes[0].newstate]] = changes
    return found


PATHS: dict[Callable[[Pair], None], tuple[list[str], list[str]]] = {
    client_first: (CLOSES_FIRST, CLOSES_SECOND),
    server_first: (CLOSES_SECOND, CLOSES_FIRST),
    client_resets: (IS_RESET, IS_RESET),
    server_resets: (IS_RESET, IS_RESET),
    half_closed: (CLOSES_FIRST, CLOSES_SECOND),
}
"""How the client's and the server's end close, by who ends the session."""


@pytest.mark.essential
def test_both_ends_of_a_session(family: int, way: Options) -> None:
    with tcpobs.states(**way) as events:
        all_ports = []
        for end in PATHS:
            pair = connect(family)
            all_ports.append(pair.ports)
            end(pair)
        seen = gather(events, lambda seen: all(closed(ports[1], 3)(seen) for ports in all_ports))
        assert not events.losses
    for ports, (client, server) in zip(all_ports, PATHS.values()):
        ends = by_socket(seen, ports[1])
        assert path(ends["client"]) == CLIENT_OPENS + client
        assert path(ends["server"]) == SERVER_OPENS + server
        assert path(ends["listener"]) == ["CLOSE>LISTEN", "LISTEN>CLOSE"]
        has_addresses(ends, family, *ports)


def has_addresses(
    ends: dict[str, list[StateChange]], family: int, client_port: int, server_port: int
) -> None:
    """Asserts that each change has the socket's addresses, and the task of a system call."""
    address = LOOPBACK[socket.AddressFamily(family)]
    for event in ends["client"] + ends["server"] + ends["listener"]:
        assert event.ip == (4 if family == socket.AF_INET else 6)
        assert str(event.laddr) == address
        if event.newstate in ("SYN_SENT", "FIN_WAIT1", "LAST_ACK", "LISTEN"):  # by a system call
            assert (event.c_pid, event.c_comm) == (os.getpid(), comm())
    for event in ends["client"][1:]:  # at SYN_SENT the local port is not chosen yet
        assert (str(event.raddr), event.lport, event.rport) == (address, client_port, server_port)
    for event in ends["server"][1:]:
        assert (str(event.raddr), event.lport, event.rport) == (address, server_port, client_port)
    for event in ends["listener"]:
        assert (event.lport, event.rport) == (server_port, 0)


def comm() -> str:
    with open("/proc/self/comm") as file:
        return file.read().rstrip("\n")


@pytest.mark.ways
def test_spans_are_the_time_in_the_old_state(way: Options) -> None:
    with tcpobs.states(**way) as events:
        before = time.monotonic_ns()
        pair = connect(socket.AF_INET6)
        port = pair.ports[1]
        client_first(pair)
        seen = gather(events, closed(port, 3))
        after = time.monotonic_ns()  # the last ACK may be ksoftirqd's work, later
    for changes in by_socket(seen, port).values():
        assert changes[0].span_ns == 0
        for earlier, later in zip(changes, changes[1:]):
            assert later.span_ns == later.time_ns - earlier.time_ns
            assert before < earlier.time_ns <= later.time_ns < after


@pytest.mark.ways
def test_refused(way: Options) -> None:
    port = new_port()
    with tcpobs.states(remote_ports=[port], **way) as events:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        seen = gather(events, closed(port, 1))
    assert path(seen) == ["CLOSE>SYN_SENT", "SYN_SENT>CLOSE"]
    assert seen[1].lport != 0


def test_a_socket_that_connects_again_starts_anew() -> None:
    """What is remembered of a socket ends with CLOSE, though the socket may live on."""
    port = new_port()
    with tcpobs.states(remote_ports=[port]) as events, socket.socket() as client:
        for _ in range(2):
            assert client.connect_ex(("127.0.0.1", port)) != 0
        seen = gather(events, closed(port, 2))
    assert [event.span_ns == 0 for event in seen] == [True, False, True, False]


def test_mapped_ipv4() -> None:
    """IPv4 on an IPv6 socket keeps the socket's family, and both addresses their own side."""
    with tcpobs.states() as events:
        with listen(socket.AF_INET6, "::", dual=True) as listener:
            client = socket.socket(socket.AF_INET6)
            client.bind(("::ffff:127.0.0.2", 0))
            port = listener.getsockname()[1]
            client.connect(("::ffff:127.0.0.1", port))
            server, _ = listener.accept()
        client_first(Pair(client, server))
        ends = by_socket(gather(events, closed(port, 3)), port)
    for event in ends["client"]:
        assert event.laddr == ip_address("::ffff:127.0.0.2")
        assert event.raddr == ip_address("::ffff:127.0.0.1")
    assert path(ends["client"]) == CLIENT_OPENS + CLOSES_FIRST
    assert [event.ip for event in ends["server"]] == [6] * 5


def test_both_close_at_once_in_other_network_namespaces() -> None:
    """Each end's FIN is on the wire before the other's arrives: FIN_WAIT1, CLOSING, and no LAST_ACK."""
    with Wire() as wire, tcpobs.states() as events:
        pair = wire.connect()
        port = pair.ports[1]
        wire.hold()
        pair.client.shutdown(socket.SHUT_WR)
        pair.server.shutdown(socket.SHUT_WR)
        wire.release()
        for end in pair:
            wait_state(end, 7)
            end.close()
        ends = by_socket(gather(events, closed(port, 3)), port)
    closing = ["ESTABLISHED>FIN_WAIT1", "FIN_WAIT1>CLOSING", "CLOSING>CLOSE"]
    assert path(ends["client"]) == CLIENT_OPENS + closing
    assert path(ends["server"]) == SERVER_OPENS + closing
    assert {str(event.laddr) for event in ends["client"]} == {wire.addresses[0]}
    assert {str(event.raddr) for event in ends["client"]} == {wire.addresses[1]}


def test_filters_choose_rows_and_never_what_is_known(family: int) -> None:
    """With -L of the server: its rows and the listener's; their spans are as without a filter."""
    with listen(family) as listener:
        port = listener.getsockname()[1]
        with tcpobs.states(local_ports=[port]) as local, tcpobs.states(remote_ports=[port]) as remote:
            client = socket.create_connection(listener.getsockname()[:2])
            server, _ = listener.accept()
            client_first(Pair(client, server))
            of_server = gather(local, closed(port, 1))
            of_client = gather(remote, closed(port, 1))
    assert path(of_server) == SERVER_OPENS + CLOSES_SECOND
    assert path(of_client) == CLIENT_OPENS + CLOSES_FIRST
    assert all(event.span_ns for event in of_server[1:] + of_client[1:])


def test_one_family_only() -> None:
    with tcpobs.states(ip=4) as four, tcpobs.states(ip=6) as six:
        ports = {}
        for family in LOOPBACK:
            pair = connect(family)
            ports[family] = pair.ports[1]
            client_first(pair)
        seen = gather(four, closed(ports[socket.AF_INET], 3))
        assert {event.ip for event in seen} == {4}
        seen = gather(six, closed(ports[socket.AF_INET6], 3))
        assert {event.ip for event in seen} == {6}


def test_every_port_in_a_filter() -> None:
    with tcpobs.states(local_ports=range(65536)) as events:
        pair = connect(socket.AF_INET)
        port = pair.ports[1]
        client_first(pair)
        ends = by_socket(gather(events, closed(port, 3)), port)
    assert sum(map(len, ends.values())) == 12


def test_perf_buffers_give_events_in_order() -> None:
    """Each CPU has its own; sessions on all of them at once come out by their time."""
    marked = mark()
    with tcpobs.states(transport="perfbuf") as events:
        with child(make_sessions), child(make_sessions):
            make_sessions()
        ours = since(marked)

        def enough(seen: list[StateChange]) -> bool:
            closed = sum(e.newstate == "CLOSE" and not ours.isdisjoint((e.lport, e.rport)) for e in seen)
            return closed + events.losses.recursion_misses >= 3 * 20 * 3

        seen = gather(events, enough)
    times = [event.time_ns for event in seen]
    assert times == sorted(times)


@pytest.mark.essential
@pytest.mark.parametrize("storage", TP_BTF_STORAGES)
def test_what_the_kernel_skips_the_second_program_sees(
    storage: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the second program alone, every change is one that the first had to leave."""
    only_second_program(monkeypatch)
    with tcpobs.states(hook="tp_btf", storage=storage) as events:
        pair = connect(family)
        port = pair.ports[1]
        client_first(pair)
        ends = by_socket(gather(events, closed(port, 3)), port)
    assert path(ends["client"]) == CLIENT_OPENS + CLOSES_FIRST
    assert path(ends["server"]) == SERVER_OPENS + CLOSES_SECOND
    assert path(ends["listener"]) == ["CLOSE>LISTEN", "LISTEN>CLOSE"]
    assert all(event.span_ns for event in ends["client"][1:])


@pytest.mark.essential
@pytest.mark.parametrize("storage", TP_BTF_STORAGES)
def test_nobody_is_known_to_have_closed_what_was_closed_unseen(
    storage: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the kernel skips all programs: who connected need not be who closed."""
    objects = opened(monkeypatch)
    with tcpobs.states(hook="tp_btf", storage=storage, owners=True) as events:
        pair = connect(family)
        port = pair.ports[1]
        close_unseen(pair, objects[-1], "states_tp_btf")
        client = by_socket(gather(events, closed(port, 3)), port)["client"]
    assert path(client) == [*CLIENT_OPENS, "FIN_WAIT2>CLOSE"]
    assert [event.owner.pid for event in client] == [os.getpid(), os.getpid(), 0]


def make_sessions() -> None:
    for _ in range(20):
        client_first(connect(socket.AF_INET))
