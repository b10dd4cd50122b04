"""tcpobs.sessions against real sockets: owners, addresses, bytes, durations."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import tcpobs
from live.ports import new_port
from live.tcp import (
    DEADLINE,
    LOOPBACK,
    TP_BTF_STORAGES,
    Pair,
    byte_counts,
    child,
    client_first,
    close_unseen,
    connect,
    gather,
    listen,
    only_second_program,
    opened,
    reset,
    wait_closed,
    wait_state,
)
from tcpobs import Session

if TYPE_CHECKING:
    from tcpobs.events import Options


pytestmark = pytest.mark.subject("`life`")


def of_port(port: int, count: int) -> Callable[[list[Session]], bool]:
    """Whether so many sessions with this port at either end are there."""
    return lambda seen: len([s for s in seen if port in (s.lport, s.rport)]) >= count


def both(seen: list[Session], port: int) -> tuple[Session, Session]:
    """The client's and the server's record of the session with this server port."""
    (client,) = [session for session in seen if session.rport == port]
    (server,) = [session for session in seen if session.lport == port]
    return client, server


@pytest.mark.essential
def test_bytes_addresses_and_duration(family: int, way: Options) -> None:
    """Bytes are what TCP_INFO says of the closed sockets, whose descriptors are still open."""
    with tcpobs.sessions(**way) as events:
        before = time.monotonic_ns()
        pair = connect(family)
        established = time.monotonic_ns()
        client_port, server_port = pair.ports
        pair.client.sendall(b"x" * 300_000)
        received = 0
        while received < 300_000:
            received += len(pair.server.recv(65536))
        pair.server.sendall(b"y" * 5000)
        pair.client.recv(5000, socket.MSG_WAITALL)
        ending = time.monotonic_ns()
        for end in pair:
            end.shutdown(socket.SHUT_WR)
        for end in pair:
            wait_state(end, 7)
        after = time.monotonic_ns()
        counted = [byte_counts(end) for end in pair]
        client, server = both(gather(events, of_port(server_port, 2)), server_port)
        assert not events.losses
    for end in pair:
        end.close()
    address = LOOPBACK[socket.AddressFamily(family)]
    for session in (client, server):
        assert (str(session.laddr), str(session.raddr)) == (address, address)
        assert session.ip == (4 if family == socket.AF_INET else 6)
        assert ending - established <= session.span_ns <= after - before
        assert before <= session.time_ns <= after
        assert session.ms == session.span_ns / 1e6
    assert (client.lport, server.rport) == (client_port, client_port)
    assert [(s.tx_bytes, s.rx_bytes) for s in (client, server)] == counted
    assert (client.tx_kb, client.rx_kb) == (292, 4)


def serve(listener: socket.socket, ready: int, end: Callable[[socket.socket], None]) -> None:
    server, _ = listener.accept()
    server.recv(1)  # now the client's connect() has returned
    os.write(ready, b"!")
    end(server)


def close_when_told(end: socket.socket) -> None:
    """Waits by poll(), which does not take the socket's lock: what came meanwhile would be this process's."""
    poll = select.poll()
    poll.register(end, select.POLLIN)
    assert poll.poll(DEADLINE * 1000)
    wait_closed(end)
    end.close()


CLIENT_SERVER_ACTS = (
    (socket.socket.close, close_when_told, True),
    (close_when_told, socket.socket.close, True),
    # The reset closes the other end in a softirq; who accepted is known only where that is seen.
    (reset, close_when_told, False),
    (close_when_told, reset, True),
)
"""What the client does, what the server does, and whether that shows the server."""


@pytest.mark.essential
def test_who_ends_a_session_owns_its_end(way: Options, family: int) -> None:
    """Each end belongs to the process that acted on it; nobody's is 0 and `-`, and never a guess."""
    truth: dict[int, int] = {}
    served, ready = os.pipe()
    with tcpobs.sessions(**way) as events:
        for client_ends, server_ends, server_acts in CLIENT_SERVER_ACTS:
            with listen(family) as listener:
                with child(partial(serve, listener, ready, server_ends)) as server_pid:
                    client_end = socket.create_connection(listener.getsockname()[:2])
                    client_end.sendall(b"!")
                    # Now the server's accept() has; and it holds the lock no more: a reset that came while
                    # it did would be handled by the server.
                    os.read(served, 1)
                    client_ends(client_end)
                known = server_acts or way["accept"] != "none"
                truth[listener.getsockname()[1]] = server_pid if known else 0
        seen = gather(events, lambda seen: all(of_port(port, 2)(seen) for port in truth))
    os.close(served)
    os.close(ready)
    for port, server_pid in truth.items():
        client, server = both(seen, port)
        assert client.pid == os.getpid()
        assert server.pid == server_pid
        assert (server.comm == "-") == (server.pid == 0)


