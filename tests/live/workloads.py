"""Workloads that write down the true owner of each end of their sessions.

Real processes make the sessions, and each notes an end as its own when it is the last that acts on it:
connects, accepts, or closes it. What nobody will act on is noted as nobody's. So the truth is known by
construction, and asked of no kernel. Clients run as another user than servers.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from typing import NamedTuple, NoReturn

from live.ports import new_port
from live.tcp import DEADLINE, listen, reset, wait_closed, wait_queued

SESSIONS = 200
"""Of each workload and family, where nothing else is said."""

CLIENT_UID = 65534

Ports = tuple[int, int]
"""An end, by its local and its remote port."""


class Owner(NamedTuple):
    """Whose an end is; all zero: nobody's.

    `acted`: a change of the socket's state shows it. Otherwise only accept's return does.
    """

    pid: int
    tid: int
    uid: int
    acted: bool = True


Truth = Mapping[Ports, Owner]

NOBODY = Owner(0, 0, 0, False)
WORKERS = 4


def myself(acted: bool = True) -> Owner:
    """The thread that calls this."""
    return Owner(os.getpid(), threading.get_native_id(), os.getuid(), acted)


class Gate:
    """A process waits until another has come to some point."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def open(self) -> None:
        """For one that waits, now or later."""
        os.write(self._write, b"!")

    def wait(self) -> None:
        """Until it is open."""
        assert select.select([self._read], [], [], DEADLINE)[0], "the others did not come so far"
        os.read(self._read, 1)

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


class Stage:
    """What the processes of one workload share: a listener, and the pipe for their notes."""

    _NOTE = struct.Struct("=HHIIII")  # 2 * SESSIONS of them fit into a pipe

    def __init__(self, family: int, sessions: int) -> None:
        self.family, self.sessions = socket.AddressFamily(family), sessions
        self.listener = listen(family, backlog=sessions)
        self.address: tuple[str, int] = self.listener.getsockname()[:2]
        self._read, self._write = os.pipe()
        self._running: dict[int, int] = {}
        self._gates: list[Gate] = []

    def gate(self) -> Gate:
        """A new one, for all processes that start from now on."""
        self._gates.append(Gate())
        return self._gates[-1]

    # ---- processes

    def start(self, work: Callable[[Stage], None], uid: int = 0) -> int:
        """Begins a process; its PID."""
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)  # with what it will fork
            run_child(lambda: work(self), uid)
        self._running[pid] = 0
        return pid

    def server(self, work: Callable[[Stage], None]) -> int:
        """A process that has the listener."""
        return self.start(work)

    def client(self, work: Callable[[Stage], None]) -> int:
        """A process of another user, without the listener."""

        def without_listener(stage: Stage) -> None:
            self.listener.close()
            work(stage)

        return self.start(without_listener, CLIENT_UID)

    def kill(self, pid: int) -> None:
        """Kills one that was started here."""
        os.kill(pid, signal.SIGKILL)
        self._running[pid] = -signal.SIGKILL

    def wait(self, pid: int) -> None:
        """Waits until a process has ended, as it should."""
        status, wanted = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), self._running.pop(pid)
        assert status == wanted, f"a process of the workload ended with {status}"

    def finish(self) -> Truth:
        """Waits for all processes; what they noted."""
        for pid in list(self._running):
            self.wait(pid)
        os.close(self._write)
        truth: dict[Ports, Owner] = {}
        with open(self._read, "rb", closefd=False) as notes:
            for lport, rport, pid, tid, uid, acted in self._NOTE.iter_unpack(notes.read()):
                assert (lport, rport) not in truth
                truth[lport, rport] = Owner(pid, tid, uid, bool(acted))
        return truth

    def close(self) -> None:
        """Leaves nothing behind, whatever happened."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for gate in self._gates:
            gate.close()
        self.listener.close()
        for fd in (self._read, self._write):
            with suppress(OSError):
                os.close(fd)

    # ---- sessions

    def note(self, end: socket.socket, owner: Owner | None = None, peer: Owner | None = None) -> None:
        """Notes whose an end is: the calling thread's, or this owner's; and whose its peer is."""
        lport, rport = end.getsockname()[1], self.address[1]
        if lport == rport:
            rport = end.getpeername()[1]
        self.note_ports((lport, rport), owner or myself())
        if peer:
            self.note_ports((rport, lport), peer)

    def note_ports(self, ports: Ports, owner: Owner) -> None:
        """Notes whose an end will be."""
        os.write(self._write, self._NOTE.pack(*ports, *owner))

    def connections(self) -> Iterator[socket.socket]:
        """The clients' ends, each connected when its turn comes.

        All have their ports before, so that none gets one that another had.
        """
        ends = [socket.socket(self.family) for _ in range(self.sessions)]
        for end in ends:
            end.bind((self.address[0], 0))
        for end in ends:
            end.connect(self.address)
            yield end

    def connect_all(self) -> list[socket.socket]:
        """All sessions, open at once."""
        return list(self.connections())

    def accept(self) -> socket.socket:
        """A server's end."""
        return self.listener.accept()[0]

    def accepted(self) -> Iterator[socket.socket]:
        """The servers' ends, each accepted when its turn comes."""
        return (self.accept() for _ in range(self.sessions))

    def accept_all(self) -> list[socket.socket]:
        """All sessions, open at once."""
        return list(self.accepted())

    def close_all(self, ends: Iterable[socket.socket]) -> None:
        """Closes each after its peer has, and notes that."""
        for end in ends:
            self.note(end)
            wait_closed(end)
            end.close()


