"""A running trace: events as they come, and what was lost."""

from __future__ import annotations

import select
import time
from contextlib import suppress

from tcpobs import host
from tcpobs.errors import HostError, TcpobsError
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing
from tcpobs.libbpf.iterator import BpfIterator
from tcpobs.libbpf.resource import Resource
from tcpobs.open_sessions import HashWalk, StorageWalk
from tcpobs.records import decoder
from tcpobs.transport import PerfBufferTransport, RingBufferTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Generic, TypedDict, TypeVar

    from tcpobs.libbpf.btf import Value
    from tcpobs.open_sessions import OpenSessions
    from tcpobs.records import Record, Timed
    from tcpobs.transport import Transport

    R = TypeVar("R", bound=Timed)

    class Options(TypedDict, total=False):
        """How to trace: the options that Events has."""

        duration: float | None
        buffer_size: int
        max_sockets: int
        btf: str | None
        hook: str | None
        storage: str | None
        transport: str | None
        accept: str | None

else:
    from tcpobs.transport import Generic, R


BUFFER_SIZE = 8 << 20
"""Bytes of the buffer unless told otherwise: about 80,000 events."""

MAX_SOCKETS = 1 << 18
"""Sockets that the hash map holds, where it is used, unless told otherwise; more delay the start."""

POLL_SECONDS = 0.05
"""The reader looks at the buffer this often; the programs wake it only when much is waiting."""


class Losses:
    """What was lost since the start, by cause. True if anything was.

    buffer_full: events for which the buffer had no room (or, with perf buffers, there was no buffer: for a
    CPU that came after the start).
    sockets_full: changes of sockets for whose state there was no room: their spans, owners or whole
    sessions are missing.
    recursion_misses: changes that came while the programs for them were running on the same CPU, so
    that the kernel did not run them. With tracepoints and kprobes, Linux counts them from 6.7 on.
    unfinished: events that were still being written when the trace ended.
    accept_misses: the same as recursion_misses, of the program that sees who accepts: no event is missing,
    but an owner may be.
    groups_full: sessions for whose group there was no room.
    """

    __slots__ = (
        "accept_misses",
        "buffer_full",
        "groups_full",
        "recursion_misses",
        "sockets_full",
        "unfinished",
    )

    def __init__(
        self,
        buffer_full: int = 0,
        sockets_full: int = 0,
        recursion_misses: int = 0,
        unfinished: int = 0,
        accept_misses: int = 0,
        groups_full: int = 0,
    ) -> None:
        self.accept_misses = accept_misses
        self.buffer_full = buffer_full
        self.groups_full = groups_full
        self.sockets_full = sockets_full
        self.recursion_misses = recursion_misses
        self.unfinished = unfinished

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Losses) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    def __str__(self) -> str:
        causes = (
            (self.buffer_full, "the buffer was full (raise --buffer-size)"),
            (self.sockets_full, "no room to remember a socket (raise --max-sockets)"),
            (self.recursion_misses, "the kernel skipped the program"),
            (self.unfinished, "still being written at the end"),
            (self.accept_misses, "an accept was not seen (its owner may be unknown)"),
            (self.groups_full, "no room for a group (raise --max-groups)"),
        )
        return ", ".join(f"{count}: {cause}" for count, cause in causes if count) or "none"

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}={getattr(self, name)}" for name in self.__slots__)
        return f"Losses({counts})"


def _which(event: Record) -> tuple[object, ...]:
    """Which connection it is about: its two ends, and the network that they are in."""
    return event[event.fields["endpoints"]], event[event.fields["netns"]]


