"""Filters by network, network namespace and owner: of `sessions`, and of `states`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable
from typing import Any

import pytest

import tcpobs
from live.tcp import (
    Pair,
    child,
    client_first,
    client_resets,
    connect,
    gather,
    listen,
    wait_closed,
    wait_queued,
)
from live.wire import Wire
from tcpobs.records import WithEndpoints

pytestmark = pytest.mark.subject("filters")

Ports = frozenset[int]
"""A session, by its two ports: one of them alone may have been another's a moment ago."""


def ports(event: WithEndpoints) -> Ports:
    return frozenset((event.lport, event.rport))


def check(wanted: Callable[[], Ports], unwanted: Iterable[Callable[[], Ports]], **filters: Any) -> None:
    """Both ends of the wanted session come, and none of the others."""
    with tcpobs.sessions(**filters) as sessions, tcpobs.states(**filters) as states:
        others = {make() for make in unwanted}
        found = wanted()
        seen = gather(sessions, both_ends(found))
        assert not others & set(map(ports, seen))
        changes = gather(states, lambda seen: sum(is_end(change, found) for change in seen) >= 2)
        assert not others & set(map(ports, changes))


def both_ends(of: Ports) -> Callable[[list[tcpobs.Session]], bool]:
    """Whether both ends of that session are among these."""
    return lambda seen: list(map(ports, seen)).count(of) >= 2


def is_end(change: tcpobs.StateChange, of: Ports) -> bool:
    """Whether that session ended."""
    return change.newstate == "CLOSE" and ports(change) == of


def ended(pair: Pair, end: Callable[[Pair], None] = client_first) -> Ports:
    """Its ports, when it is over."""
    found = frozenset(pair.ports)
    end(pair)
    return found


def from_address(client: str, server: str, listen_at: str | None = None) -> Callable[[], Ports]:
    """A session between these addresses, to a listener that may have another one (`::`)."""

    def make() -> Ports:
        family = socket.AF_INET6 if ":" in (listen_at or server) else socket.AF_INET
        dual = listen_at == "::"
        with listen(family, listen_at or server, dual=dual) as listener:
            port = listener.getsockname()[1]
            connected = socket.create_connection((server, port), source_address=(client, 0))
            accepted, _ = listener.accept()
        return ended(Pair(connected, accepted))

    return make


V4, V4_ELSEWHERE = from_address("127.1.2.3", "127.0.0.1"), from_address("127.1.3.3", "127.0.0.1")
V4_BACK, MAPPED = from_address("127.0.0.1", "127.1.2.3"), from_address("127.1.2.3", "127.0.0.1", "::")
BOTH_MAPPED = from_address("::ffff:127.1.2.3", "::ffff:127.0.0.1", "::")
MAPPED_ELSEWHERE = from_address("127.1.3.3", "127.0.0.1", "::")
V6 = from_address("::1", "::1")


@pytest.mark.parametrize(
    ("networks", "wanted", "unwanted"),
    [
        (["127.1.2.0/24"], V4, [V4_ELSEWHERE, V6, MAPPED_ELSEWHERE]),
        (["127.1.2.3"], V4_BACK, [V4_ELSEWHERE, V6]),
        (["127.1.2.0/23"], V4, [from_address("127.1.4.3", "127.0.0.1")]),
        (["127.1.2.0/24"], MAPPED, [MAPPED_ELSEWHERE, V4_ELSEWHERE]),
        (["127.1.2.0/24"], BOTH_MAPPED, [MAPPED_ELSEWHERE, V6]),
        (["::ffff:127.1.2.0/120"], BOTH_MAPPED, [V4, V6]),
        (["::1"], V6, [V4, MAPPED]),
        (["::/127"], V6, [V4]),  # a listener at :: would be in it
        (["0.0.0.0/0"], MAPPED, [V6]),
        (["::/0"], BOTH_MAPPED, [V4]),
        (["10.0.0.0/8", "fd00::/8", "127.1.2.3/32"], V4, [V4_ELSEWHERE, V6]),
        ([f"10.{number}.0.0/16" for number in range(7)] + ["127.1.2.3"], MAPPED, [V4_ELSEWHERE, V6]),
    ],
)  # fmt: skip
def test_networks(
    networks: list[str], wanted: Callable[[], Ports], unwanted: list[Callable[[], Ports]]
) -> None:
    check(wanted, unwanted, networks=networks)


