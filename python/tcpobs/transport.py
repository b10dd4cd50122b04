"""How events come from the programs: through one ring buffer, or through a perf buffer for each CPU."""

from __future__ import annotations

import time
from bisect import bisect_right
from operator import attrgetter

from tcpobs.libbpf import perfbuf, ringbuf
from tcpobs.libbpf.resource import Resource
from tcpobs.records import decoder

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Generic, TypeVar

    from tcpobs.libbpf.object import Object
    from tcpobs.records import Timed

    R = TypeVar("R", bound=Timed)
else:
    R = None

    class Generic:
        """Stands for typing's, whose import the first line would wait for."""

        def __class_getitem__(cls, _):
            return cls


BATCH = 512
"""Events decoded at once, at most."""

BUSY_SECONDS = 0.05
"""How long a program that was still writing when it was detached is waited for."""


class Transport(Resource, Generic[R]):
    """The reading end."""

    fds: list[int]
    """Readable when much is waiting."""
    more = False
    """Whether there was more to take at the last time."""

    def take(self) -> list[R]:
        """The events that wait, BATCH at most."""
        raise NotImplementedError

    def rest(self) -> Iterator[list[R]]:
        """All that is left once the programs are detached: one that is running may still write."""
        raise NotImplementedError

    @property
    def unfinished(self) -> int:
        """Events that are not written to their end."""
        raise NotImplementedError


class RingBufferTransport(Transport[R]):
    """One buffer for all CPUs: events come in their order."""

    def __init__(self, object: Object, record: type[R]) -> None:
        size, self._decode = decoder(record, object.btf, ringbuf.HEADER_SIZE)
        self._ring = ringbuf.RingBuffer(object.maps["ring_buffer"], size)
        self.fds = [self._ring.fd]

    def take(self) -> list[R]:
        """See Transport."""
        batch = list(self._decode(self._ring.read(BATCH)))
        self.more = len(batch) == BATCH
        return batch

    def rest(self) -> Iterator[list[R]]:
        """See Transport."""
        end = time.monotonic() + BUSY_SECONDS
        while self._ring.waiting and time.monotonic() < end:
            batch = self.take()
            yield batch
            if batch:
                end = time.monotonic() + BUSY_SECONDS

    @property
    def unfinished(self) -> int:
        """See Transport."""
        return self._ring.waiting

    def close(self) -> None:
        """Unmaps it."""
        self._ring.close()


class PerfBufferTransport(Transport[R]):
    """A buffer for each CPU: events are put into their order here.

    An event waits for one more look at the buffers, for an earlier one may still come from another CPU.
    """

    def __init__(self, object: Object, record: type[R], size: int) -> None:
        """`size` is in bytes, of all buffers together."""
        record_size, self._decode = decoder(record, object.btf, perfbuf.HEADER_SIZE)
        self._buffers = perfbuf.PerfBuffers(object.maps["perf_buffers"], record_size, size)
        self.fds = self._buffers.fds
        self._waiting: list[R] = []
        self._ready: list[R] = []

    def take(self) -> list[R]:
        """See Transport."""
        if not self._ready:
            seen_ns = self._waiting[-1].time_ns if self._waiting else 0
            self._read()
            seen = bisect_right([event.time_ns for event in self._waiting], seen_ns)
            self._ready, self._waiting = self._waiting[:seen], self._waiting[seen:]
        return self._next()

    def _read(self) -> None:
        """Empties the buffers; all that waits is in order then."""
        self._waiting += self._decode(self._buffers.read())
        self._waiting.sort(key=attrgetter("time_ns"))

    def _next(self) -> list[R]:
        batch = self._ready[:BATCH]
        del self._ready[:BATCH]
        self.more = bool(self._ready)
        return batch

    def rest(self) -> Iterator[list[R]]:
        """See Transport."""
        self._read()
        self._ready += self._waiting
        self._waiting = []
        while self._ready:
            yield self._next()

    @property
    def unfinished(self) -> int:
        """None: such an event is not in the buffer."""
        return 0

    def close(self) -> None:
        """Unmaps them."""
        self._buffers.close()