class Events(Resource, Generic[R]):
    """Events of one tool, traced from the moment this is made until it is closed.

    Iterate over it for one event after another, or over `batches()`. It is a context manager; leaving it
    detaches everything.
    """

    def __init__(
        self,
        tool: str,
        record: type[R],
        constants: dict[str, Value],
        *,
        owners: bool = True,
        existing: bool = False,
        still_open: bool = False,
        every: float | None = None,
        max_groups: int | None = None,
        duration: float | None = None,
        buffer_size: int = BUFFER_SIZE,
        max_sockets: int = MAX_SOCKETS,
        btf: str | None = None,
        hook: str | None = None,
        storage: str | None = None,
        transport: str | None = None,
        accept: str | None = None,
    ) -> None:
        """Loads and attaches `tool`'s program, with `constants` set, the first way that works.

        With `owners` it sees who accepts; with `existing` it knows the sessions that are there now. Open
        sessions come as events at the end (`still_open`), and `every` so many seconds. There is room for
        `max_groups` groups, if that is given.
        `duration` is in seconds, `buffer_size` in bytes (rounded up to a power of two), `max_sockets`
        counts sockets. `btf` is a file with the kernel's types, for a kernel that does not carry them.
        `hook`, `storage`, `transport` and `accept` force a way (see host.WAYS). Raises TcpobsError.
        """
        if not 0 < buffer_size <= 1 << 30:
            raise TcpobsError(f"buffer_size is at most 1 GiB, not {buffer_size} bytes")
        if not 0 < max_sockets < 1 << 32:
            raise TcpobsError(f"max_sockets is from 1 to 4294967295, not {max_sockets}")
        if max_groups is not None and not 0 < max_groups < 1 << 32:
            raise TcpobsError(f"max_groups is from 1 to 4294967295, not {max_groups}")
        if every is not None and not every > 0:
            raise TcpobsError(f"every is more than 0 seconds, not {every}")
        if btf is not None:
            host.check_btf(btf)
        self._tool = tool
        self._record = record
        self._constants = constants
        self._buffer_size = 1 << max(16, (buffer_size - 1).bit_length())
        self._max_sockets = max_sockets
        self._max_groups = max_groups
        self._existing, self._still_open, self._every = existing, still_open, every or float("inf")
        self._losses = Losses()
        self._unfinished = 0
        self._stopped = False
        self._open: OpenSessions | None = None
        failures: list[tuple[host.Way, LibbpfError]] = []
        for way in host.ways(hook, storage, transport, accept if owners else "none"):
            try:
                self._start(way, btf)
                break
            except LibraryMissing:
                raise
            except LibbpfError as error:
                failures.append((way, error))
                if host.is_denied(error):
                    raise host.refusal(failures, btf) from None
            except OSError as error:
                raise HostError(f"cannot trace: {error.strerror}", "raise that limit (ulimit -a)") from None
        else:
            raise host.refusal(failures, btf)
        self.way = way
        """How it is traced."""
        self._end = time.monotonic() + duration if duration is not None else float("inf")

    def _start(self, way: host.Way, btf: str | None) -> None:
        """Traces this way. Raises LibbpfError, with everything undone, when the kernel does not take it."""
        lists_open = self._still_open or self._every < float("inf")
        beside = ["snapshot"] * self._existing + [f"open_{way.storage}"] * lists_open
        object, programs = host.open_object(self._tool, way, btf, beside)
        try:
            for name, value in self._constants.items():
                object.variables[name] = value
            object.variables["track_existing"] = self._existing
            object.variables["started_ns"] = time.monotonic_ns()
            object.variables["wakeup_bytes"] = self._buffer_size // 4
            if way.transport == "ringbuf":
                object.maps["ring_buffer"].max_entries = self._buffer_size
            if way.storage == "hash":
                object.maps["socket_hash"].max_entries = self._max_sockets
            if self._max_groups:
                for name in host.GROUP_MAPS:
                    object.maps[name].autocreate = True
                    object.maps[name].max_entries = self._max_groups
            object.load()
            transport: Transport[R]
            if way.transport == "ringbuf":
                transport = RingBufferTransport(object, self._record)
            else:
                transport = PerfBufferTransport(object, self._record, self._buffer_size)
            try:
                # Edge-triggered: wait for the kernel's wake-up, not for the first byte to read.
                poll = select.epoll()
                for fd in transport.fds:
                    poll.register(fd, select.EPOLLIN | select.EPOLLET)
                for program in programs:
                    object.attach(program)
                if self._existing:
                    with BpfIterator(object.programs["snapshot"]) as snapshot:
                        for _ in snapshot.read():
                            pass
                if lists_open:
                    walk = StorageWalk if way.storage == "sk_storage" else HashWalk
                    self._open = walk(object, f"open_{way.storage}", host.STORAGE_MAPS[way.storage])
            except BaseException:
                transport.close()
                raise
        except BaseException:
            object.close()
            raise
        self._object, self._transport, self._poll = object, transport, poll
        self._accept = [object.programs[name] for name in programs if name.startswith("accept_")]
        first = [name for name in programs if not name.endswith(("_again", "_preempted"))]
        self._programs = [object.programs[name] for name in first[len(self._accept) :]]

    def __iter__(self) -> Iterator[R]:
        """Events until `stop`, or until the duration is over."""
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[R]]:
        """Lists of events as they come, at least every POLL_SECONDS: an empty one when nothing came.

        At the end everything is detached, and then what is left in the buffer comes too.
        """
        self._look = time.monotonic() + self._every
        while not self._stopped and time.monotonic() < self._end:
            yield self._transport.take()
            if time.monotonic() >= self._look:
                self._look += self._every
                yield from self._open_sessions()
            if not self._transport.more and not self._stopped:
                self._wait()
        still_open = list(self._open_sessions()) if self._still_open else []
        self._object.detach()
        time.sleep(0.001)  # detaching does not wait for a program that is running: it may still write
        ended: dict[tuple[object, ...], int] = {}
        for batch in self._transport.rest():
            yield batch
            if still_open:
                ended.update((_which(event), event.time_ns) for event in batch)
        for batch in still_open:  # but for those that ended after all
            yield [event for event in batch if ended.get(_which(event), 0) < event.time_ns]
        self._unfinished = self._transport.unfinished

    def _open_sessions(self) -> Iterator[list[R]]:
        """What is open now, each session once."""
        assert self._open
        _, decode = decoder(self._record, self._object.btf)
        for piece in self._open.read():
            yield list(decode(piece))

    def _wait(self) -> None:
        left = min(self._end, self._look) - time.monotonic()
        for fd, happened in self._poll.poll(max(0.0, min(POLL_SECONDS, left))):
            if fd not in self._transport.fds and happened & (select.EPOLLERR | select.EPOLLHUP):
                self.stop()

    def stop(self) -> None:
        """Ends the iteration after what has been gathered; may be called from a signal handler."""
        self._stopped = True

    def stop_when_broken(self, fd: int) -> None:
        """Ends the iteration, too, when the reader of this pipe or terminal has gone."""
        with suppress(PermissionError):  # a file: it has no reader that could go
            self._poll.register(fd, 0)

    @property
    def losses(self) -> Losses:
        """What was lost so far; after closing, in all."""
        if self._object.loaded:
            lost: Any = self._object.variables["lost"]
            skipped = sum(program.recursion_misses for program in self._programs)
            misses = max(0, skipped - lost["recovered"])  # while detaching, the second program is alone
            accepts = sum(program.recursion_misses for program in self._accept)
            self._losses = Losses(
                lost["buffer_full"],
                lost["sockets_full"],
                misses,
                self._unfinished,
                accepts,
                lost["groups_full"],
            )
        return self._losses

    def close(self) -> None:
        """Detaches and frees everything."""
        if not self._object.loaded:
            return
        try:
            _ = self.losses  # keeps the last count
        finally:
            self._poll.close()
            self._transport.close()
            if self._open:
                self._open.close()
            self._object.close()