@pytest.mark.parametrize(
    ("network", "other"),
    [("fd77::2", "fd77::3"), ("fd76::/15", "fd74::/15"), ("fd77::/126", "fd77::4/126")],
)
def test_networks_of_either_end(network: str, other: str) -> None:
    """The client is at fd77::1, the server at fd77::2."""
    with Wire() as wire, tcpobs.sessions(networks=[other]) as others:
        check(lambda: ended(wire.connect(socket.AF_INET6)), [V6, V4], networks=[network])
        others.stop()
        assert list(others) == []


def test_a_network_namespace() -> None:
    """That of the client, and then its end alone."""
    with Wire() as wire:
        with (
            tcpobs.sessions(netns=wire.netns(0)) as sessions,
            tcpobs.states(netns=wire.netns(0)) as states,
            tcpobs.sessions(netns=os.stat("/proc/self/ns/net").st_ino) as here,
        ):
            outside = V4()
            pair = wire.connect()
            port = pair.ports[1]
            inside = ended(pair)
            (session,) = gather(sessions, lambda seen: len(seen) >= 1)
            changes = gather(states, lambda seen: any(change.newstate == "CLOSE" for change in seen))
            ours = gather(here, both_ends(outside))
        assert (session.rport, session.netns, str(session.laddr)) == (port, wire.netns(0), "10.77.0.1")
        assert {(change.rport, change.netns) for change in changes} == {(port, wire.netns(0))}
        assert inside not in map(ports, ours)


def in_child(prepare: Callable[[], object] = lambda: None) -> Ports:
    """A session of another process."""
    read, write = os.pipe()

    def work() -> None:
        prepare()
        os.write(write, b"%d %d" % tuple(ended(connect(socket.AF_INET))))

    with child(work):
        os.close(write)  # the read ends, too, when the child does
        found = frozenset(map(int, os.read(read, 20).split()))
    os.close(read)
    return found


def another_user() -> Ports:
    return in_child(lambda: os.setuid(4711))


def named(name: bytes) -> Callable[[], Ports]:
    """A session of a process with this name."""

    def rename() -> None:
        with open("/proc/self/comm", "wb") as file:
            file.write(name)

    return lambda: in_child(rename)


def test_a_user() -> None:
    check(another_user, [V4, V6], uid=4711)
    check(V4, [another_user], uid=0)


@pytest.mark.parametrize("name", ["short", "fifteen letters", "longer than fifteen letters", "žluťoučký kůň"])
def test_a_name(name: str) -> None:
    """The kernel keeps 15 bytes of it."""
    encoded = name.encode()
    others = [named(encoded[:15][:-1]), V4] + [named(encoded + b"!")] * (len(encoded) < 15)
    check(named(encoded), others, comm=name)


def test_a_process() -> None:
    """Both ends are this process's; another's, that was its child, are not."""
    check(V4, [in_child], pid=os.getpid())


def nobody_s() -> int:
    """A server's end that nobody accepted: the listener's close() is a reset, and no owner is known."""
    listener = listen(socket.AF_INET)
    with socket.create_connection(listener.getsockname()) as client:
        port: int = listener.getsockname()[1]
        wait_queued(listener)
        listener.close()
        wait_closed(client)
    return port


@pytest.mark.parametrize("filter", [{"uid": 0}, {"pid": os.getpid()}, {}], ids=["uid", "pid", "none"])
def test_nobody_s_is_in_no_filter_by_owner(filter: dict[str, int]) -> None:
    """Not even in that of user 0."""
    with tcpobs.sessions(**filter) as events:  # type: ignore[arg-type]
        port = nobody_s()
        last = V4()
        seen = gather(events, both_ends(last))
    ends = [(s.pid, s.lport == port) for s in seen if port in (s.lport, s.rport)]
    assert sorted(ends) == [(0, True)] * (not filter) + [(os.getpid(), False)]


def test_all_at_once() -> None:
    """Each of them has to hold."""
    pid = os.getpid()

    def reset_one() -> Ports:
        return ended(connect(socket.AF_INET), client_resets)

    everything = {
        "networks": ["127.0.0.0/8"],
        "uid": 0,
        "pid": pid,
        "netns": os.stat("/proc/self/ns/net").st_ino,
    }
    check(reset_one, [another_user, V6, in_child], **everything)
