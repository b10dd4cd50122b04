"""How a session went: what is reported is what TCP_INFO says of the same socket when it has ended."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

import tcpobs
from live.tcp import Pair, connect, gather, listen, wait_state
from live.wire import Wire
from tcpobs import Session

pytestmark = pytest.mark.subject("how a session went, beside TCP_INFO")

CLOSE = 7
"""include/net/tcp_states.h."""

DELAY = 0.02
"""Seconds each way."""


class Info(NamedTuple):
    """Of getsockopt(TCP_INFO): the fields that a session's course has, too (struct tcp_info, linux/tcp.h)."""

    srtt_us: int
    retransmits: int
    tx_bytes: int
    rx_bytes: int
    segs_out: int
    segs_in: int
    min_rtt_us: int
    delivered: int


def info(end: socket.socket) -> Info:
    return Info(
        *struct.unpack_from(
            "68xI 28xI 16xQQII 4xI 40xI", end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 196)
        )
    )


def congestion_control(end: socket.socket) -> str:
    name = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.split(b"\0", 1)[0].decode()


def reported(session: Session) -> Info:
    course = session.course
    return Info(
        srtt_us=course.srtt_us,
        retransmits=course.retransmits,
        tx_bytes=session.tx_bytes,
        rx_bytes=session.rx_bytes,
        segs_out=course.segs_out,
        segs_in=course.segs_in,
        min_rtt_us=course.min_rtt_us,
        delivered=course.delivered,
    )


def talk(pair: Pair, size: int) -> None:
    """So many bytes from the client, as many from the server."""
    for sender, receiver in (pair, pair[::-1]):
        sending = threading.Thread(target=sender.sendall, args=(bytes(size),))
        sending.start()
        left = size
        while left:
            left -= len(receiver.recv(min(left, 1 << 16)))
        sending.join()


class Told(NamedTuple):
    """What there is of one end, when it is over."""

    session: Session
    info: Info
    congestion_control: str


def course(make: Callable[[], Pair], size: int) -> tuple[Told, Told]:
    """The client's and the server's; their descriptors are open until TCP_INFO has been asked."""
    with tcpobs.sessions() as events:
        pair = make()
        port = pair.ports[1]
        talk(pair, size)
        for end in pair:
            end.shutdown(socket.SHUT_WR)
        for end in pair:
            wait_state(end, CLOSE)
        infos, names = [info(end) for end in pair], [congestion_control(end) for end in pair]
        for end in pair:
            end.close()
        seen = gather(events, lambda seen: sum(port in (s.lport, s.rport) for s in seen) >= 2)
        assert not events.losses
    (client,) = [session for session in seen if session.rport == port]
    (server,) = [session for session in seen if session.lport == port]
    return Told(client, infos[0], names[0]), Told(server, infos[1], names[1])


def test_over_loopback(family: int) -> None:
    for session, info, name in course(lambda: connect(family), 1 << 20):
        assert reported(session) == info
        assert session.course.congestion_control == name
        assert session.course.lifetime_us * 1000 >= session.span_ns - 1000  # it is cut to whole ones


def test_over_a_wire_with_a_delay(family: int) -> None:
    with Wire(DELAY) as wire:
        ends = course(lambda: wire.connect(family), 100_000)
    for session, info, name in ends:
        assert reported(session) == info
        assert session.course.congestion_control == name
        course_ = session.course
        for microseconds in (course_.handshake_us, course_.min_rtt_us, course_.srtt_us):
            assert microseconds >= 2 * DELAY * 1e6
        assert course_.lifetime_us >= session.span_ns // 1000 + 2 * DELAY * 1e6


def test_over_a_wire_that_loses(family: int) -> None:
    """Every tenth full packet, from either side, is lost once."""
    count = 0

    def is_tenth(packet: bytes) -> bool:
        nonlocal count
        count += len(packet) > 1000
        return len(packet) > 1000 and count % 10 == 0

    with Wire() as wire:
        wire.loses = is_tenth
        ends = course(lambda: wire.connect(family), 200_000)
    for session, info, _ in ends:
        assert reported(session) == info
        assert session.course.retransmits > 0
        assert session.course.lost > 0


def test_another_algorithm() -> None:
    """A socket's own choice; reno is in every kernel."""

    def make() -> Pair:
        pair = connect(socket.AF_INET)
        pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        return pair

    client, server = course(make, 1)
    assert client.session.course.congestion_control == "reno"
    assert server.session.course.congestion_control == server.congestion_control


def test_nothing_came_of_it() -> None:
    """No handshake: what is not known is 0."""
    with tcpobs.sessions() as events:
        with listen(socket.AF_INET) as listener:
            port = listener.getsockname()[1]
        before = time.monotonic_ns()
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(("127.0.0.1", port))
        after = time.monotonic_ns()
        seen = gather(events, lambda seen: any(s.rport == port for s in seen))
    (session,) = [session for session in seen if session.rport == port]
    course = session.course
    assert (course.handshake_us, course.srtt_us, course.min_rtt_us, course.retransmits) == (0, 0, 0, 0)
    assert (course.segs_out, course.segs_in, course.delivered) == (1, 1, 0)
    assert course.lifetime_us <= (after - before) / 1000


def test_the_lifetime_has_the_handshake_in_it() -> None:
    """A span begins with ESTABLISHED, a lifetime with the SYN or the SYN-ACK."""
    with Wire(DELAY) as wire:
        (client, _, _), (server, _, _) = course(wire.connect, 1)
    more = [s.course.lifetime_us - s.span_ns / 1000 for s in (client, server)]
    assert more[0] == pytest.approx(client.course.handshake_us, abs=1)  # each is cut to whole ones
    assert more[1] >= server.course.handshake_us - 1  # and its socket is there before ESTABLISHED