def run_child(work: Callable[[], None], uid: int = 0) -> NoReturn:
    """What a forked process does. It ends with status 0 when all went well, and never hangs."""
    status = 1
    try:
        signal.alarm(int(DEADLINE))
        if uid:
            os.setuid(uid)
        work()
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


# ---- how each end behaves

End = Callable[[Stage, socket.socket], None]


def one_by_one(stage: Stage, client: End, server: End) -> None:
    """A process that connects, and one that accepts; each does with its ends what is told."""

    def visit(stage: Stage) -> None:
        for end in stage.connections():
            client(stage, end)

    def serve(stage: Stage) -> None:
        for end in stage.accepted():
            server(stage, end)

    stage.server(serve)
    stage.client(visit)


def closes(stage: Stage, end: socket.socket) -> None:
    """Closes first."""
    stage.note(end)
    end.close()


def resets(stage: Stage, end: socket.socket) -> None:
    """Resets."""
    stage.note(end)
    reset(end)


def closes_after(stage: Stage, end: socket.socket) -> None:
    """Closes when the other has."""
    stage.close_all([end])


def greets(end: socket.socket) -> None:
    """Now the peer knows that this end is accepted."""
    end.sendall(b"!")


def is_greeted(end: socket.socket) -> None:
    """Waits for that."""
    assert end.recv(1) == b"!"


# ---- the workloads


def client_closes(stage: Stage) -> None:
    """client closes first"""
    one_by_one(stage, closes, closes_after)


def server_closes(stage: Stage) -> None:
    """server closes first"""
    one_by_one(stage, closes_after, closes)


def client_resets(stage: Stage) -> None:
    """client resets"""

    def client(stage: Stage, end: socket.socket) -> None:
        is_greeted(end)
        resets(stage, end)

    def server(stage: Stage, end: socket.socket) -> None:
        stage.note(end, myself(acted=False))
        greets(end)
        wait_closed(end)
        end.close()  # it is in CLOSE

    one_by_one(stage, client, server)


