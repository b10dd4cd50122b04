"""tcpobs.summary and `tcpobs life --summary` against real sockets, and the list of the same sessions."""

from __future__ import annotations

import csv
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import tcpobs
from live.ports import new_port
from live.tcp import (
    ENDS,
    LOOPBACK,
    Pair,
    child,
    client_first,
    connect,
    gather,
    is_loaded,
    listen,
    programs_of,
    read_rest,
    wait,
    wait_over,
)
from tcpobs import Group, Session, Summary
from tcpobs.privileges import Capability

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tcpobs.events import Options

pytestmark = pytest.mark.subject("`--summary`")

TCPOBS = [sys.executable, "-m", "tcpobs"]


def make_sessions(family: int, count: int) -> int:
    """Sessions that this process has both ends of, with bytes both ways and each its own end; the port."""
    with listen(family) as listener:
        address = listener.getsockname()[:2]
        for number in range(count):
            client = socket.create_connection(address)
            server, _ = listener.accept()
            pair = Pair(client, server)
            client.sendall(bytes(1000 * number + 1))
            server.recv(1000 * number + 1, socket.MSG_WAITALL)
            server.sendall(bytes(2000))
            client.recv(2000, socket.MSG_WAITALL)
            # Of 20, four each: the middle ranks are among equals, and one that is delayed does not move them.
            time.sleep(0.004 * 2.25 ** (number // 4 % 5))
            ENDS[number % len(ENDS)](pair)
    wait_over(address[1])
    return int(address[1])


def of_port(groups: Sequence[Group], port: int) -> list[Group]:
    return [group for group in groups if group.port == port]


def settled(trace: Summary, port: int, count: int) -> list[Group]:
    """The groups with this port, once they have so many sessions."""
    wait(lambda: sum(group.sessions for group in of_port(trace.groups(), port)) >= count)
    return of_port(trace.groups(), port)


def listed(events: tcpobs.Events[Session], port: int, count: int) -> list[Session]:
    """The sessions with this port at either end, once there are so many."""

    def found(seen: list[Session]) -> list[Session]:
        return [session for session in seen if port in (session.lport, session.rport)]

    return found(gather(events, lambda seen: len(found(seen)) >= count))


@pytest.mark.ways
def test_sums_are_those_of_the_list(way: Options, family: int) -> None:
    """Sessions, failures, bytes and percentiles, of each end."""
    with tcpobs.sessions(**way) as events, tcpobs.summary(by=["role", "port"], **way) as trace:
        port = make_sessions(family, 20)
        sessions, groups = listed(events, port, 40), settled(trace, port, 40)
        assert not trace.losses
    assert [group.sessions for group in groups] == [20, 20]
    for group in groups:
        own = [session for session in sessions if session.ending.role_name == group.role]
        assert group.failed == sum(session.ending.failed for session in own) > 0
        assert group.tx_bytes == sum(session.tx_bytes for session in own)
        assert group.rx_bytes == sum(session.rx_bytes for session in own)
        for percent in (50, 90, 99):
            rank = math.ceil(len(own) * percent / 100) - 1
            ms = sorted(session.ms for session in own)[rank]
            rtt = sorted(session.course.srtt_us for session in own)[rank] / 1000
            ours, rtt_ms = group.ms(percent), group.rtt_ms(percent)
            assert ours
            assert rtt_ms
            # Each trace reads the clock for itself: in an emulated machine that is up to 1 ms later.
            assert abs(ours - ms) <= ms / 16 + 2
            assert abs(rtt_ms - rtt) <= rtt / 16 + 1e-6


def make_two(user: int, family: int, to: int) -> None:
    """Sessions of this user's; writes their port."""
    os.setuid(user)
    os.write(to, b"%d" % make_sessions(family, 2))


@pytest.mark.parametrize(
    ("name", "of_session"),
    [
        ("pid", lambda session: session.pid),
        ("comm", lambda session: session.comm),
        ("uid", lambda session: session.identity.uid if session.pid else None),
        ("role", lambda session: session.ending.role_name),
        ("raddr", lambda session: session.raddr),
        ("laddr", lambda session: session.laddr),
        ("netns", lambda session: session.netns),
        ("cgroup", lambda session: session.cgroup),
    ],
)
def test_grouped_by(name: str, of_session: Callable[[Session], object], family: int) -> None:
    """Each of two processes, one of another user, has both ends of two sessions."""
    with tcpobs.sessions() as events, tcpobs.summary(by=[name, "port"]) as trace:
        ports = []
        for user in (0, 65534):
            ours, theirs = os.pipe()
            with child(partial(make_two, user, family, theirs)):
                os.close(theirs)
                ports.append(int(os.read(ours, 10)))
            os.close(ours)

        def both(seen: list[Session]) -> list[Session]:
            return [session for session in seen if {session.lport, session.rport} & set(ports)]

        sessions = both(gather(events, lambda seen: len(both(seen)) >= 8))
        groups = [group for port in ports for group in settled(trace, port, 4)]
    expected = Counter(
        (of_session(s), s.rport if s.ending.role_name == "connect" else s.lport) for s in sessions
    )
    assert {(getattr(group, name), group.port): group.sessions for group in groups} == expected


def test_owner_is_pid_and_comm() -> None:
    with tcpobs.summary() as trace:
        port = make_sessions(socket.AF_INET, 2)
        [group] = settled(trace, port, 4)
    with open("/proc/self/comm") as file:
        assert (group.pid, group.comm) == (os.getpid(), file.read().strip())
    assert str(group.raddr) == "127.0.0.1"


def test_refused(family: int) -> None:
    address = LOOPBACK[socket.AddressFamily(family)]
    port = new_port()
    with tcpobs.summary(remote_ports=[port]) as trace:
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, port))
        [group] = settled(trace, port, 3)
    assert (group.sessions, group.failed, group.pid) == (3, 3, os.getpid())
    assert (str(group.raddr), group.tx_bytes, group.rx_bytes, group.rtt_ms(50)) == (address, 0, 0, None)


