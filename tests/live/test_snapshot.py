"""Sessions that are older than the trace, and those that outlive it."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tcpobs
from live.tcp import (
    LOOPBACK,
    TP_BTF_STORAGES,
    WALK_LIMIT,
    WAYS,
    Pair,
    client_first,
    connect,
    gather,
    listen,
    reset,
    wait,
    wait_closed,
    wait_state,
)
from live.wire import Wire
from tcpobs import Session
from tcpobs.libbpf import LibbpfError

if TYPE_CHECKING:
    from tcpobs.events import Options

pytestmark = pytest.mark.subject("sessions that were there before, and that are open")

CLOSE, FIN_WAIT2, CLOSE_WAIT = 7, 5, 8
"""include/net/tcp_states.h."""

ELSEWHERE = "127.77.0.1"
"""An address of the others, who may have the same ports."""

Key = tuple[int, int]
"""A session's end: its local and its remote port."""


@contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """Runs `work` in a process of its own, which is killed at the end; its PID."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(1)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def churn() -> None:
    """Sessions, one after another, for ever; some end in a softirq, and are nobody's.

    All with one listener: there are not ports enough for one each.
    """
    with listen(socket.AF_INET, ELSEWHERE) as listener:
        address = listener.getsockname()
        while True:
            client_first(Pair(socket.create_connection(address), listener.accept()[0]))
            pair = Pair(socket.create_connection(address), listener.accept()[0])
            reset(pair.client)
            pair.server.close()


@pytest.fixture
def many() -> Iterator[int]:
    """How many sessions: as many as there may be files for, up to 5,000; in a VM, which is slow, fewer."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    is_slow = "vm.job=" in Path("/proc/cmdline").read_text()
    yield min(500 if is_slow else 5000, limits[1] // 2 - 200)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def open_many(count: int) -> Iterator[list[Pair]]:
    """So many sessions with one server; none is left at the end."""
    with ExitStack() as sockets:
        with listen(socket.AF_INET) as listener:
            address = listener.getsockname()
            pairs = []
            for _ in range(count):
                client = sockets.enter_context(socket.create_connection(address))
                pairs.append(Pair(client, sockets.enter_context(listener.accept()[0])))
        yield pairs


def key(session: Session) -> Key:
    return session.lport, session.rport


def keys(pairs: list[Pair]) -> list[Key]:
    """Of both ends of each."""
    return [
        ends
        for client, server in (pair.ports for pair in pairs)
        for ends in ((client, server), (server, client))
    ]


def is_there(wanted: set[Key]) -> Callable[[list[Session]], bool]:
    """Whether all of these have been reported."""
    missing, looked = set(wanted), 0

    def enough(seen: list[Session]) -> bool:
        nonlocal looked
        missing.difference_update(map(key, seen[looked:]))
        looked = len(seen)
        return not missing

    return enough


WALKED = [storage for storage in TP_BTF_STORAGES if storage not in WALK_LIMIT]
WALKED_WAYS = [way for way in WAYS if way.storage not in WALK_LIMIT]


@pytest.fixture(params=WALKED_WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> Options:
    """Each way whose storage this kernel lets us walk through."""
    options: Options = request.param._asdict()
    return options


@pytest.mark.essential
def test_a_walk_that_the_kernel_refuses() -> None:
    """Its cause is named where it is forced; else the next way is taken."""
    for storage in WALK_LIMIT:
        with pytest.raises(tcpobs.TcpobsError, match=f"refuses the iterator iter/bpf_{storage}_map"):
            tcpobs.sessions(still_open=True, storage=storage)
    with tcpobs.sessions(still_open=True) as events:
        assert events.way.storage in WALKED


def test_without_map_iterators(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every kernel: where the iterator is refused, the hash is taken, and walked through by lookups."""

    def refuse(*_: object) -> None:
        raise LibbpfError("bpf_program__attach_iter", errno.EPERM)

    monkeypatch.setattr("tcpobs.open_sessions.BpfIterator", refuse)
    held, held_keys = opened()
    with closing(held.client), closing(held.server):
        with tcpobs.sessions(existing=True, still_open=True, duration=0) as events:
            seen = list(events)
        assert events.way.storage == "hash"
    assert [s.ending.name for s in of(held_keys, seen)] == ["open", "open"]


@pytest.mark.essential
@pytest.mark.parametrize("storage", WALKED)
def test_none_is_missed_and_none_comes_twice(storage: str, many: int) -> None:
    """Some of many old sessions end while it traces, others stay; meanwhile others come and go."""
    with process(churn), open_many(many) as pairs:
        ending = pairs[::3]
        with tcpobs.sessions(storage=storage, existing=True, still_open=True) as events:
            old, going = keys(pairs), set(keys(ending))
            for pair in ending:
                client_first(pair)
            seen = gather(events, is_there(going))
            assert not events.losses.buffer_full
            assert not events.losses.sockets_full
        us = os.getpid()
        ours = [session for session in seen if ELSEWHERE not in (str(session.laddr), str(session.raddr))]
        found = Counter(map(key, ours))
        assert [each for each in old if found[each] != 1] == []
        by_key = {key(session): session for session in ours}
        for each in old:
            session = by_key[each]
            assert session.ending.existing
            assert session.ending.open == (each not in going)
            assert session.pid == us


@pytest.mark.parametrize("storage", WALKED)
def test_every_listing_has_each_once(storage: str, many: int) -> None:
    """Whatever comes and goes meanwhile."""
    with process(churn), open_many(many) as pairs:
        wanted = set(keys(pairs))
        listed: Counter[Key] = Counter()
        with tcpobs.sessions(storage=storage, existing=True, every=0.1) as events:
            for batch in events.batches():
                listed.update(key(session) for session in batch if key(session) in wanted)
                if max(listed.values(), default=0) == 3:
                    events.stop()  # this listing still comes to its end
            assert not events.losses.sockets_full
        assert [each for each in wanted if listed[each] != 3] == []


def opened(family: int = socket.AF_INET) -> tuple[Pair, list[Key]]:
    """A session, and how its ends are known when it is closed, too."""
    pair = connect(family)
    return pair, keys([pair])


def of(wanted: list[Key], seen: list[Session]) -> list[Session]:
    """These sessions' records, the client's end first."""
    found = [session for session in seen if key(session) in wanted]
    return sorted(found, key=lambda session: wanted.index(key(session)))


@pytest.mark.ways
def test_how_they_are_told(family: int, way: Options) -> None:
    """One that ends counts from the trace's start, and which side began it is not known."""
    (old, old_keys), (held, held_keys) = opened(family), opened(family)
    with closing(held.client), closing(held.server):
        with tcpobs.sessions(existing=True, still_open=True, **way) as events:
            client_first(old)
            seen = gather(events, lambda seen: len(of(old_keys, seen)) == 2)
        for session in of(old_keys, seen) + of(held_keys, seen):
            assert session.ending.existing
            assert (session.ending.role_name, session.ending.mark) == ("-", "+")
            assert session.course.handshake_us == 0
            assert session.span_ns > 0
        assert [s.ending.name for s in of(old_keys, seen)] == ["fin-local", "fin-remote"]
        assert [s.ending.name for s in of(held_keys, seen)] == ["open", "open"]
        assert {str(s.laddr) for s in of(old_keys, seen)} == {LOOPBACK[socket.AddressFamily(family)]}


def test_without_existing_they_stay_out() -> None:
    (old, old_keys), (held, held_keys) = opened(), opened()
    with closing(held.client), closing(held.server):
        with tcpobs.sessions(still_open=True) as events:
            client_first(old)
            (new, new_keys), (stays, stays_keys) = opened(), opened()
            client_first(new)
            with closing(stays.client), closing(stays.server):
                seen = gather(events, lambda seen: len(of(new_keys, seen)) == 2)
        assert of(old_keys, seen) == of(held_keys, seen) == []
        assert [(s.ending.name, s.ending.existing) for s in of(stays_keys, seen)] == [("open", 0)] * 2
        assert [s.ending.role_name for s in of(stays_keys, seen)] == ["connect", "accept"]


def test_half_closed_ones() -> None:
    """The state that each was in is seen from its end."""
    old, old_keys = opened()
    old.client.shutdown(socket.SHUT_WR)
    wait_state(old.client, FIN_WAIT2)
    wait_state(old.server, CLOSE_WAIT)
    with tcpobs.sessions(existing=True, every=0.1) as events:
        seen = gather(events, lambda seen: len(of(old_keys, seen)) >= 2)
        assert {s.ending.oldstate for s in of(old_keys, seen)} == {FIN_WAIT2, CLOSE_WAIT}
    with tcpobs.sessions(existing=True) as events:
        for end in old[::-1]:
            end.close()
        seen = gather(events, lambda seen: len(of(old_keys, seen)) == 2)
    assert [s.ending.name for s in of(old_keys, seen)] == ["fin-local", "fin-remote"]


def test_accepted_after_the_start() -> None:
    """No file was open for it then: accept() is the first that is seen of it."""
    with listen(socket.AF_INET) as listener:
        client = socket.create_connection(listener.getsockname())
        with tcpobs.sessions(existing=True) as events:
            pair = Pair(client, listener.accept()[0])
            ends = keys([pair])
            reset(pair.client)  # a softirq ends the server's
            wait_closed(pair.server)
            pair.server.close()
            client_end, server_end = of(ends, gather(events, lambda seen: len(of(ends, seen)) == 2))
    assert client_end.ending.existing
    assert server_end.ending.existing
    if events.way.accept != "none":
        assert server_end.pid == os.getpid()


def test_nobody_is_named_where_two_hold_it() -> None:
    """Until one of them closes it at last."""
    old, old_keys = opened()
    go, told = os.pipe()

    def close_when_told() -> None:
        os.read(go, 1)
        old.client.close()
        wait_closed(old.server)
        old.server.close()
        signal.pause()

    with process(close_when_told), tcpobs.sessions(existing=True, every=0.1) as events:
        shared = of(old_keys, gather(events, lambda seen: len(of(old_keys, seen)) >= 2))
        assert {(s.ending.name, s.pid, s.comm, s.identity.uid) for s in shared} == {("open", 0, "-", 0)}
    with process(close_when_told) as other, tcpobs.sessions(existing=True) as events:
        for end in old:
            end.close()
        os.write(told, b".")
        ended = of(old_keys, gather(events, lambda seen: len(of(old_keys, seen)) == 2))
    assert {s.pid for s in ended} == {other}
    for fd in (go, told):
        os.close(fd)


def test_every_so_often_and_once_at_the_end() -> None:
    pair = connect(socket.AF_INET)
    port = pair.ports[1]
    with tcpobs.sessions(existing=True, still_open=True, every=0.2, local_ports=[port]) as events:
        sizes: list[int] = []
        for session in events:
            assert (session.ending.name, session.ending.existing) == ("open", 1)
            sizes.append(session.rx_bytes)
            if len(sizes) < 4:
                pair.client.sendall(b"x" * 1000)
                wait(lambda: len(pair.server.recv(1000, socket.MSG_PEEK)) > 0)
                pair.server.recv(1000, socket.MSG_WAITALL)
            elif len(sizes) == 4:
                client_first(pair)
                break
        seen = gather(events, lambda seen: any(not session.ending.open for session in seen))
    (end,) = (session for session in seen if not session.ending.open)
    assert sizes == [0, 1000, 2000, 3000]
    assert (end.ending.name, end.rx_bytes >= 3000) == ("fin-remote", True)


def test_the_end_of_the_trace_is_told_once() -> None:
    """Also where `every` has told the same before."""
    pair = connect(socket.AF_INET)
    port = pair.ports[1]
    with (
        closing(pair.client),
        closing(pair.server),
        tcpobs.sessions(still_open=True, every=0.1, existing=True, local_ports=[port]) as events,
    ):
        seen = 0
        for batch in events.batches():
            seen += len(batch)
            if seen == 2:
                events.stop()
                seen = -1000
        assert seen + 1000 == 1


@pytest.mark.essential
def test_in_another_network_namespace(family: int) -> None:
    with Wire() as wire:
        pair = wire.connect(family)
        with tcpobs.sessions(existing=True, still_open=True, duration=0) as events:
            seen = {key(session): session for session in of(keys([pair]), list(events))}
        for number, ports in enumerate(keys([pair])):
            assert seen[ports].netns == wire.netns(number) != os.stat("/proc/self/ns/net").st_ino
            assert str(seen[ports].laddr) == wire.address(family, number)
            assert seen[ports].pid == os.getpid()
        for end in pair:
            end.close()


def test_a_change_of_an_old_socket_has_an_owner() -> None:
    """Though a softirq makes it: who held the socket at the start."""
    pair = connect(socket.AF_INET)
    client_port, port = pair.ports
    with tcpobs.states(owners=True) as events:
        reset(pair.client)
        wait_closed(pair.server)
        pair.server.close()
        seen = gather(events, lambda seen: sum(port in (e.lport, e.rport) for e in seen) >= 2)
    by_port = {event.lport: event for event in seen if port in (event.lport, event.rport)}
    for end in (client_port, port):
        assert (by_port[end].oldstate, by_port[end].newstate) == ("ESTABLISHED", "CLOSE")
        assert by_port[end].owner.pid == os.getpid()