def server_resets(stage: Stage) -> None:
    """server resets"""

    def client(stage: Stage, end: socket.socket) -> None:
        stage.note(end)
        greets(end)  # before that, connect() may not have returned
        wait_closed(end)
        end.close()

    def server(stage: Stage, end: socket.socket) -> None:
        is_greeted(end)
        resets(stage, end)

    one_by_one(stage, client, server)


def half_closed(stage: Stage) -> None:
    """client half-closes, server answers and closes"""

    def client(stage: Stage, end: socket.socket) -> None:
        stage.note(end)
        end.shutdown(socket.SHUT_WR)
        is_greeted(end)
        wait_closed(end)
        end.close()

    def server(stage: Stage, end: socket.socket) -> None:
        stage.note(end)
        wait_closed(end)
        greets(end)
        end.close()

    one_by_one(stage, client, server)


def not_blocking(stage: Stage) -> None:
    """sockets that do not block"""

    def visit(stage: Stage) -> None:
        ends = [socket.socket(stage.family) for _ in range(stage.sessions)]
        for end in ends:
            end.setblocking(False)
            end.connect_ex(stage.address)
        for end in ends:
            assert select.select([], [end], [], DEADLINE)[1]
            closes(stage, end)

    def serve(stage: Stage) -> None:
        stage.listener.setblocking(False)
        accepted = 0
        while accepted < stage.sessions:
            with suppress(BlockingIOError):
                end = stage.accept()
                accepted += 1
                closes_after(stage, end)
                continue
            assert select.select([stage.listener], [], [], DEADLINE)[0]

    stage.server(serve)
    stage.client(visit)


def duplicated(stage: Stage) -> None:
    """server closes a duplicate last"""

    def server(stage: Stage, end: socket.socket) -> None:
        duplicate = end.dup()
        end.close()
        closes(stage, duplicate)

    one_by_one(stage, closes_after, server)


def refused(stage: Stage) -> None:
    """refused: only the client has an end"""

    address = stage.address[0], new_port()  # nobody listens there

    def visit(stage: Stage) -> None:
        ends = [socket.socket(stage.family) for _ in range(stage.sessions)]
        for end in ends:  # all before the first connects: what is refused loses its port, for another
            end.bind((stage.address[0], 0))
            stage.note_ports((end.getsockname()[1], address[1]), myself())
        for end in ends:
            with suppress(ConnectionRefusedError):
                end.connect(address)
                raise AssertionError("somebody listens")

    stage.wait(stage.client(visit))


def server_idle(stage: Stage) -> None:
    """client resets, server idle since accept"""
    accepted, ended = stage.gate(), stage.gate()

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()
        accepted.wait()
        for end in ends:
            resets(stage, end)
        ended.open()

    def serve(stage: Stage) -> None:
        ends = stage.accept_all()
        for end in ends:
            stage.note(end, myself(acted=False))
        accepted.open()
        ended.wait()

    stage.server(serve)
    stage.client(visit)


def never_accepted(stage: Stage) -> None:
    """never accepted, client resets: server's end is nobody's"""

    def visit(stage: Stage) -> None:
        for end in stage.connections():
            stage.note(end, peer=NOBODY)
            reset(end)

    stage.client(visit)


def listener_closes(stage: Stage) -> None:
    """never accepted, listener closes: server's end is nobody's"""
    connected = stage.gate()

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()
        for end in ends:
            stage.note(end, peer=NOBODY)
        connected.open()
        for end in ends:
            wait_closed(end)

    def serve(stage: Stage) -> None:
        connected.wait()
        wait_queued(stage.listener, stage.sessions)
        stage.listener.close()

    stage.server(serve)
    stage.client(visit)
    stage.listener.close()  # this copy


def forked_after_accept(stage: Stage) -> None:
    """server forks after accept, the child closes"""
    _forked(stage, closes)


def forked_reset(stage: Stage) -> None:
    """server forks after accept, the child resets"""
    _forked(stage, resets)


