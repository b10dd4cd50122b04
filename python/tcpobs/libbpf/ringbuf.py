"""Ring buffers, read in bulk.

libbpf's own reader calls a function for each record, which is dear in Python. This one reads the shared
memory itself, as Documentation/bpf/ringbuf.rst and kernel/bpf/ringbuf.c lay it out:

    page 0          the consumer's position, ours to write
    page 1          the producer's position
    page 2 and on   the records: a header (u32 length and flags, u32 unused), the data, padding to 8 bytes

Positions count bytes and never wrap; the place in the buffer is the position modulo its size.
"""

from __future__ import annotations

import mmap
import time

from tcpobs.libbpf.errors import LibbpfError
from tcpobs.libbpf.resource import Resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.libbpf.map import Map

HEADER_SIZE = 8
_BUSY = 1 << 31  # BPF_RINGBUF_BUSY_BIT: reserved, not yet submitted


class RingBuffer(Resource):
    """The reading end of a ring buffer map whose records all have one size.

    Its memory is that of the buffer, mapped once.
    """

    def __init__(self, map: Map, record_size: int) -> None:
        """`record_size` is in bytes, without the header."""
        self.fd = map.fd
        self.stride = (HEADER_SIZE + record_size + 7) // 8 * 8
        """Bytes from one record to the next."""
        self._record_size = record_size
        self._size = map.max_entries
        page = mmap.PAGESIZE
        self._consumer_page = mmap.mmap(self.fd, page)
        self._other_pages = mmap.mmap(self.fd, page + self._size, prot=mmap.PROT_READ, offset=page)
        self._consumer = memoryview(self._consumer_page).cast("Q")
        self._producer = memoryview(self._other_pages)[:page].cast("Q")
        self._data = memoryview(self._other_pages)[page:]
        self._words = self._data.cast("I")

    @property
    def waiting(self) -> int:
        """How many records are in the buffer, whole or still being written."""
        waiting: int = (self._producer[0] - self._consumer[0]) // self.stride
        return waiting

    def read(self, most: int) -> bytes:
        """Takes up to `most` records out of the buffer: `stride` bytes each, the header first.

        What is taken makes room for new ones. Empty when there is nothing.
        """
        start = self._consumer[0]
        waiting = (self._producer[0] - start) // self.stride
        if not waiting:
            return b""
        order_memory()
        size = self._submitted(start, min(waiting, most)) * self.stride
        order_memory()
        place = start % self._size
        records = bytes(self._data[place : place + size])
        if len(records) < size:
            records += self._data[: size - len(records)]
        order_memory()
        self._consumer[0] = start + size
        return records

    def _submitted(self, start: int, count: int) -> int:
        """How many of the `count` records from `start` on are whole, up to the first that is not."""
        place = start % self._size
        before_end = min(count, -(-(self._size - place) // self.stride))
        lengths = self._lengths(place, before_end)
        if before_end < count:
            lengths += self._lengths((place + before_end * self.stride) % self._size, count - before_end)
        if lengths.count(self._record_size) == count:
            return count
        for index, length in enumerate(lengths):
            if length & _BUSY:
                return index
            if length != self._record_size:
                raise LibbpfError(f"a record of {length} bytes in a ring of {self._record_size}")
        return count

    def _lengths(self, place: int, count: int) -> list[int]:
        """The first word of `count` headers from `place` on."""
        step = self.stride // 4
        return self._words[place // 4 : place // 4 + (count - 1) * step + 1 : step].tolist()

    def close(self) -> None:
        """Unmaps the memory."""
        for view in (self._words, self._data, self._producer, self._consumer):
            view.release()
        self._other_pages.close()
        self._consumer_page.close()


def order_memory() -> None:
    """Keeps loads and stores before it from moving behind it, and the other way round.

    CPUs with weak ordering (aarch64) need that between a header, its data, and giving the room back.
    Python has no such instruction; but sleeping, be it for no time, gives up and takes back the
    interpreter lock, and a mutex released and then acquired orders memory (pthreads(7), POSIX 4.15).
    """
    time.sleep(0)