def test_refused_is_a_session_of_who_tried() -> None:
    port = new_port()
    with tcpobs.sessions(remote_ports=[port]) as events:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        (session,) = gather(events, of_port(port, 1))
    assert (session.pid, session.tx_bytes, session.rx_bytes) == (os.getpid(), 0, 0)


def test_a_session_older_than_tcpobs_is_not_shown() -> None:
    old = connect(socket.AF_INET)
    ports = set(old.ports)
    with tcpobs.sessions() as events:
        for end in old:
            end.close()
        new = connect(socket.AF_INET)
        new_port = new.ports[1]
        for end in new:
            end.close()
        seen = gather(events, of_port(new_port, 2))
    assert not [session for session in seen if {session.lport, session.rport} == ports]


@pytest.mark.essential
@pytest.mark.parametrize("storage", TP_BTF_STORAGES)
def test_what_the_kernel_skips_the_second_program_sees(
    storage: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the second program alone, every change is one that the first had to leave."""
    only_second_program(monkeypatch)
    with tcpobs.sessions(hook="tp_btf", storage=storage) as events:
        pair = connect(family)
        port = pair.ports[1]
        pair.client.sendall(b"x" * 1000)
        assert len(pair.server.recv(1000, socket.MSG_WAITALL)) == 1000
        client_first(pair)
        client, server = both(gather(events, of_port(port, 2)), port)
    assert client.tx_bytes >= server.rx_bytes >= 1000  # SYN and FIN count, too
    assert client.pid == server.pid == os.getpid()
    assert client.span_ns > 0


@pytest.mark.essential
@pytest.mark.parametrize("storage", TP_BTF_STORAGES)
def test_nobody_is_known_to_have_closed_what_was_closed_unseen(
    storage: str, family: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the kernel skips all programs: who connected need not be who closed."""
    objects = opened(monkeypatch)
    with tcpobs.sessions(hook="tp_btf", storage=storage) as events:
        pair = connect(family)
        port = pair.ports[1]
        close_unseen(pair, objects[-1], "life_tp_btf")
        client, server = both(gather(events, of_port(port, 2)), port)
    assert (client.pid, client.comm, client.ending.name) == (0, "-", "fin-local")
    assert server.pid == os.getpid()


def test_filters_lose_no_session(family: int) -> None:
    """A client's local port is 0 at its birth, a server's peer empty: -L and -D see both all the same."""
    every = range(1, 65536)
    with (
        tcpobs.sessions(local_ports=every) as by_local,
        tcpobs.sessions(remote_ports=every) as by_remote,
        tcpobs.sessions(pid=os.getpid()) as by_pid,
        tcpobs.sessions(pid=1) as by_other_pid,
    ):
        pair = connect(family)
        client_port, port = pair.ports
        for end in pair:
            end.close()
        for events in (by_local, by_remote, by_pid):
            client, server = both(gather(events, of_port(port, 2)), port)
            assert client.lport == server.rport == client_port
        by_other_pid.stop()
        assert not [session for session in by_other_pid if port in (session.lport, session.rport)]


def test_the_example_in_the_docs() -> None:
    """The example in docs/api.md runs as it is written, but for the port; it is stopped when it prints."""
    with open(os.path.join(os.path.dirname(__file__), "../../docs/api.md")) as file:
        example = file.read().split("```python\n")[1].split("```")[0]
    with listen(socket.AF_INET) as listener:
        port = listener.getsockname()[1]
        ended = threading.Event()

        def session_after_session() -> None:
            while not ended.wait(0.05):
                pair = Pair(socket.create_connection(("127.0.0.1", port)), listener.accept()[0])
                for end in pair:
                    end.close()

        traffic = threading.Thread(target=session_after_session)
        printed: list[str] = []

        def print_and_stop(*values: object) -> None:
            printed.append(" ".join(map(str, values)))
            names["events"].stop()

        names: dict[str, Any] = {"print": print_and_stop}
        traffic.start()
        try:
            exec(example.replace("443", str(port)), names)
        finally:
            ended.set()
            traffic.join()
    assert printed[-1] == "lost: none"
    assert any("127.0.0.1" in line for line in printed[:-1])