def _forked(stage: Stage, end_it: End) -> None:
    """A child for each few sessions: to fork takes long in an emulated machine."""

    def serve(stage: Stage) -> None:
        parent_closed = stage.gate()
        accepted = stage.accepted()
        while ends := list(islice(accepted, WORKERS)):
            child = os.fork()
            if not child:
                run_child(partial(end_last, ends, parent_closed))
            for end in ends:
                end.close()
            parent_closed.open()
            assert os.waitpid(child, 0)[1] == 0

    def end_last(ends: Iterable[socket.socket], parent_closed: Gate) -> None:
        parent_closed.wait()  # the last close is what ends a session
        for end in ends:
            is_greeted(end)
            end_it(stage, end)

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()
        for end in ends:
            greets(end)
        stage.close_all(ends)

    stage.server(serve)
    stage.client(visit)


def forked_after_connect(stage: Stage) -> None:
    """client forks after connect, the child closes"""
    parent_closed = stage.gate()

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()

        def close_all() -> None:
            parent_closed.wait()
            for end in ends:
                closes(stage, end)

        child = os.fork()
        if not child:
            run_child(close_all)
        for end in ends:
            end.close()
        parent_closed.open()
        assert os.waitpid(child, 0)[1] == 0

    stage.server(lambda stage: stage.close_all(stage.accept_all()))
    stage.client(visit)


def pool(stage: Stage) -> None:
    """server is a pool of processes, the worker closes"""
    _pool(stage, closes_after, closes)


def pool_reset(stage: Stage) -> None:
    """server is a pool of processes, client resets"""

    def client(stage: Stage, end: socket.socket) -> None:
        is_greeted(end)
        resets(stage, end)

    def server(stage: Stage, end: socket.socket) -> None:
        stage.note(end, myself(acted=False))
        greets(end)
        wait_closed(end)
        end.close()

    _pool(stage, client, server)


def _pool(stage: Stage, client: End, server: End) -> None:
    """Each worker accepts one session before any of them does more: else one alone might have them all."""
    accepted, all_have = stage.gate(), stage.gate()

    def visit(stage: Stage) -> None:
        ends = stage.connections()
        first = list(islice(ends, WORKERS))
        for gate in (accepted.wait, all_have.open):
            for _ in first:
                gate()
        for end in chain(first, ends):
            client(stage, end)

    def serve(stage: Stage) -> None:
        end = stage.accept()
        accepted.open()
        all_have.wait()
        while True:
            server(stage, end)
            try:
                end = stage.accept()
            except OSError:  # the listener was shut down
                return

    for _ in range(WORKERS):
        stage.server(serve)
    stage.wait(stage.client(visit))
    stage.listener.shutdown(socket.SHUT_RDWR)


