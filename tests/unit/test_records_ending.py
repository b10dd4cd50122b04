"""The name of a session's end, from what the kernel knew at CLOSE."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tcpobs.libbpf import Object
from tcpobs.records import Session, decoder

ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 2, 3, 4, 5, 8, 9, 11
"""include/net/tcp_states.h."""

CLOSED = {"by_process": 1, "shut": 3, "sent": 1}
"""What there is to see when a process closes."""


def ending(object: Object, **known: int) -> Any:
    """An Ending with these fields; the others are 0."""
    decoder(Session, object.btf)
    record = Session.inner["ending"]
    values = [0] * len(record.fields)
    for name, value in known.items():
        values[record.fields[name]] = value
    return record(values)


@pytest.mark.parametrize(
    ("known", "name", "reason"),
    [
        # FINs
        ({"oldstate": LAST_ACK, "orphaned": 1}, "fin-remote", "-"),
        ({"oldstate": LAST_ACK, "orphaned": 1, "late_data": 1}, "fin-remote", "-"),
        ({"oldstate": CLOSING, "orphaned": 1}, "fin-both", "-"),
        ({"oldstate": CLOSING}, "fin-both", "-"),
        ({"oldstate": FIN_WAIT2, "fin_received": 1}, "fin-local", "-"),
        ({"oldstate": FIN_WAIT2, "fin_received": 1, "orphaned": 1}, "fin-local", "-"),
        ({"oldstate": FIN_WAIT2, "fin_received": 1, "orphaned": 1, "late_data": 1}, "fin-local", "-"),
        ({"oldstate": FIN_WAIT2, "orphaned": 1}, "fin-local", "-"),  # TIME_WAIT's socket takes over
        # resets by this end
        ({"oldstate": FIN_WAIT2, "orphaned": 1, "late_data": 1}, "reset-sent", "late-data"),
        ({"oldstate": FIN_WAIT1, "late_data": 1, "error": errno.ECONNRESET}, "reset-sent", "late-data"),
        ({"oldstate": ESTABLISHED, **CLOSED, "linger_zero": 1}, "reset-sent", "linger"),
        ({"oldstate": CLOSE_WAIT, **CLOSED, "linger_zero": 1}, "reset-sent", "linger"),
        ({"oldstate": FIN_WAIT2, **CLOSED, "linger_zero": 1}, "reset-sent", "linger"),
        ({"oldstate": ESTABLISHED, **CLOSED}, "reset-sent", "unread-data"),
        ({"oldstate": CLOSE_WAIT, **CLOSED}, "reset-sent", "unread-data"),
        ({"oldstate": ESTABLISHED, "by_process": 1}, "reset-sent", "disconnect"),
        ({"oldstate": ESTABLISHED, "by_process": 1, "shut": 1}, "reset-sent", "disconnect"),
        ({"oldstate": FIN_WAIT2, "by_process": 1, "shut": 2}, "reset-sent", "disconnect"),
        ({"oldstate": ESTABLISHED}, "reset-sent", "not-accepted"),
        ({"oldstate": CLOSE_WAIT}, "reset-sent", "not-accepted"),
        ({"oldstate": FIN_WAIT1, "orphaned": 1, "shut": 3}, "reset-sent", "memory"),
        # resets by the peer
        ({"oldstate": ESTABLISHED, "error": errno.ECONNRESET}, "reset-received", "-"),
        ({"oldstate": FIN_WAIT1, "orphaned": 1, "error": errno.ECONNRESET}, "reset-received", "-"),
        ({"oldstate": CLOSE_WAIT, "error": errno.EPIPE}, "reset-received", "-"),
        # before there was a connection
        ({"oldstate": SYN_SENT, "sent": 1, "error": errno.ECONNREFUSED}, "refused", "-"),
        ({"oldstate": SYN_SENT, "error": errno.ETIMEDOUT, "retransmits": 2}, "timeout", "handshake"),
        ({"oldstate": SYN_RECV, "sent": 1, "error": errno.ETIMEDOUT}, "timeout", "handshake"),
        ({"oldstate": SYN_SENT, **CLOSED}, "cancelled", "-"),
        ({"oldstate": SYN_SENT, "by_process": 1}, "failed", "-"),
        ({"oldstate": SYN_SENT, "sent": 1}, "error", "-"),  # which its process has taken already
        ({"oldstate": SYN_SENT, "sent": 1, "error": errno.EHOSTUNREACH}, "unreachable", "-"),
        ({"oldstate": SYN_SENT, "sent": 1, "error": errno.ENETUNREACH}, "unreachable", "-"),
        ({"oldstate": SYN_SENT, "sent": 1, "error": errno.EACCES}, "unreachable", "-"),
        # timeouts, and what else there is
        ({"oldstate": ESTABLISHED, "error": errno.ETIMEDOUT, "retransmits": 3}, "timeout", "retransmission"),
        ({"oldstate": ESTABLISHED, "error": errno.ETIMEDOUT, "probes": 3}, "timeout", "probes"),
        ({"oldstate": FIN_WAIT1, "error": errno.ETIMEDOUT, "retransmits": 8}, "timeout", "retransmission"),
        ({"oldstate": ESTABLISHED, "error": errno.EHOSTUNREACH, "retransmits": 3}, "unreachable", "-"),
        ({"oldstate": ESTABLISHED, "error": errno.ECONNABORTED}, "aborted", "-"),
        ({"oldstate": SYN_SENT, "error": errno.ECONNABORTED}, "aborted", "-"),
        ({"oldstate": ESTABLISHED, "error": errno.EMSGSIZE}, "error", "-"),
        # and what has not ended
        ({"open": 1, "oldstate": ESTABLISHED}, "open", "-"),
        ({"open": 1, "oldstate": ESTABLISHED, "error": errno.ECONNRESET}, "open", "-"),
        ({"open": 1, "oldstate": FIN_WAIT2, "orphaned": 1}, "open", "-"),
    ],
)  # fmt: skip
def test_name_and_reason(known: dict[str, int], name: str, reason: str, life_object: Object) -> None:
    found = ending(life_object, **known)
    assert (found.name, found.reason) == (name, reason)


@pytest.mark.parametrize(
    ("number", "name"), [(0, "-"), (errno.ECONNRESET, "ECONNRESET"), (errno.EPIPE, "EPIPE"), (9999, "9999")]
)
def test_the_error_s_name(number: int, name: str, life_object: Object) -> None:
    assert ending(life_object, error=number).error_name == name


@pytest.mark.parametrize(("role", "name"), [(0, "-"), (1, "connect"), (2, "accept")])
def test_the_role_s_name(role: int, name: str, life_object: Object) -> None:
    assert ending(life_object, role=role).role_name == name


@pytest.mark.parametrize(
    ("known", "mark"),
    [({}, ""), ({"open": 1}, "+"), ({"existing": 1}, "+"), ({"open": 1, "existing": 1}, "+")],
)
def test_the_mark_of_what_was_not_seen_whole(known: dict[str, int], mark: str, life_object: Object) -> None:
    assert ending(life_object, **known).mark == mark