@pytest.mark.ways
def test_more_groups_than_room_are_lost_and_told(way: Options) -> None:
    with tcpobs.summary(by=["port"], max_groups=3, pid=os.getpid(), **way) as trace:
        for _ in range(5):
            make_sessions(socket.AF_INET, 1)
        wait(lambda: sum(group.sessions for group in trace.groups()) + trace.losses.groups_full == 10)
        assert len(trace.groups()) == 3
        assert sum(group.sessions for group in trace.groups()) == 6
        assert str(trace.losses) == "4: no room for a group (raise --max-groups)"
        trace.take()
        port = make_sessions(socket.AF_INET, 1)  # there is room again
        assert settled(trace, port, 2)


@pytest.mark.ways
def test_taking_loses_nothing_and_gives_nothing_twice(way: Options) -> None:
    """A process makes sessions as fast as it can while their groups are taken again and again."""
    enough, told = os.pipe()
    counted, count_to = os.pipe()

    def until_told() -> None:
        count = 0
        while not select.select([enough], [], [], 0)[0]:
            client = socket.create_connection(("127.0.0.1", port))
            server, _ = listener.accept()
            client.close()
            server.close()
            count += 1
        os.write(count_to, b"%d" % count)

    with (
        tcpobs.summary(by=["port", "role"], **way) as trace,
        listen(socket.AF_INET) as listener,
    ):
        port = listener.getsockname()[1]
        taken: list[Group] = []
        with child(until_told):
            os.close(count_to)

            def has_enough() -> bool:
                taken.extend(of_port(trace.take(), port))
                return len(taken) > 100 and sum(group.sessions for group in taken) > 4000

            wait(has_enough)
            os.write(told, b".")
            count = int(os.read(counted, 10))
        wait(lambda: sum(group.sessions for group in of_port(trace.groups(), port) + taken) >= 2 * count)
        taken += of_port(trace.take(), port)
        assert not trace.groups() or not of_port(trace.groups(), port)
        assert not trace.losses
    assert sum(group.sessions for group in taken) == 2 * count
    for fd in (enough, told, counted):
        os.close(fd)


def test_iterating_gives_each_interval_and_the_rest() -> None:
    """After each output that has the latest session there is another; the last output is what was left."""
    seen: list[int] = []
    with tcpobs.summary(by="port", every=0.3) as trace:
        ports = [make_sessions(socket.AF_INET, 1)]
        for batch in trace.batches():
            found = [group.port for group in batch if group.port in ports]
            seen += found
            ports += [make_sessions(socket.AF_INET, 1) for _ in found]
            if len(seen) == 3:
                trace.stop()
    assert seen == ports[:-1]
    assert len(seen) == 4


def test_stop_ends_it_with_what_there_is() -> None:
    with tcpobs.summary() as trace:
        port = make_sessions(socket.AF_INET, 1)
        settled(trace, port, 2)
        trace.stop()
        assert [group.sessions for group in of_port(list(trace), port)] == [2]
        assert not trace.groups()