def threads(stage: Stage) -> None:
    """one thread opens, others close"""

    def work(opened: Iterable[socket.socket], end_it: End) -> None:
        ends: queue.Queue[socket.socket | None] = queue.Queue()

        def close_what_comes() -> None:
            while (end := ends.get()) is not None:
                end_it(stage, end)

        workers = [threading.Thread(target=close_what_comes) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        for end in chain(opened, (None for _ in workers)):
            ends.put(end)
        for worker in workers:
            worker.join()

    stage.server(lambda stage: work(stage.accepted(), closes))
    stage.client(lambda stage: work(stage.connections(), closes_after))


def handed_on(stage: Stage) -> None:
    """server hands on by SCM_RIGHTS, the receiver closes"""
    here, there = socket.socketpair()

    def serve(stage: Stage) -> None:
        for end in stage.accepted():
            socket.send_fds(here, [b"?"], [end.fileno()])
            end.close()
            greets(here)  # only now may the receiver close: its close is to be the last

    def receive(stage: Stage) -> None:
        for _ in range(stage.sessions):
            _, (fd,), _, _ = socket.recv_fds(there, 1, 1)
            is_greeted(there)
            closes(stage, socket.socket(fileno=fd))

    def visit(stage: Stage) -> None:
        stage.close_all(stage.connections())

    stage.server(serve)
    stage.start(receive)
    stage.client(visit)
    for channel in (here, there):
        channel.close()


# What sd_listen_fds(3) gives: the listener is descriptor 3.
_ACTIVATED = """
import os, socket
assert os.environ["LISTEN_PID"] == str(os.getpid()) and os.environ["LISTEN_FDS"] == "1"
listener = socket.socket(fileno=3)
for _ in range(int(os.environ["SESSIONS"])):
    listener.accept()[0].close()
"""


def activated(stage: Stage) -> None:
    """server got its listener from another process, by exec"""

    def execute(stage: Stage) -> None:
        os.dup2(stage.listener.fileno(), 3)
        os.set_inheritable(3, True)
        environment = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1", "SESSIONS": str(stage.sessions)}
        command = [sys.executable, "-I", "-S", "-c", _ACTIVATED]
        os.execve(sys.executable, command, {**os.environ, **environment})

    server = stage.server(execute)

    def visit(stage: Stage) -> None:
        for end in stage.connections():
            stage.note(end, peer=Owner(server, server, 0))
            wait_closed(end)
            end.close()

    stage.client(visit)


def executed(stage: Stage) -> None:
    """server's sessions go to a program that it starts, which closes them by ending"""

    def serve(stage: Stage) -> None:
        ends = stage.accept_all()
        with subprocess.Popen(
            ["cat"], stdin=subprocess.PIPE, pass_fds=[end.fileno() for end in ends], close_fds=True
        ) as program:
            for end in ends:
                stage.note(end, Owner(program.pid, program.pid, 0))
                end.close()
        assert program.returncode == 0

    stage.server(serve)
    stage.client(lambda stage: stage.close_all(stage.connect_all()))


def server_killed(stage: Stage) -> None:
    """server is killed"""
    accepted = stage.gate()

    def serve(stage: Stage) -> None:
        ends = stage.accept_all()
        for end in ends:
            stage.note(end)
        accepted.open()
        signal.pause()

    server = stage.server(serve)
    stage.client(lambda stage: stage.close_all(stage.connect_all()))
    accepted.wait()
    stage.kill(server)


def server_killed_unread(stage: Stage) -> None:
    """server is killed with data unread: that resets"""
    accepted = stage.gate()

    def serve(stage: Stage) -> None:
        ends = stage.accept_all()
        for end in ends:
            stage.note(end)
            end.recv(1, socket.MSG_PEEK)
        accepted.open()
        signal.pause()

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()
        for end in ends:
            greets(end)
        stage.close_all(ends)

    server = stage.server(serve)
    stage.client(visit)
    accepted.wait()
    stage.kill(server)


def client_killed(stage: Stage) -> None:
    """client is killed"""
    accepted = stage.gate()

    def serve(stage: Stage) -> None:
        ends = stage.accept_all()
        accepted.open()
        stage.close_all(ends)

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()
        for end in ends:
            stage.note(end)
        accepted.open()
        signal.pause()

    stage.server(serve)
    client = stage.client(visit)
    for _ in range(2):
        accepted.wait()
    stage.kill(client)


def collected(stage: Stage) -> None:
    """client's last descriptors are garbage: in unix sockets sent to themselves"""

    def visit(stage: Stage) -> None:
        for end in stage.connections():
            stage.note(end)
            here, there = socket.socketpair()
            socket.send_fds(here, [b"?"], [end.fileno(), there.fileno()])
            for each in (end, there, here):  # to close a socket lets the kernel look for garbage
                each.close()

    stage.server(lambda stage: stage.close_all(stage.accept_all()))
    stage.client(visit)


def destroyed(stage: Stage) -> None:
    """another process destroys server's end, as ss -K does"""

    def serve(stage: Stage) -> None:
        ends = stage.accept_all()
        for end in ends:
            stage.note(end, myself(acted=False))
        _destroy_in_child(stage, [end.getpeername()[1] for end in ends])

    stage.server(serve)
    stage.client(lambda stage: stage.close_all(stage.connect_all()))


def destroyed_unaccepted(stage: Stage) -> None:
    """another process destroys server's end, never accepted: it is nobody's"""

    def visit(stage: Stage) -> None:
        ends = stage.connect_all()
        for end in ends:
            stage.note(end, peer=NOBODY)
        wait_queued(stage.listener, stage.sessions)
        _destroy_in_child(stage, [end.getsockname()[1] for end in ends])
        for end in ends:
            wait_closed(end)

    stage.start(visit)


def _destroy_in_child(stage: Stage, rports: Iterable[int]) -> None:
    def work() -> None:
        for rport in rports:
            destroy(stage.family, stage.address, (stage.address[0], rport))

    child = os.fork()
    if not child:
        run_child(work)
    assert os.waitpid(child, 0)[1] == 0


def destroy(family: int, local: tuple[str, int], remote: tuple[str, int]) -> None:
    """Destroys one end: SOCK_DESTROY of sock_diag(7), with struct inet_diag_req_v2. Raises OSError."""
    addresses = [socket.inet_pton(family, address).ljust(16, b"\0") for address, _ in (local, remote)]
    ports = struct.pack("!HH", local[1], remote[1])
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 0, 0, 0xFFFFFFFF)
    request += ports + b"".join(addresses) + struct.pack("=Iq", 0, -1)  # any interface, any cookie
    header = struct.pack("=IHHII", 16 + len(request), 21, 1 | 4, 1, 0)  # NLM_F_REQUEST, NLM_F_ACK
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as diag:  # NETLINK_SOCK_DIAG
        diag.send(header + request)
        [error] = struct.unpack_from("=i", diag.recv(4096), 16)  # struct nlmsgerr
    if error:
        raise OSError(-error, f"SOCK_DESTROY: {os.strerror(-error)} (CONFIG_INET_DIAG_DESTROY)")