def test_the_most_sessions_come_first_and_ties_have_an_order() -> None:
    with tcpobs.summary(by=["comm", "port"]) as trace:
        ports = [make_sessions(socket.AF_INET, count) for count in (2, 5, 2)]
        wait(lambda: sum(g.sessions for g in trace.groups() if g.port in ports) == 18)
        found = [group.port for group in trace.groups() if group.port in ports]
    assert found == [ports[1], *sorted([ports[0], ports[2]])]


def test_sessions_older_than_the_trace(family: int) -> None:
    """Their duration is not known, nor who connected: the lower port is taken for the service's."""
    pairs = [connect(family) for _ in range(3)]
    ports = {min(pair.ports) for pair in pairs}
    with tcpobs.summary(by="role,port", existing=True) as trace:
        for pair in pairs:
            client_first(pair)
        wait(lambda: sum(g.sessions for g in trace.groups() if g.port in ports) >= 6)
        groups = [group for group in trace.groups() if group.port in ports]
    assert {group.role for group in groups} == {"-"}
    assert all(group.ms(99) is None and group.rtt_ms(99) for group in groups)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"max_groups": 0}, "max_groups is from 1"),
        ({"every": 0}, "every is more than 0 seconds"),
        ({"by": ["rport"]}, "cannot be grouped by 'rport'"),
    ],
)
def test_bad_options(how: Any, says: str) -> None:
    with pytest.raises(tcpobs.TcpobsError, match=says):
        tcpobs.summary(**how)


# ---- the command


@contextmanager
def running(*flags: str) -> Iterator[subprocess.Popen[str]]:
    """The command, tracing: it has but one capability left."""
    command = subprocess.Popen(
        [*TCPOBS, "life", "--summary", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def traces() -> bool:
        with open(f"/proc/{command.pid}/status") as file:
            return f"CapPrm:\t{1 << Capability.CAP_BPF:016x}\n" in file

    try:
        wait(lambda: command.poll() is not None or traces())
        yield command
    finally:
        command.kill()
        command.communicate()


def ended(command: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """What it says when it is told to end; nothing of it is left in the kernel."""
    programs = programs_of(command.pid)
    assert programs
    command.send_signal(number)
    out, err = read_rest(command)
    assert command.returncode == 0
    wait(lambda: not any(map(is_loaded, programs)))
    return out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command(number: int, family: int) -> None:
    with running("--csv", "-p", str(os.getpid())) as command:
        port = make_sessions(family, 5)
        out, err = ended(command, number)
    [row] = csv.DictReader(out.splitlines())
    assert err == ""
    assert (row["PID"], row["PORT"], row["SESSIONS"]) == (str(os.getpid()), str(port), "10")
    assert row["RADDR"] == LOOPBACK[socket.AddressFamily(family)]
    assert 4 <= float(row["MS_P50"]) <= float(row["MS_P90"]) <= float(row["MS_P99"])


def test_command_every_interval() -> None:
    """Each row has its time; all intervals together have all sessions."""
    with running("--csv", "--every", "0.2", "--by", "port", "-p", str(os.getpid())) as command:
        assert command.stdout
        lines = [command.stdout.readline()]
        counts: Counter[str] = Counter()
        ports = []
        for _ in range(4):
            ports.append(str(make_sessions(socket.AF_INET, 3)))
            while counts[ports[-1]] < 6:
                lines.append(command.stdout.readline())
                [row] = csv.DictReader([lines[0], lines[-1]])
                counts[row["PORT"]] += int(row["SESSIONS"])
        out, err = ended(command)
    assert (out, err) == ("", "")
    assert lines[0].startswith("TIME,")
    assert counts == dict.fromkeys(ports, 6)


def test_command_tells_what_is_lost() -> None:
    with running("--json", "--max-groups", "1", "--by", "port", "-p", str(os.getpid())) as command:
        for _ in range(3):
            make_sessions(socket.AF_INET, 1)
        out, err = ended(command)
    [row] = map(json.loads, out.splitlines())
    assert row["sessions"] == 2
    assert err.endswith("tcpobs: lost so far: 4: no room for a group (raise --max-groups)\n")


def test_command_for_a_time() -> None:
    done = subprocess.run([*TCPOBS, "life", "--summary", "-d", "0.2"], capture_output=True, text=True)
    assert done.stdout.startswith("PID     COMM       RADDR           PORT  SESSIONS  FAILED")
    assert (done.returncode, done.stderr) == (0, "")