WORKLOADS = (
    client_closes,
    server_closes,
    half_closed,
    client_resets,
    server_resets,
    not_blocking,
    duplicated,
    refused,
    server_idle,
    never_accepted,
    listener_closes,
    forked_after_accept,
    forked_reset,
    forked_after_connect,
    pool,
    pool_reset,
    threads,
    handed_on,
    activated,
    executed,
    server_killed,
    server_killed_unread,
    client_killed,
    collected,
    destroyed,
    destroyed_unaccepted,
)
"""All of them; each one's docstring is its title."""


def run(workload: Callable[[Stage], None], family: int, sessions: int = SESSIONS) -> Truth:
    """Runs one; returns when its sessions are over, but for what a softirq has still to do."""
    stage = Stage(family, sessions)
    try:
        workload(stage)
        return stage.finish()
    finally:
        stage.close()


# ---- the score


class Score(NamedTuple):
    """How many ends a tool gave to whom."""

    right: int = 0
    """To their owner."""
    nobody: int = 0
    """To nobody, whose they are: rightly, too."""
    unknown: int = 0
    """To nobody, though they have an owner."""
    wrong: int = 0
    """To a process that does not own them."""
    lost: int = 0
    """Not at all."""

    def __add__(self, other: Score) -> Score:  # type: ignore[override]
        return Score(*map(sum, zip(self, other)))


def score(truth: Truth, seen: Mapping[Ports, int]) -> Score:
    """Compares the PIDs that a tool gave with the true ones."""
    verdicts: list[str] = []
    for ports, owner in truth.items():
        pid = seen.get(ports)
        if pid is None:
            verdicts.append("lost")
        elif pid == owner.pid:
            verdicts.append("right" if pid else "nobody")
        else:
            verdicts.append("wrong" if pid else "unknown")
    return Score(*map(verdicts.count, Score._fields))
